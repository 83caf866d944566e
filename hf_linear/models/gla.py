"""GLA: gated linear attention (Yang et al. 2023, arXiv 2312.06635)."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import GenerationMixin

from hf_linear.checkpoints import fla
from hf_linear.checkpoints.gla_original import OriginalGLA
from hf_linear.checkpoints.layout import Layout
from hf_linear.config import LinearConfig
from hf_linear.decoder import (
    LinearForCausalLM,
    LinearForSequenceClassification,
    LinearForTokenClassification,
    LinearModel,
    LinearPreTrainedModel,
)
from hf_linear.modules.feature_maps import FEATURE_MAPS
from hf_linear.modules.norm import HEAD_NORMS


class GLAConfig(LinearConfig):
    """GLA. The defaults are the 1.3B shape of the paper.

    Args:
        expand_k: key_dim / hidden_size.
        expand_v: value_dim / hidden_size.
        feature_map: phi of queries and keys.
        use_short_conv: convolve q, k and v over `conv_size` tokens, with SiLU.
        use_output_gate: multiply the normalised output by silu(W x).
        output_gate_bias: by silu(W x + b), as the paper's own models do.
        head_norm: "rms", or "layer" for the layer norm of the paper's own models.
        head_norm_eps: eps of the head norm, None for norm_eps.
        elementwise_affine: whether the head norm has weights.
        gate_low_rank_dim: rank of the decay's projection.
        gate_logit_normalizer: the decay is sigmoid(.) ** (1 / gate_logit_normalizer).
        clamp_min: least log-decay a token, None for no limit.
    """

    model_type = "gla"
    mixer = "gla"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "340M": {"hidden_size": 1024, "num_hidden_layers": 24, "num_heads": 4},
        "1.3B": {"hidden_size": 2048, "num_hidden_layers": 24, "num_heads": 4},
    }
    layouts: ClassVar[tuple[Layout, ...]] = (OriginalGLA(), *fla.LAYOUTS)
    foreign: ClassVar[dict[str, Any]] = {**LinearConfig.foreign, "use_gk": True, "use_gv": False}

    expand_k: float | int = 0.5
    expand_v: float | int = 1.0
    feature_map: str = "identity"
    use_short_conv: bool = False
    conv_size: int = 4
    use_output_gate: bool = True
    output_gate_bias: bool = False
    head_norm: str = "rms"
    head_norm_eps: float | None = None
    elementwise_affine: bool = True
    gate_low_rank_dim: int = 16
    gate_logit_normalizer: float | int = 16
    clamp_min: float | None = None

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        if self.feature_map is None:  # flash-linear-attention's word for it
            self.feature_map = "identity"
        if self.head_norm_eps is None:
            self.head_norm_eps = self.norm_eps
        self.check_choice("feature_map", FEATURE_MAPS)
        self.check_choice("head_norm", HEAD_NORMS)
        self.check_divides("num_heads", self.num_heads, "hidden_size * expand_k", self.key_dim)
        self.check_divides("num_heads", self.num_heads, "hidden_size * expand_v", self.value_dim)
        self.check_least(conv_size=1, gate_low_rank_dim=1)
        if self.gate_logit_normalizer <= 0:
            raise ValueError(
                f"gate_logit_normalizer must be above 0, got {self.gate_logit_normalizer}: leave it out for the published 16"
            )
        if self.clamp_min is not None and self.clamp_min > 0:
            raise ValueError(f"clamp_min must be a log-decay <= 0 or None, got {self.clamp_min}: leave it out for no bound")

    @property
    def key_dim(self) -> int:
        return int(self.hidden_size * self.expand_k)

    @property
    def value_dim(self) -> int:
        return int(self.hidden_size * self.expand_v)


class GLAPreTrainedModel(LinearPreTrainedModel):
    config_class = GLAConfig


class GLAModel(GLAPreTrainedModel, LinearModel):
    """Hidden states of the last layer."""


class GLAForCausalLM(GLAPreTrainedModel, LinearForCausalLM, GenerationMixin):
    """The decoder with a language-model head."""

    model_class = GLAModel


class GLAForSequenceClassification(LinearForSequenceClassification, GLAPreTrainedModel):
    """A score for each row, read at its last real token."""


class GLAForTokenClassification(LinearForTokenClassification, GLAPreTrainedModel):
    """A score for each token."""
