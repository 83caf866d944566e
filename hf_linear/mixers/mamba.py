"""Mamba: a selective state space behind a short convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig

from hf_linear.cache import StateLayer
from hf_linear.mixers.base import RecurrentMixer
from hf_linear.modules.norm import RMSNorm
from hf_linear.modules.short_conv import ShortConv
from hf_linear.ops import selective_scan, selective_scan_step
from hf_linear.ops.dispatch import compute_dtype


class Mamba(RecurrentMixer):
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = (h_t C_t + D x_t) silu(z_t); x, z of the input, dt, B, C of x.

    With `inner_layernorms` (Jamba) each of dt, B and C is normalised. The parameters are those of Transformers' Jamba.

    State: h [B, D, N] and the last inputs of the short convolution.

    Source: arXiv 2312.00752, section 3; the norms: Jamba, arXiv 2403.19887, section 6.4.
    """

    float32_modules = ("A_log", "D")

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        N, rank, dim = config.state_size, config.time_step_rank, config.expand * config.hidden_size
        self.in_proj = nn.Linear(config.hidden_size, 2 * dim, bias=config.use_bias)
        self.conv1d = ShortConv(dim, config.conv_kernel, bias=config.use_conv_bias, activation="silu")
        self.x_proj = nn.Linear(dim, rank + 2 * N, bias=False)
        self.dt_proj = nn.Linear(rank, dim)
        self.A_log = nn.Parameter(self.initial_A_log(dim))
        self.D = nn.Parameter(torch.ones(dim))
        self.out_proj = nn.Linear(dim, config.hidden_size, bias=config.use_bias)
        if config.inner_layernorms:
            self.dt_layernorm = RMSNorm(rank, eps=config.norm_eps)
            self.b_layernorm = RMSNorm(N, eps=config.norm_eps)
            self.c_layernorm = RMSNorm(N, eps=config.norm_eps)

    def initial_A_log(self, dim: int) -> Tensor:
        """A = -1, -2, ..., -N in every channel: S4D's real initialisation."""
        return torch.arange(1.0, self.config.state_size + 1).log().repeat(dim, 1)

    def initial_dt_bias(self) -> Tensor:
        return initial_dt_bias(self.dt_proj.out_features, self.config.time_step_min, self.config.time_step_max)

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
    layer: Mamba,
    convolve: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    cache: StateLayer | None,
) -> Tensor:
    """The output of a layer with the parameters of `Mamba`, norms where it has them; convolve: `ShortConv`'s forward on its
    `conv1d`."""
    T, N = x.shape[1], layer.A_log.shape[1]
    x, z = layer.in_proj(x).chunk(2, -1)
    x, conv = convolve(x, attention_mask, cu_seqlens, None if cache is None else cache.read("conv"))
    selected = layer.x_proj(x)
    dt, B, C = selected.split([selected.shape[-1] - 2 * N, N, N], -1)
    if hasattr(layer, "dt_layernorm"):
        dt, B, C = layer.dt_layernorm(dt), layer.b_layernorm(B), layer.c_layernorm(C)
    dt = layer.dt_proj(dt)
    if attention_mask is not None:  # a step of size softplus(-inf) = 0 leaves the state as it is
        dt = dt.masked_fill(attention_mask[..., None] == 0, -torch.inf)
    A = -layer.A_log.to(compute_dtype(layer.A_log)).exp()
    inputs, state = (x, dt, A, B, C, layer.D, z), None if cache is None else cache.read("recurrent")
    if state is not None and RecurrentMixer.steps(state, T, *inputs):
        y, state = selective_scan_step(*inputs, state=state, dt_softplus=True)
    else:
        y, state = selective_scan(*inputs, initial_state=state, cu_seqlens=cu_seqlens, dt_softplus=True)
    if cache is not None:
        cache.write(T, recurrent=state, conv=conv)
    return layer.out_proj(y)


def initial_dt_bias(number: int, least: float, largest: float) -> Tensor:
    """Step sizes between two, evenly in their logarithm, as they are before a softplus."""
    ends = torch.tensor([least, largest]).log()
    dt = (ends[0] + torch.rand(number) * (ends[1] - ends[0])).exp()
    return dt + torch.log(-torch.expm1(-dt))
