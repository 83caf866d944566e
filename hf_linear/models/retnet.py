"""RetNet: multi-scale retention (Sun et al. 2023, arXiv 2307.08621)."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import GenerationMixin

from hf_linear.checkpoints import fla
from hf_linear.checkpoints.layout import Layout
from hf_linear.checkpoints.torchscale import Syncdoth, Torchscale
from hf_linear.config import LinearConfig
from hf_linear.decoder import (
    LinearForCausalLM,
    LinearForSequenceClassification,
    LinearForTokenClassification,
    LinearModel,
    LinearPreTrainedModel,
)
from hf_linear.modules.feature_maps import FEATURE_MAPS
from hf_linear.modules.rotary import FREQUENCIES, STYLES


class RetNetConfig(LinearConfig):
    """RetNet. The defaults are the 1.3B shape as flash-linear-attention trains it.

    torchscale's variant: expand_v = value_dim / hidden_size, rope_style "interleaved", rope_frequencies "linspace",
    elementwise_affine False, retention_norm "decay".

    Args:
        expand_k: key_dim / hidden_size.
        expand_v: value_dim / hidden_size.
        feature_map: phi of queries and keys, before they turn.
        use_output_gate: multiply the normalised output by silu(W x).
        elementwise_affine: whether the head norm has weights.
        retention_norm: "none", or "decay" for o_t / sqrt(sum of gamma^i over the tokens so far).
        rope_style: "half" pairs channel i with i + K / 2, "interleaved" pairs 2 i with 2 i + 1.
        rope_frequencies: "standard" theta ** (-2 i / K), or "linspace" theta ** (-i / (K / 2 - 1)).
    """

    model_type = "retnet"
    mixer = "retention"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "340M": {"hidden_size": 1024, "num_hidden_layers": 24, "num_heads": 4},
        "1.3B": {"hidden_size": 2048, "num_hidden_layers": 24, "num_heads": 8},
    }
    layouts: ClassVar[tuple[Layout, ...]] = (Torchscale(), Syncdoth(), *fla.LAYOUTS)
    foreign: ClassVar[dict[str, Any]] = {**LinearConfig.foreign, "use_short_conv": False}

    num_heads: int = 8
    hidden_ratio: float | int = 2
    expand_k: float | int = 1.0
    expand_v: float | int = 2.0
    feature_map: str = "identity"
    use_output_gate: bool = True
    elementwise_affine: bool = True
    retention_norm: str = "none"
    rope_style: str = "half"
    rope_frequencies: str = "standard"

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        if self.feature_map is None:  # flash-linear-attention's word for it
            self.feature_map = "identity"
        self.check_choice("feature_map", FEATURE_MAPS)
        self.check_choice("retention_norm", ("none", "decay"))
        self.check_choice("rope_style", STYLES)
        self.check_choice("rope_frequencies", FREQUENCIES)
        self.check_divides("2 * num_heads", 2 * self.num_heads, "hidden_size * expand_k", self.key_dim)
        self.check_divides("num_heads", self.num_heads, "hidden_size * expand_v", self.value_dim)

    @property
    def key_dim(self) -> int:
        return int(self.hidden_size * self.expand_k)

    @property
    def value_dim(self) -> int:
        return int(self.hidden_size * self.expand_v)


class RetNetPreTrainedModel(LinearPreTrainedModel):
    config_class = RetNetConfig


class RetNetModel(RetNetPreTrainedModel, LinearModel):
    """Hidden states of the last layer."""


class RetNetForCausalLM(RetNetPreTrainedModel, LinearForCausalLM, GenerationMixin):
    """The decoder with a language-model head."""

    model_class = RetNetModel


class RetNetForSequenceClassification(LinearForSequenceClassification, RetNetPreTrainedModel):
    """A score for each row, read at its last real token."""


class RetNetForTokenClassification(LinearForTokenClassification, RetNetPreTrainedModel):
    """A score for each token."""
