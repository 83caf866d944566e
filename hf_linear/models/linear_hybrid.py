"""Hybrids: any mixer in any layer, softmax attention among them (Jamba, arXiv 2403.19887, for the idea)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from transformers import GenerationMixin

from hf_linear.checkpoints import fla
from hf_linear.checkpoints.bamba import Bamba
from hf_linear.checkpoints.granite import GraniteHybrid
from hf_linear.checkpoints.jamba import Jamba
from hf_linear.checkpoints.layout import Layout, layout_of_config
from hf_linear.checkpoints.refused import check_model_type
from hf_linear.config import LinearConfig
from hf_linear.decoder import (
    LinearForCausalLM,
    LinearForSequenceClassification,
    LinearForTokenClassification,
    LinearModel,
    LinearPreTrainedModel,
)
from hf_linear.models.gla import GLAConfig
from hf_linear.models.hybrid_presets import PRESETS
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
    "Z": "shared_attention",
}
MLP_LETTERS = {"D": "dense", "S": "sparse", "-": "none"}
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
            N mamba2, A attention, S sliding_attention, Z shared_attention. "GGGA" is three GLA layers to one of attention.
        mlp_pattern: the same for `mlp_layer_types`: D dense, S sparse, - none. "DS" makes every second layer sparse.
        adapter_rank: rank of what the layers called shared_attention have of their own, in each product of their attention
            and MLP; all else of these is one block.
        mixer_options: fields of the mixers' own configs that differ from their defaults, by mixer:
            {"gla": {"expand_k": 1.0}, "hyena": {"hyena_order": 3}}.
    """

    model_type = "linear_hybrid"
    mixer = "gla"
    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS
    layouts: ClassVar[tuple[Layout, ...]] = (*fla.LAYOUTS, Jamba(), Bamba(), GraniteHybrid())

    num_heads: int = 16
    pattern: str | None = None
    mlp_pattern: str | None = None
    adapter_rank: int = 128
    mixer_options: dict[str, dict] | None = None

    def __post_init__(self, **kwargs) -> None:
        if self.pattern is None and self.mixers is None and self.layer_types is None:
            self.mixers = spell_out("GGGA", self.num_hidden_layers, "pattern", LETTERS)
        self.follow("pattern", LETTERS, "mixers")
        self.follow("mlp_pattern", MLP_LETTERS, "mlp_layer_types")
        self.mixer_options = self.mixer_options or {}
        super().__post_init__(**kwargs)
        self.check_least(adapter_rank=1)
        self.check_shared()
        for name, options in self.mixer_options.items():
            self.check_options(name, options)
        for name in set(self.mixers):
            self.for_mixer(name)  # its own checks, now rather than when the model is built

    @classmethod
    def known_mixers(cls) -> list[str]:
        return list(LETTERS.values())

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> LinearConfig:
        """The plan of a published hybrid, by name; any field can be another, its layers too, as a pattern or as a list.

        A depth that the pattern does not divide is an error. Options of mixers that other layers leave out are left out with
        them: `from_preset("jamba", pattern="GGGGAGGG")` is Jamba with GLA in the place of Mamba.
        """
        for listed, pattern in (("mixers", "pattern"), ("mlp_layer_types", "mlp_pattern")):
            if overrides.get(listed) is not None:
                overrides.setdefault(pattern, None)
        mixers = overrides.get("mixers") or [LETTERS.get(letter) for letter in overrides.get("pattern") or ""]
        if mixers and "mixer_options" not in overrides:
            options = cls.presets.get(name, {}).get("mixer_options", {})
            overrides["mixer_options"] = {mixer: o for mixer, o in options.items() if mixer in mixers}
        return super().from_preset(name, **overrides)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> LinearConfig:
        if layout_of_config(cls.layouts, config_dict) is None:
            check_model_type(config_dict, cls.model_type)
        return super().from_dict(config_dict, **kwargs)

    def follow(self, field: str, letters: dict[str, str], listed: str) -> None:
        """Fill the list of a name for each layer from a pattern, where there is one."""
        pattern, given = getattr(self, field), getattr(self, listed)
        if pattern is None:
            return
        names = spell_out(pattern, self.num_hidden_layers, field, letters)
        if given not in (None, names):
            raise ValueError(f"{field} {pattern!r} means {listed} {names}, got {given}: leave one out")
        setattr(self, listed, names)

    def check_shared(self) -> None:
        kinds = {mlp for mixer, mlp in zip(self.mixers, self.mlp_layer_types, strict=True) if mixer == "shared_attention"}
        if kinds - {"dense"}:
            raise ValueError(
                f"mlp_layer_types must be 'dense' for shared_attention layers, which share their MLP too, got {sorted(kinds)}: "
                "take attention layers, or dense MLPs"
            )

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


def spell_out(pattern: str, depth: int, field: str, letters: dict[str, str]) -> list[str]:
    """The names of `depth` layers from a pattern of letters."""
    unknown = sorted(set(pattern) - set(letters))
    if unknown or not pattern:
        raise ValueError(f"{field} must be made of the letters {letters}, got {pattern!r}: or name the layers one by one")
    if depth % len(pattern):
        raise ValueError(
            f"{field} must fit num_hidden_layers = {depth} a whole number of times, got {pattern!r} of {len(pattern)} layers: "
            "write out a letter for every layer, or change the depth"
        )
    return [letters[letter] for letter in pattern * (depth // len(pattern))]
