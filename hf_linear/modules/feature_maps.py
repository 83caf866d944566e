"""phi of kernel-view linear attention: softmax(q k^T) is replaced by phi(q) phi(k)^T."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1 > 0 (arXiv 2006.16236, eq. 7)."""
    return F.elu(x) + 1


def softmax(x: Tensor) -> Tensor:
    """A distribution over the head's channels."""
    return torch.softmax(x, dim=-1)


def identity(x: Tensor) -> Tensor:
    return x


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": elu_plus_one,
    "relu": F.relu,
    "identity": identity,
    "softmax": softmax,
}


def feature_map(name: str) -> Callable[[Tensor], Tensor]:
    if name not in FEATURE_MAPS:
        raise ValueError(
            f"feature_map must be one of {sorted(FEATURE_MAPS)}, got {name!r}: "
            "take one of them, or add yours to hf_linear.modules.feature_maps.FEATURE_MAPS"
        )
    return FEATURE_MAPS[name]
