"""When the passes between a model's products run fused, and when a product may be taken out of its module.

A compiled graph gets plain PyTorch: its compiler fuses that as well as our kernels do, and across their boundaries.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_linear.ops.gpu import CAPABILITY, DTYPES, HAS_TRITON


def available(x: Tensor) -> bool:
    """Whether `hf_linear.kernels.fused` takes x."""
    return not torch.compiler.is_compiling() and x.dtype in DTYPES and runs_triton(x.device)


def runs_triton(device: torch.device) -> bool:
    return HAS_TRITON and device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY


def bare(*linears: nn.Module) -> bool:
    """Whether x W^T is all that calling these modules would do, so that W may be read instead."""
    return not torch.is_autocast_enabled("cuda") and all(is_bare(linear) for linear in linears)


def is_bare(linear: nn.Module) -> bool:
    """Whether nothing has been put on or around a linear layer without bias: no adapter, quantised or sharded weight, hook or
    other forward. All of these would be left out in silence where its weight is read."""
    if type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter or linear.bias is not None:
        return False
    hooks = linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks
    return not any(hooks) and "forward" not in vars(linear)
