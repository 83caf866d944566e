"""What stands between a mixer's input and its heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hf_linear.modules.fused import available, factor_dtype, is_bare


def project(x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
    """linear(x) for every linear. On a GPU the gradient of x is summed up inside their products, not by passes between them."""
    if x.requires_grad and available(x) and all(is_bare(linear) for linear in linears):
        return Projections.apply(x.to(factor_dtype(x)), *(linear.weight for linear in linears))
    return tuple(linear(x) for linear in linears)


def repeat_heads(x: Tensor, groups: int) -> Tensor:
    """Every head of x [B, T, H, D] `groups` times. One head is a view: a copy would be kept for the backward pass."""
    if x.shape[2] == 1:
        return x.expand(-1, -1, groups, -1)
    return x if groups == 1 else x.repeat_interleave(groups, dim=2)


class Projections(torch.autograd.Function):
    """y_i = x W_i^T;  dx = sum_i dy_i W_i,  dW_i = dy_i^T x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        return tuple(F.linear(x, w.to(x.dtype)) for w in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        weights = [w.to(x.dtype) for w in weights]
        rows = x.flatten(0, -2)
        flat = [dy.flatten(0, -2) for dy in dys]
        dx = flat[0] @ weights[0]
        for dy, w in zip(flat[1:], weights[1:], strict=True):
            dx.addmm_(dy, w)
        learn = ctx.needs_input_grad[1:]
        return dx.view_as(x), *(dy.T @ rows if needed else None for dy, needed in zip(flat, learn, strict=True))
