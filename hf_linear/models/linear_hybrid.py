"""Hybrids: any mixer in any layer, softmax attention among them (Jamba, arXiv 2403.19887, for the idea)."""

from __future__ import annotations

import dataclasses

from transformers import GenerationMixin

from hf_linear.decoder import (
    LinearConfig,
    LinearForCausalLM,
    LinearForSequenceClassification,
    LinearForTokenClassification,
    LinearModel,
    LinearPreTrainedModel,
)
from hf_linear.models.gla import GLAConfig
from hf_linear.models.hyena import HyenaConfig
from hf_linear.models.linear_attention import LinearAttentionConfig
from hf_linear.models.mamba import Mamba2LayerConfig, MambaLayerConfig
from hf_linear.models.retnet import RetNetConfig

LETTERS = {
    "G": "gla",
    "R": "retention",
    "L": "linear_attention",
    "H": "hyena",
    "M": "mamba",
    "N": "mamba2",
    "A": "attention",
    "S": "sliding_attention",
}
MIXER_CONFIGS: dict[str, type[LinearConfig]] = {
    "gla": GLAConfig,
    "retention": RetNetConfig,
    "linear_attention": LinearAttentionConfig,
    "hyena": HyenaConfig,
    "mamba": MambaLayerConfig,
    "mamba2": Mamba2LayerConfig,
}
SHARED = (
    "hidden_size",
    "num_heads",
    "num_kv_heads",
    "max_position_embeddings",
    "norm_eps",
    "initializer_range",
)
# What a mixer may have its own value of, besides the fields that only its config has.
OWN = {"num_heads", "num_kv_heads", "max_position_embeddings", "norm_eps"}


class LinearHybridConfig(LinearConfig):
    """A hybrid, its layers given by `pattern` or by `mixers`.

    Args:
        pattern: one letter a layer, repeated over the depth: G gla, R retention, L linear_attention, H hyena, M mamba,
            N mamba2, A attention, S sliding_attention. "GGGA" is three GLA layers to one of attention.
        mixer_options: fields of the mixers' own configs that differ from their defaults, by mixer:
            {"gla": {"expand_k": 1.0}, "hyena": {"hyena_order": 3}}.
    """

    model_type = "linear_hybrid"
    mixer = "gla"

    num_heads: int = 16
    pattern: str | None = None
    mixer_options: dict[str, dict] | None = None

    def __post_init__(self, **kwargs) -> None:
        if self.pattern is not None:
            mixers = spell_out(self.pattern, self.num_hidden_layers)
            if self.mixers not in (None, mixers):
                raise ValueError(f"pattern {self.pattern!r} means mixers {mixers}, got {self.mixers}: leave one out")
            self.mixers = mixers
        elif self.mixers is None and self.layer_types is None:
            self.mixers = spell_out("GGGA", self.num_hidden_layers)
        self.mixer_options = self.mixer_options or {}
        super().__post_init__(**kwargs)
        for name, options in self.mixer_options.items():
            self.check_options(name, options)
        for name in set(self.mixers):
            self.for_mixer(name)  # its own checks, now rather than when the model is built

    @classmethod
    def known_mixers(cls) -> list[str]:
        return list(LETTERS.values())

    def check_options(self, name: str, options: dict) -> None:
        configurable = sorted(set(self.mixers or []) & set(MIXER_CONFIGS))
        if name not in configurable:
            raise ValueError(f"mixer_options must be for the mixers of this model, {configurable}, got {name!r}: leave it out")
        of_mixer, of_all = ({field.name for field in dataclasses.fields(c)} for c in (MIXER_CONFIGS[name], LinearConfig))
        fields = sorted(of_mixer - of_all | OWN)
        unknown = sorted(set(options) - set(fields)) if isinstance(options, dict) else options
        if unknown or not isinstance(options, dict):
            raise ValueError(
                f"mixer_options[{name!r}] must be a dict of {fields}, got {unknown}: "
                "what all layers share is a field of the hybrid"
            )

    def for_mixer(self, name: str) -> LinearConfig:
        """The mixer's own config: this one's shape with the mixer's options. Attention reads this config itself."""
        if name not in MIXER_CONFIGS:
            return self
        shared = {field: getattr(self, field) for field in SHARED}
        options = (self.mixer_options or {}).get(name, {})
        return MIXER_CONFIGS[name](**{**shared, "num_hidden_layers": 1, **options})


class LinearHybridPreTrainedModel(LinearPreTrainedModel):
    config_class = LinearHybridConfig


class LinearHybridModel(LinearHybridPreTrainedModel, LinearModel):
    """Hidden states of the last layer."""


class LinearHybridForCausalLM(LinearHybridPreTrainedModel, LinearForCausalLM, GenerationMixin):
    """The decoder with a language-model head."""

    model_class = LinearHybridModel


class LinearHybridForSequenceClassification(LinearForSequenceClassification, LinearHybridPreTrainedModel):
    """A score for each row, read at its last real token."""


class LinearHybridForTokenClassification(LinearForTokenClassification, LinearHybridPreTrainedModel):
    """A score for each token."""


def spell_out(pattern: str, depth: int) -> list[str]:
    """The mixers of `depth` layers from a pattern of letters."""
    unknown = sorted(set(pattern) - set(LETTERS))
    if unknown or not pattern:
        raise ValueError(f"pattern must be made of the letters {LETTERS}, got {pattern!r}: or name the layers in `mixers`")
    if depth % len(pattern):
        raise ValueError(
            f"pattern must fit num_hidden_layers = {depth} a whole number of times, got {pattern!r} of {len(pattern)} layers: "
            "write out a letter for every layer, or change the depth"
        )
    return [LETTERS[letter] for letter in pattern * (depth // len(pattern))]
