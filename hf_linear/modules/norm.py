"""Root-mean-square norms (arXiv 1910.07467), and a layer norm for heads. Their parameters are those of torch.nn.RMSNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_linear.modules.fused import available, factor_dtype, is_bare, is_untouched


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight."""

    def forward(self, x: Tensor) -> Tensor:
        if available(x):
            from hf_linear.kernels import fused

            return fused.norm(x, None, self.weight, self.eps, factor_dtype(x))
        return super().forward(x)


def add_norm(x: Tensor, y: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """x + y and norm(x + y). On a GPU one pass, and one back, which takes up the gradient of the sum by its other ways."""
    if available(x) and type(norm) is RMSNorm and is_untouched(norm):
        from hf_linear.kernels import fused

        return fused.add_norm(x, y, norm.weight, norm.eps, factor_dtype(x))
    if y is not None:
        x = x + y
    return x, norm(x)


class GatedRMSNorm(nn.RMSNorm):
    """norm(o) * silu(gate), every head's norm by itself, the heads then side by side."""

    def forward(self, o: Tensor, gate: Tensor | None = None) -> Tensor:
        """o: [B, T, H, V]; gate: [B, T, H V], or None for none."""
        if available(o):
            from hf_linear.kernels import fused

            return fused.norm(o, gate, self.weight, self.eps, factor_dtype(o)).flatten(-2)
        y = super().forward(o).flatten(-2)
        return y if gate is None else y * F.silu(gate)


class GroupRMSNorm(nn.RMSNorm):
    """norm(y * silu(gate)), every group of channels by itself: the gate first, as Mamba-2 has it. In float32 at least."""

    def __init__(self, dim: int, groups: int, eps: float):
        super().__init__(dim, eps=eps)
        self.groups = groups

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        """y, gate: [B, T, D]."""
        dtype = torch.promote_types(y.dtype, torch.float32)
        y = (y.to(dtype) * F.silu(gate.to(dtype))).unflatten(-1, (self.groups, -1))
        return F.rms_norm(y, y.shape[-1:], eps=self.eps).flatten(-2) * self.weight


class GatedLayerNorm(GatedRMSNorm):
    """GatedRMSNorm of o minus its mean: a layer norm without a bias (arXiv 1607.06450)."""

    def forward(self, o: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(o - o.mean(-1, keepdim=True), gate)


HEAD_NORMS = {"rms": GatedRMSNorm, "layer": GatedLayerNorm}


def project_heads(o: Tensor, gate: Tensor | None, norm: nn.Module, linear: nn.Module) -> Tensor:
    """linear(norm(o, gate)). On a GPU nothing of the norm's is kept for the backward pass but its inputs."""
    if available(o) and type(norm) is GatedRMSNorm and is_untouched(norm) and is_bare(linear):
        from hf_linear.kernels import fused

        return fused.norm_product(linear.weight, o, gate, norm.weight, norm.eps, factor_dtype(o))
    return linear(norm(o, gate))
