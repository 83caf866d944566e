"""Decays that depend on the input."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_linear.modules.fused import available


def log_decay(x: Tensor, n: float) -> Tensor:
    """log(sigmoid(x)) / n, in float32 at least."""
    if available(x):
        from hf_linear.kernels import fused

        return fused.decay(x, n)
    return F.logsigmoid(x.to(torch.promote_types(x.dtype, torch.float32))) / n
