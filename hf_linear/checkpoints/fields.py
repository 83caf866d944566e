"""The fields of a foreign config in our words and back, by tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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
    fixed: Mapping[str, Any]

    def read(self, theirs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Ours, and those of theirs that no table knows."""
        for name, value in self.only.items():
            if theirs.get(name, value) != value:
                raise ValueError(f"{name} of {self.of} must be {value!r}, got {theirs[name]!r}: this variant is not here")
        rest = {name: value for name, value in theirs.items() if name not in self.known}
        return {**self.fixed, **{ours: theirs[name] for name, ours in self.names.items() if name in theirs}}, rest

    @property
    def known(self) -> set[str]:
        return {*self.names, *self.only, *self.without_effect}

    def write(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {**self.only, **{theirs: getattr(config, ours) for theirs, ours in self.names.items()}}


def check_said(of: str, config: PreTrainedConfig, again: PreTrainedConfig) -> None:
    """What was written of a config must say it, `again` being that in our fields."""
    names = {field.name for field in dataclasses.fields(config)} - {f.name for f in dataclasses.fields(PreTrainedConfig)}
    for name in [*sorted(names - UNSAID), "key_dim", "value_dim", "tie_word_embeddings"]:
        if getattr(config, name) != getattr(again, name):
            raise ValueError(
                f"{name} of {of} must be {getattr(again, name)!r}, got {getattr(config, name)!r}: it has no word for this, "
                "save the model as ours, by save_pretrained"
            )
