"""Gated linear attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig

from hf_linear.cache import StateLayer
from hf_linear.mixers.base import RecurrentMixer
from hf_linear.modules.decay import log_decay
from hf_linear.modules.feature_maps import feature_map
from hf_linear.modules.norm import HEAD_NORMS, project_heads
from hf_linear.modules.padding import zero_padding
from hf_linear.modules.projections import project, repeat_heads
from hf_linear.modules.short_conv import ShortConv
from hf_linear.ops import gated_linear_attention


class GatedLinearAttention(RecurrentMixer):
    """S_t = diag(alpha_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t / sqrt(K), with alpha = sigmoid(W2 W1 x + b)^(1/16).

    State: S [B, H, K, V] and, with short convolutions, their last inputs.

    Source: arXiv 2312.06635, section 4.4.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.groups = config.num_heads // config.num_kv_heads
        self.head_k, self.head_v = config.key_dim // config.num_heads, config.value_dim // config.num_heads
        key_dim, value_dim = config.num_kv_heads * self.head_k, config.num_kv_heads * self.head_v
        self.q_proj = nn.Linear(config.hidden_size, config.key_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, value_dim, bias=False)
        if config.use_short_conv:
            self.q_conv1d = ShortConv(config.key_dim, config.conv_size, activation="silu")
            self.k_conv1d = ShortConv(key_dim, config.conv_size, activation="silu")
            self.v_conv1d = ShortConv(value_dim, config.conv_size, activation="silu")
        self.gk_proj = nn.Sequential(
            nn.Linear(config.hidden_size, config.gate_low_rank_dim, bias=False),
            nn.Linear(config.gate_low_rank_dim, key_dim),
        )
        if config.use_output_gate:
            self.g_proj = nn.Linear(config.hidden_size, value_dim * self.groups, bias=config.output_gate_bias)
        norm = HEAD_NORMS[config.head_norm]
        self.norm = norm(self.head_v, eps=config.head_norm_eps, elementwise_affine=config.elementwise_affine)
        self.o_proj = nn.Linear(config.value_dim, config.hidden_size, bias=False)
        self.phi = feature_map(config.feature_map)

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
        cache = self.state(past_key_values)
        gated = [self.g_proj] if self.config.use_output_gate else []
        q, k, v, low, *gate = project(x, self.q_proj, self.k_proj, self.v_proj, self.gk_proj[0], *gated)
        states = {}
        if self.config.use_short_conv:
            q, k, v, states["conv"] = self.convolve(q, k, v, attention_mask, cu_seqlens, cache)
        q, k = (self.phi(y.unflatten(-1, (-1, self.head_k))) for y in (q, k))
        v = v.unflatten(-1, (-1, self.head_v))
        g = log_decay(self.gk_proj[1](low), self.config.gate_logit_normalizer).unflatten(-1, (-1, self.head_k))
        if self.config.clamp_min is not None:
            g = g.clamp(min=self.config.clamp_min)
        k, g = zero_padding(attention_mask, k, g)
        k, v, g = (repeat_heads(y, self.groups) for y in (k, v, g))
        o = self.attend(gated_linear_attention, q, k, v, g, cache, cu_seqlens, **states)
        return project_heads(o, gate[0] if gate else None, self.norm, self.o_proj), None

    def convolve(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, cache: StateLayer | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The short convolutions of q, k and v, whose states lie side by side in one tensor."""
        past = None if cache is None else cache.read("conv")
        pasts = (None, None, None) if past is None else past.split([q.shape[-1], k.shape[-1], v.shape[-1]], -1)
        convs = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        outputs = [conv(y, mask, cu_seqlens, s) for conv, y, s in zip(convs, (q, k, v), pasts, strict=True)]
        (q, q_state), (k, k_state), (v, v_state) = outputs
        return q, k, v, torch.cat([q_state, k_state, v_state], -1)
