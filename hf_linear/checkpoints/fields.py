"""The fields of a foreign config in our words and back, by tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

# Ours that change no logits, or that a foreign config does not say: how long texts are, what tokens mean, how models train.
UNSAID = {
    "bos_token_id",
    "eos_token_id",
    "expand_k",  # key_dim and value_dim, which follow, are compared
    "expand_v",
    "fuse_linear_cross_entropy",
    "hidden_ratio",  # intermediate_size follows
    "initializer_range",
    "max_position_embeddings",
    "output_router_logits",
    "pad_token_id",
    "router_aux_loss_coef",
    "use_cache",
}
# What Transformers itself has a word for, in every config.json of its models.
KEPT = ("bos_token_id", "pad_token_id", "eos_token_id", "tie_word_embeddings", "use_cache")
# Fields of ours that few models set, with the values that mean nothing: a layout without words for one refuses all others.
PLAIN = {
    "attention_output_gate": False,
    "use_qk_norm": False,
    "attention_multiplier": None,
    "embedding_multiplier": 1,
    "use_embedding_norm": False,
    "residual_multiplier": 1,
    "logits_scaling": 1,
}
# Remedies: of a model of theirs that we do not compute, and of one of ours that theirs cannot say.
NOT_HERE = "this variant is not here"
NO_WORD = "it has no word for this, save the model as ours, by save_pretrained"


def check_one_of(name: str, of: str, value: Any, wanted: Sequence[Any], remedy: str) -> None:
    if value not in wanted:
        options = repr(wanted[0]) if len(wanted) == 1 else f"one of {list(wanted)}"
        raise ValueError(f"{name} of {of} must be {options}, got {value!r}: {remedy}")


@dataclasses.dataclass(frozen=True)
class Fields:
    """What the config of one layout says.

    Attributes:
        of: whose fields these are, for errors.
        names: theirs and ours, where the value is the same.
        only: theirs, each with the one value that means what our models compute.
        without_effect: theirs that concern training, speed or the original's code alone.
        fixed: ours, each with the value that their code has.
    """

    of: str
    names: Mapping[str, str]
    only: Mapping[str, Any]
    without_effect: frozenset[str]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def read(self, theirs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Ours, and those of theirs that no table knows."""
        for name, value in self.only.items():
            check_one_of(name, self.of, theirs.get(name, value), [value], NOT_HERE)
        rest = {name: value for name, value in theirs.items() if name not in self.known}
        return {**self.fixed, **{ours: theirs[name] for name, ours in self.names.items() if name in theirs}}, rest

    @property
    def known(self) -> set[str]:
        return {*self.names, *self.only, *self.without_effect}

    def write(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {**self.only, **{theirs: getattr(config, ours) for theirs, ours in self.names.items()}}


def kept(config: PreTrainedConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in (*KEPT, "model_type")}


def check_said(of: str, config: PreTrainedConfig, fields: Mapping[str, Any]) -> None:
    """What was written of a config must say it, `fields` being ours for what was written."""
    again = type(config)(**fields)
    names = {field.name for field in dataclasses.fields(config)} - {f.name for f in dataclasses.fields(PreTrainedConfig)}
    names |= {"tie_word_embeddings"} | {name for name in ("key_dim", "value_dim") if hasattr(config, name)}
    for name in sorted(names - UNSAID):
        check_one_of(name, of, getattr(config, name), [getattr(again, name)], NO_WORD)
