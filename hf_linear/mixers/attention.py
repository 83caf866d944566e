"""Softmax attention through Transformers' AttentionInterface: eager, SDPA, flash, or what the user registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn import functional as F
from transformers import Cache, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_linear.cache import check_keys
from hf_linear.inputs import PREFIX
from hf_linear.modules.norm import RMSNorm
from hf_linear.modules.rotary import AttentionRotary

Linear = Callable[[int, int, bool], nn.Module]  # of a width in, a width out, with or without a bias
Product = Callable[[str, Tensor], Tensor]  # of the weights that go by a name, and x
PAIRS = 1 << 27  # of a query and a key in one mask: 256 MiB in 16 bits


class AttentionWeights(nn.Module):
    """The linear layers of attention."""

    def __init__(self, config: PreTrainedConfig, linear: Linear = nn.Linear):
        super().__init__()
        D, bias = config.head_dim, config.attention_bias
        self.q_proj = linear(config.hidden_size, config.num_heads * D, bias)
        self.k_proj = linear(config.hidden_size, config.num_kv_heads * D, bias)
        self.v_proj = linear(config.hidden_size, config.num_kv_heads * D, bias)
        if config.attention_output_gate:
            self.g_proj = linear(config.hidden_size, config.num_heads * D, False)
        self.o_proj = linear(config.num_heads * D, config.hidden_size, False)


class Attention(AttentionWeights):
    """softmax(q k^T / sqrt(head_dim)) v with grouped key-value heads, rotary positions or none. State: keys and values.

    With `use_qk_norm` every head of q and k is normalised before it turns; with `attention_output_gate` the heads' outputs
    are multiplied by sigmoid(W x): both as in Qwen3-Next.
    """

    layer_type = "full_attention"
    cache_layer = None
    float32_modules = ()
    is_causal = True
    sliding_window: int | None = None

    def __init__(self, config: PreTrainedConfig, layer_idx: int, linear: Linear = nn.Linear):
        super().__init__(config, linear)
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_heads // config.num_kv_heads
        self.scaling = self.head_dim**-0.5 if config.attention_multiplier is None else config.attention_multiplier
        if config.use_qk_norm:
            self.q_norm = RMSNorm(self.head_dim, eps=config.norm_eps)
            self.k_norm = RMSNorm(self.head_dim, eps=config.norm_eps)
        self.rotary = AttentionRotary(config)

    def forward(
        self,
        x: Tensor,
        *,
        position_ids: Tensor,
        attention_mask: Any = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: Cache | None = None,
        shared: Product | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = (self.product(p, x, shared).unflatten(-1, (-1, self.head_dim)) for p in ("q_proj", "k_proj", "v_proj"))
        if self.config.use_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rotary(q, k, position_ids)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        if past_key_values is not None:
            check_keys(past_key_values, self.layer_idx, k)
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        if attention_mask is PREFIX:
            attend = prefix_attention
        o, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            position_ids=position_ids,
            **kwargs,
        )
        o = o.flatten(-2)
        if self.config.attention_output_gate:
            o = o * self.product("g_proj", x, shared).sigmoid()
        return self.product("o_proj", o, shared), weights

    def product(self, name: str, x: Tensor, shared: Product | None) -> Tensor:
        """x times the weights of that name, and those of a shared block where this layer is one of its sites."""
        y = getattr(self, name)(x)
        return y if shared is None else shared(name, x) + y


class SlidingAttention(Attention):
    """Attention to the last `sliding_window` tokens."""

    layer_type = "sliding_attention"

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.sliding_window = config.sliding_window


def eager_attention(
    module: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Attention that shows its weights. q, k, v: [B, H, T, D]; mask is added to the scores."""
    k, v = (y.repeat_interleave(module.num_key_value_groups, dim=1) for y in (k, v))
    scores = scaling * q @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return (weights @ v).transpose(1, 2), weights


def prefix_attention(
    module: Attention, q: Tensor, k: Tensor, v: Tensor, mask: str, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """SDPA of the last T of S tokens, each of which sees itself and all before it, without a mask of T x S.

    q: [B, H, T, D]; k, v: [B, H / groups, S, D]. FlashAttention aligns its causal mask at the last token and knows groups;
    PyTorch's public function, whose causal masks begin at the first token, offers it for T = S alone.
    """
    if has_flash_attention(q, k, v):
        o = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, is_causal=True, scale=scaling)[0]
    else:
        o = attention_by_slices(q, k, v, module.num_key_value_groups, scaling)
    return o.transpose(1, 2), None


def has_flash_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether PyTorch's FlashAttention takes these. ROCm's has no mask that ends at the last token; a graph cannot ask."""
    if not torch.version.cuda or torch.compiler.is_compiling() or q.shape[-1] % 8:
        return False
    return can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, True))


def attention_by_slices(q: Tensor, k: Tensor, v: Tensor, groups: int, scaling: float) -> Tensor:
    """The same with the rows of a mask for one slice of the queries at a time, [B, H, T, D]."""
    B, T, S = len(q), q.shape[2], k.shape[2]
    if q.device.type == "cpu":  # its kernel reads one head for a whole group, by a stride of 0
        q = q.unflatten(1, (-1, groups)).flatten(0, 1)
        k, v = (y.flatten(0, 1)[:, None].expand(-1, groups, -1, -1) for y in (k, v))
    else:  # kernels of GPUs that take a mask know no groups, and are reported to misread such strides (pytorch issue 191937)
        k, v = (y.repeat_interleave(groups, dim=1) for y in (k, v))
    o, end = [], S - T
    for part in q.split(max(PAIRS // S, 1), 2):
        rows = part.shape[2]
        end += rows
        mask = q.new_full((rows, end), -torch.inf).triu_(end - rows + 1)
        o.append(F.scaled_dot_product_attention(part, k[:, :, :end], v[:, :, :end], mask, scale=scaling))
    return torch.cat(o, 2).reshape(B, -1, T, v.shape[-1])
