"""Linear attention in the kernel view."""

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
from hf_linear.ops import linear_attention


class LinearAttention(RecurrentMixer):
    """o_t = sum_{s <= t} (phi(q_t) . phi(k_s)) v_s / sum_{s <= t} phi(q_t) . phi(k_s).

    The denominator phi(q_t) . z_t, with z_t the sum of phi(k_s), is one more value channel that always holds 1: state
    [B, H, K, V + 1], its last column z. With feature map "identity" scores may be negative and their sum near zero, so the
    sum is taken only where phi is positive, and the head norm sets the scale instead.
    Source: arXiv 2006.16236, eq. 9 and section 3.2.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.num_heads, self.groups = config.num_heads, config.num_heads // config.num_kv_heads
        self.head_k, self.head_v = config.key_dim // config.num_heads, config.value_dim // config.num_heads
        self.phi, self.normalise = feature_map(config.feature_map), config.feature_map != "identity"
        self.q_proj = nn.Linear(config.hidden_size, config.key_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_kv_heads * self.head_k, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_kv_heads * self.head_v, bias=False)
        self.norm = GatedRMSNorm(self.head_v, eps=config.norm_eps)
        self.o_proj = nn.Linear(config.value_dim, config.hidden_size, bias=False)

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
        q, k, v = project(x, self.q_proj, self.k_proj, self.v_proj)
        q, k = (self.phi(y.unflatten(-1, (-1, self.head_k))) for y in (q, k))
        v = v.unflatten(-1, (-1, self.head_v))
        if self.normalise:
            v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        (k,) = zero_padding(attention_mask, k)
        k, v = (repeat_heads(y, self.groups) for y in (k, v))
        o = self.attend(linear_attention, q, k, v, None, self.state(past_key_values), cu_seqlens)
        if self.normalise:
            o, total = o[..., :-1], o[..., -1:]
            o = o / torch.where(total == 0, 1, total)  # where every score is zero, so is their weighted sum
        return project_heads(o, None, self.norm, self.o_proj), None
