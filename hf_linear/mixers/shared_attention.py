"""Attention and an MLP whose weights several layers share, each of these sites with low-rank adapters of its own.

The idea is Zamba's (arXiv 2405.16712), the adapters are Zamba2's (arXiv 2411.15242). What is not here: their block also reads
the token embeddings, and adds its output to the input of the Mamba layer that follows.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from hf_linear.mixers.attention import Attention, AttentionWeights, Product
from hf_linear.modules.mlp import GatedMLP


class SharedBlock(nn.Module):
    """The shared weights. They belong to the model, and to no layer: the layers are handed `product`."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.mixer = AttentionWeights(config)
        self.mlp = GatedMLP(config)

    def product(self, name: str, x: Tensor) -> Tensor:
        part = self.mixer if hasattr(self.mixer, name) else self.mlp
        return getattr(part, name)(x)


class SharedAttention(Attention):
    """Attention with the weights W + B A: W of the shared block, the adapter B A of this site. State: keys and values."""

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__(config, layer_idx, partial(low_rank, config.adapter_rank))


class SharedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) with the weights W + B A: W of the shared block, the adapter B A of this site."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        wide, rank = config.intermediate_size, config.adapter_rank
        self.gate_proj = low_rank(rank, config.hidden_size, wide)
        self.up_proj = low_rank(rank, config.hidden_size, wide)
        self.down_proj = low_rank(rank, wide, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor, shared: Product) -> Tensor:
        gate, up = (shared(name, x) + getattr(self, name)(x) for name in ("gate_proj", "up_proj"))
        x = self.act(gate) * up
        return shared("down_proj", x) + self.down_proj(x)


def low_rank(rank: int, width_in: int, width_out: int, bias: bool = False) -> nn.Module:
    """B A: a bias, where there is one, is the shared weights' alone."""
    return nn.Sequential(nn.Linear(width_in, rank, bias=False), nn.Linear(rank, width_out, bias=False))
