"""Rotary positions: each pair of channels of q and k turns by position * frequency (arXiv 2104.09864).

Angles are computed where they are used, in float32 at least: a buffer would follow the model to bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hf_linear.modules.fused import available

STYLES = ("half", "interleaved")
ROPE_TYPES = ("default", *ROPE_INIT_FUNCTIONS)


def standard_frequencies(dim: int, theta: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """theta ** (-2 i / dim), [dim / 2]."""
    return theta ** (-torch.arange(0, dim, 2, device=device, dtype=dtype) / dim)


def linspace_frequencies(dim: int, theta: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """theta ** (-i / (dim / 2 - 1)): torchscale's, the last frequency being 1 / theta exactly, [dim / 2]."""
    return theta ** -torch.linspace(0, 1, dim // 2, device=device, dtype=dtype)


FREQUENCIES = {"standard": standard_frequencies, "linspace": linspace_frequencies}


def rotate(x: Tensor, angles: Tensor, style: str, scale: float = 1.0) -> Tensor:
    """Turn the channel pairs of x [B, T, H, D] by angles [B or 1, T, R / 2]; channels from R on stay as they are.

    Style "half" pairs channel i with i + R / 2, "interleaved" pairs 2 i with 2 i + 1.
    """
    cos, sin = scale * angles.cos(), scale * angles.sin()
    if available(x):
        from hf_linear.kernels import fused

        return fused.rotate(x, cos, sin, style == "interleaved")
    R, cos, sin = 2 * angles.shape[-1], cos[:, :, None], sin[:, :, None]
    turned, rest = x[..., :R].to(angles.dtype), x[..., R:]
    a, b = turned.chunk(2, -1) if style == "half" else turned.unflatten(-1, (-1, 2)).unbind(-1)
    pair = a * cos - b * sin, b * cos + a * sin
    turned = torch.cat(pair, -1) if style == "half" else torch.stack(pair, -1).flatten(-2)
    return torch.cat([turned.to(x.dtype), rest], -1)


def angles(position_ids: Tensor, frequencies: Tensor) -> Tensor:
    return position_ids[..., None].to(frequencies.dtype) * frequencies


class AttentionRotary:
    """Rotary positions as `config.rope_parameters` describes them, in any of Transformers' variants; None turns nothing."""

    def __init__(self, config):
        self.config = config

    def __call__(self, q: Tensor, k: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        rope = self.config.rope_parameters
        if rope is None:
            return q, k
        dtype = torch.promote_types(q.dtype, torch.float32)
        scale = 1.0
        if rope["rope_type"] == "default":
            dim = int(self.config.head_dim * rope.get("partial_rotary_factor", 1.0))
            frequencies = standard_frequencies(dim, rope["rope_theta"], q.device, dtype)
        else:
            seen = position_ids.max() + 1
            frequencies, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](self.config, q.device, seq_len=seen)
        turn = angles(position_ids, frequencies.to(dtype))
        return rotate(q, turn, "half", scale), rotate(k, turn, "half", scale)
