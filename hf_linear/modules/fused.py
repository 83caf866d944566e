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


def factor_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a product takes x: under autocast, autocast's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def is_bare(linear: nn.Module) -> bool:
    """Whether x W^T is all that calling this module would do, so that W may be read instead.

    Not so where something has been put on it or around it, an adapter, a quantised or sharded weight, a hook, another forward:
    all of that would be left out in silence.
    """
    plain = type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and linear.bias is None
    return plain and is_untouched(linear)


def is_untouched(module: nn.Module) -> bool:
    """Whether calling the module is calling its class's forward."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return not any(hooks) and "forward" not in vars(module)
