"""Token mixers by the names that configs use. A mixer maps x [B, T, hidden] to (y [B, T, hidden], attention weights or None).

What a mixer is given besides x:
    attention_mask   the mask of its layer type: [B, T] with 0 on padding for recurrent mixers, Transformers' own for attention
    position_ids     [B or 1, T], counted inside each document
    cu_seqlens       [N + 1] boundaries of packed documents, or None
    past_key_values  the cache, or None
    shared           what multiplies by the weights of the shared block, for the layers that share one
"""

from hf_linear.mixers.attention import Attention, SlidingAttention
from hf_linear.mixers.base import RecurrentMixer
from hf_linear.mixers.gla import GatedLinearAttention
from hf_linear.mixers.hyena import Hyena
from hf_linear.mixers.linear_attention import LinearAttention
from hf_linear.mixers.mamba import Mamba
from hf_linear.mixers.mamba2 import Mamba2
from hf_linear.mixers.retention import Retention
from hf_linear.mixers.shared_attention import SharedAttention

MIXERS: dict[str, type[Attention] | type[RecurrentMixer]] = {
    "attention": Attention,
    "sliding_attention": SlidingAttention,
    "shared_attention": SharedAttention,
    "linear_attention": LinearAttention,
    "retention": Retention,
    "gla": GatedLinearAttention,
    "hyena": Hyena,
    "mamba": Mamba,
    "mamba2": Mamba2,
}

__all__ = ["MIXERS"]
