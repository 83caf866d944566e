"""Hyena (Poli et al. 2023, arXiv 2302.10866) and HyenaDNA (Nguyen et al. 2023, arXiv 2306.15794)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from transformers import GenerationMixin

from hf_linear.checkpoints import hyenadna
from hf_linear.checkpoints.layout import Layout
from hf_linear.config import LinearConfig
from hf_linear.decoder import (
    LinearForCausalLM,
    LinearForSequenceClassification,
    LinearForTokenClassification,
    LinearModel,
    LinearPreTrainedModel,
)
from hf_linear.modules.mlp import MLP


class HyenaConfig(LinearConfig):
    """Hyena. The defaults are the 153M model of safari; HyenaDNA has other widths, filter_emb_dim 5 and filter_shift 0.05.

    Args:
        max_position_embeddings: length of the filters, and so of the longest sequence. Positions are fractions of it: another
            length is another filter.
        hyena_order: N; a layer has N - 1 long convolutions between N gates.
        short_filter_order: taps of the short convolution after the input projection.
        filter_order: width of the MLP that computes the filters.
        filter_emb_dim: features of a position, odd: 1 + 2 a band.
        num_inner_mlps: hidden layers of the MLP beyond the first.
        activation_freq: initial w of sin(w x).
        train_freq: whether w is trained.
        train_filter_positions: whether the positions' features are trained (safari trains them, HyenaDNA does not).
        filter_modulate: multiply filters by exp(-t |delta|) + shift.
        filter_shift: the shift: 0 in safari, 0.05 in HyenaDNA's published models.
        filter_normalize: divide the filters of a position by their l1 norm over channels.
    """

    model_type = "hyena"
    mixer = "hyena"
    layouts: ClassVar[tuple[Layout, ...]] = hyenadna.LAYOUTS

    vocab_size: int = 50264
    hidden_size: int = 864
    num_hidden_layers: int = 18
    num_heads: int = 1
    intermediate_size: int | None = 1728
    hidden_act: str = "gelu_pytorch_tanh"
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    hyena_order: int = 2
    short_filter_order: int = 3
    filter_order: int = 64
    filter_emb_dim: int = 33
    num_inner_mlps: int = 2
    activation_freq: float | int = 14
    train_freq: bool = True
    train_filter_positions: bool = True
    filter_modulate: bool = True
    filter_shift: float | int = 0.0
    filter_normalize: bool = False

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        self.check_least(short_filter_order=1, filter_order=1, num_inner_mlps=0)
        if self.hyena_order < 2:
            raise ValueError(f"hyena_order must be 2 or more, got {self.hyena_order}: take 2 for one long convolution")
        if self.filter_emb_dim < 3 or self.filter_emb_dim % 2 == 0:
            nearest = max(3, self.filter_emb_dim | 1)
            raise ValueError(
                f"filter_emb_dim must be odd and 3 or more, 1 + 2 a band, got {self.filter_emb_dim}: take {nearest}"
            )


class HyenaDNAConfig(HyenaConfig):
    """What the Auto classes find for the -hf repositories of HyenaDNA: reading one gives a HyenaConfig."""

    model_type = hyenadna.HyenaDNA.model_type

    def __post_init__(self, **kwargs: Any) -> None:
        raise ValueError(
            f"{self.model_type} is a layout of checkpoints, to be read by from_pretrained, got a new config of it: "
            "take HyenaConfig, with filter_emb_dim=5 and filter_shift=0.05 for HyenaDNA's filters"
        )


class HyenaPreTrainedModel(LinearPreTrainedModel):
    config_class = HyenaConfig
    norm_class = nn.LayerNorm
    mlp_class = MLP
    _can_compile_fullgraph = False  # its state grows


class HyenaModel(HyenaPreTrainedModel, LinearModel):
    """Hidden states of the last layer."""


class HyenaForCausalLM(HyenaPreTrainedModel, LinearForCausalLM, GenerationMixin):
    """The decoder with a language-model head."""

    model_class = HyenaModel


class HyenaForSequenceClassification(LinearForSequenceClassification, HyenaPreTrainedModel):
    """A score for each row, read at its last real token."""


class HyenaForTokenClassification(LinearForTokenClassification, HyenaPreTrainedModel):
    """A score for each token."""
