"""Multi-scale retention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig

from hf_linear.mixers.base import RecurrentMixer
from hf_linear.modules.feature_maps import feature_map
from hf_linear.modules.norm import GatedRMSNorm, project_heads
from hf_linear.modules.padding import zero_padding
from hf_linear.modules.projections import project, repeat_heads
from hf_linear.modules.rotary import FREQUENCIES, angles, rotate
from hf_linear.ops import linear_attention, retention_decay

THETA = 10000.0  # in every published RetNet


class Retention(RecurrentMixer):
    """S_t = gamma S_{t-1} + k_t v_t^T, o_t = S_t^T q_t / sqrt(K), then norm and gate; gamma_h = 1 - 2^(-5-h).

    State: S [B, H, K, V].

    `retention_norm` "none" is fla's retention. "decay" divides o_t by sqrt(sum_{i < n} gamma^i), n being the token's place in
    its document: exactly torchscale's recurrent form, and its parallel form as long as the sum of |scores| stays below 1.
    Source: arXiv 2307.08621, eq. 8.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.groups = config.num_heads // config.num_kv_heads
        self.head_k, self.head_v = config.key_dim // config.num_heads, config.value_dim // config.num_heads
        self.q_proj = nn.Linear(config.hidden_size, config.key_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_kv_heads * self.head_k, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_kv_heads * self.head_v, bias=False)
        if config.use_output_gate:
            self.g_proj = nn.Linear(config.hidden_size, config.value_dim, bias=False)
        self.norm = GatedRMSNorm(self.head_v, eps=config.norm_eps, elementwise_affine=config.elementwise_affine)
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
        gated = [self.g_proj] if self.config.use_output_gate else []
        q, k, v, *gate = project(x, self.q_proj, self.k_proj, self.v_proj, *gated)
        q, k, v = (y.unflatten(-1, (-1, width)) for y, width in ((q, self.head_k), (k, self.head_k), (v, self.head_v)))
        dtype = torch.promote_types(x.dtype, torch.float32)
        frequencies = FREQUENCIES[self.config.rope_frequencies](self.head_k, THETA, x.device, dtype)
        q, k = self.phi(q), self.phi(k)
        turn = angles(position_ids, frequencies)
        q, k = (rotate(y, turn, self.config.rope_style) for y in (q, k))
        (k,) = zero_padding(attention_mask, k)
        k, v = (repeat_heads(y, self.groups) for y in (k, v))

        g = retention_decay(q.shape[2], x.device, dtype)
        if attention_mask is not None:  # the decay is the identity on a pad
            g = g * attention_mask[..., None].to(dtype)
        o = self.attend(linear_attention, q, k, v, g, self.state(past_key_values), cu_seqlens)

        if self.config.retention_norm == "decay":
            o = o * self.decay_norm(position_ids, dtype).to(o.dtype)
        return project_heads(o, gate[0] if gate else None, self.norm, self.o_proj), None

    def decay_norm(self, position_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """1 / sqrt(sum_{i < n} gamma^i) = sqrt((1 - gamma) / (1 - gamma^n)) at n = position + 1, [B or 1, T, H, 1]."""
        g = retention_decay(self.config.num_heads, position_ids.device, dtype)
        n = position_ids[..., None].to(dtype) + 1
        return (torch.expm1(g) / torch.expm1(g * n)).sqrt()[..., None]
