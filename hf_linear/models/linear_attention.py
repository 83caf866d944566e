"""Linear attention in the kernel view (Katharopoulos et al. 2020, arXiv 2006.16236)."""

from __future__ import annotations

from transformers import GenerationMixin

from hf_linear.config import LinearConfig
from hf_linear.decoder import (
    LinearForCausalLM,
    LinearForSequenceClassification,
    LinearForTokenClassification,
    LinearModel,
    LinearPreTrainedModel,
)
from hf_linear.modules.feature_maps import FEATURE_MAPS


class LinearAttentionConfig(LinearConfig):
    """Linear attention.

    Args:
        expand_k: key_dim / hidden_size.
        expand_v: value_dim / hidden_size.
        feature_map: phi of queries and keys: "elu" (elu + 1), "relu", "softmax", or "identity", which has no normaliser.
    """

    model_type = "linear_attention"
    mixer = "linear_attention"

    num_heads: int = 16
    expand_k: float | int = 1.0
    expand_v: float | int = 1.0
    feature_map: str = "elu"

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        self.check_choice("feature_map", FEATURE_MAPS)
        self.check_divides("num_heads", self.num_heads, "hidden_size * expand_k", self.key_dim)
        self.check_divides("num_heads", self.num_heads, "hidden_size * expand_v", self.value_dim)

    @property
    def key_dim(self) -> int:
        return int(self.hidden_size * self.expand_k)

    @property
    def value_dim(self) -> int:
        return int(self.hidden_size * self.expand_v)


class LinearAttentionPreTrainedModel(LinearPreTrainedModel):
    config_class = LinearAttentionConfig


class LinearAttentionModel(LinearAttentionPreTrainedModel, LinearModel):
    """Hidden states of the last layer."""


class LinearAttentionForCausalLM(LinearAttentionPreTrainedModel, LinearForCausalLM, GenerationMixin):
    """The decoder with a language-model head."""

    model_class = LinearAttentionModel


class LinearAttentionForSequenceClassification(LinearForSequenceClassification, LinearAttentionPreTrainedModel):
    """A score for each row, read at its last real token."""


class LinearAttentionForTokenClassification(LinearForTokenClassification, LinearAttentionPreTrainedModel):
    """A score for each token."""
