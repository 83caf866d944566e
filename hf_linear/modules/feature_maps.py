"""phi of kernel-view linear attention: softmax(q k^T) is replaced by phi(q) phi(k)^T."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1 > 0 (arXiv 2006.16236, eq. 7)."""
    return F.elu(x) + 1


def softmax(x: Tensor) -> Tensor:
    """A distribution over the head's channels."""
    return torch.softmax(x, dim=-1)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2 (arXiv 2109.08668)."""
    return F.relu(x) ** 2


def identity(x: Tensor) -> Tensor:
    return x


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": elu_plus_one,
    "relu": F.relu,
    "identity": identity,
    "softmax": softmax,
    # In Transformers' words.
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": squared_relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
}


def feature_map(name: str) -> Callable[[Tensor], Tensor]:
    if name not in FEATURE_MAPS:
        raise ValueError(
            f"feature_map must be one of {sorted(FEATURE_MAPS)}, got {name!r}: "
            "take one of them, or add yours to hf_linear.modules.feature_maps.FEATURE_MAPS"
        )
    return FEATURE_MAPS[name]
