"""Mamba-2: a state space with one decay a head, which is linear attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, PreTrainedConfig

from hf_linear.cache import StateLayer
from hf_linear.mixers.base import RecurrentMixer
from hf_linear.mixers.mamba import initial_dt_bias
from hf_linear.modules.norm import GroupRMSNorm
from hf_linear.modules.padding import zero_padding
from hf_linear.modules.projections import repeat_heads
from hf_linear.modules.short_conv import ShortConv
from hf_linear.ops import linear_attention
from hf_linear.ops.dispatch import compute_dtype


class Mamba2(RecurrentMixer):
    """h_t = exp(dt_t A) h_{t-1} + B_t (dt_t x_t)^T, y_t = h_t^T C_t + D x_t, then norm(y silu(z)); z, x, B, C, dt of the input.

    A, D and dt are one number a head. That is linear attention with q = C, k = B, v = dt x and the log-decay dt A, unscaled:
    the duality of state spaces and attention. `n_groups` groups of heads share a B and a C, and a group's channels are
    normalised together. The parameters are those of Transformers' Mamba-2, Bamba, Granite and Zamba-2.

    State: h [B, H, N, P] and the last inputs of the short convolution.

    Source: arXiv 2405.21060, sections 3, 5.2 and 7.
    """

    float32_modules = ("A_log", "D", "dt_bias")

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.num_heads, self.n_groups = config.num_heads, config.n_groups
        self.intermediate_size = config.expand * config.hidden_size
        self.time_step_limit = config.time_step_limit
        conv_dim = self.intermediate_size + 2 * config.n_groups * config.state_size
        self.in_proj = nn.Linear(config.hidden_size, self.intermediate_size + conv_dim + self.num_heads, bias=config.use_bias)
        self.conv1d = ShortConv(conv_dim, config.conv_kernel, bias=config.use_conv_bias, activation="silu")
        self.dt_bias = nn.Parameter(self.initial_dt_bias())
        self.A_log = nn.Parameter(self.initial_A_log())
        self.D = nn.Parameter(torch.ones(self.num_heads))
        self.norm = GroupRMSNorm(self.intermediate_size, config.n_groups, eps=config.norm_eps)
        self.out_proj = nn.Linear(self.intermediate_size, config.hidden_size, bias=config.use_bias)

    def initial_A_log(self) -> Tensor:
        """A = -1, -2, ..., -H."""
        return torch.arange(1.0, self.num_heads + 1).log()

    def initial_dt_bias(self) -> Tensor:
        return initial_dt_bias(self.num_heads, self.config.time_step_min, self.config.time_step_max)

    def forward(
        self,
        x: Tensor,
        *,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        return mix(self, self.conv1d, x, attention_mask, cu_seqlens, self.state(past_key_values)), None


def mix(
    layer: Mamba2,
    convolve: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    cache: StateLayer | None,
) -> Tensor:
    """The output of a layer with the parameters and sizes of `Mamba2`; convolve: `ShortConv`'s forward on its `conv1d`."""
    dim, H, G, dtype = layer.intermediate_size, layer.num_heads, layer.n_groups, compute_dtype(x)
    projected = layer.in_proj(x)
    z, xBC, dt = projected.split([dim, projected.shape[-1] - dim - H, H], -1)
    xBC, conv = convolve(xBC, attention_mask, cu_seqlens, None if cache is None else cache.read("conv"))
    x, B, C = xBC.tensor_split([dim, (dim + xBC.shape[-1]) // 2], -1)
    x = x.unflatten(-1, (H, -1))
    B, C = (repeat_heads(y.unflatten(-1, (G, -1)), H // G) for y in (B, C))
    dt = F.softplus(dt.to(dtype) + layer.dt_bias.to(dtype)).clamp(*layer.time_step_limit)
    (dt,) = zero_padding(attention_mask, dt)  # a step of size 0 leaves the state as it is
    g = -layer.A_log.to(dtype).exp() * dt
    v = (dt[..., None] * x).to(x.dtype)
    y = RecurrentMixer.attend(linear_attention, C, B, v, g, cache, cu_seqlens, 1.0, conv=conv)
    y = y + layer.D[:, None] * x
    return layer.out_proj(layer.norm(y.flatten(-2), z).to(x.dtype))
