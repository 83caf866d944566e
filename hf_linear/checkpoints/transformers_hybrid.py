"""What the hybrids of Transformers have in common, read and written: fields, and layers whose keys name their kind."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.core_model_loading import WeightTransform

from hf_linear.checkpoints.fields import KEPT, NO_WORD, NOT_HERE, PLAIN, check_one_of
from hf_linear.checkpoints.layout import Layout, renamings

SAME = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "initializer_range"),
    *KEPT,
)
FIELDS = {"num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads", "rms_norm_eps": "norm_eps"}
# Labels and the like, which every config may have: they say nothing about layers.
OF_ANY_MODEL = {field.name for field in dataclasses.fields(PreTrainedConfig)}
OF_ANY_MODEL -= {"architectures", "dtype", "transformers_version"}
MAMBA2_FIELDS = {
    "mamba_n_heads": "num_heads",
    "mamba_n_groups": "n_groups",
    "mamba_d_state": "state_size",
    "mamba_d_conv": "conv_kernel",
    "mamba_expand": "expand",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_proj_bias": "use_bias",
    "time_step_limit": "time_step_limit",
}
# Norms of several groups are one norm in the oldest Transformers we support, and several in the newest.
MAMBA2_ONLY = {"hidden_act": "silu", "attention_bias": False, "mamba_n_groups": 1}


class TransformersHybrid(Layout):
    """A hybrid that Transformers has too: its own config class reads the fields, and has the defaults of those left out.

    Attributes:
        config_class: that class.
        architecture: the language model's class, which a config.json names.
        mixer: ours of the recurrent layers.
        same: fields of the same name and meaning.
        mixer_fields: theirs of the recurrent layers, and ours.
        only: theirs, with the one value that means what our models compute.
        expected: ours, with the one value that their models have.
        names: parts of keys, theirs and ours.
    """

    config_class: type[PreTrainedConfig]
    architecture: str
    mixer: str
    same: tuple[str, ...] = SAME
    mixer_fields: Mapping[str, str]
    only: Mapping[str, Any]
    expected: Mapping[str, Any] = {**PLAIN, "hidden_act": "silu", "attention_bias": False}
    names: Mapping[str, str]

    def has_config(self, fields: Mapping[str, Any]) -> bool:
        return fields.get("model_type") == self.config_class.model_type

    def read_config(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        theirs = self.config_class(**fields)
        for name, only in self.only.items():
            check_one_of(name, f"a {self.name}", getattr(theirs, name, only), [only], NOT_HERE)
        mixers = [self.mixer if kind in ("mamba", "linear_attention") else "attention" for kind in theirs.layers_block_type]
        options = {ours: getattr(theirs, name) for name, ours in self.mixer_fields.items()}
        return {
            "model_type": "linear_hybrid",
            **{name: getattr(theirs, name) for name in OF_ANY_MODEL & fields.keys()},
            "dtype": theirs.dtype,
            **{name: getattr(theirs, name) for name in self.same},
            **{ours: getattr(theirs, name) for name, ours in FIELDS.items()},
            "head_dim": getattr(theirs, "head_dim", None),
            "mixers": mixers,
            "mixer_options": {self.mixer: options} if self.mixer in mixers else None,
            **self.read_rest(theirs),
        }

    def read_rest(self, theirs: PreTrainedConfig) -> dict[str, Any]:
        """Our fields beyond those in the tables."""
        raise NotImplementedError

    def write_config(self, config: PreTrainedConfig) -> dict[str, Any]:
        rest = self.write_rest(config)
        self.refuse_unless(sorted(set(config.mixers) | {self.mixer, "attention"}), sorted([self.mixer, "attention"]), "mixers")
        for name, wanted in {**self.expected, "head_dim": config.hidden_size // config.num_heads}.items():
            self.refuse_unless(getattr(config, name), wanted, name)
        mixer = config.for_mixer(self.mixer)
        if self.mixer in config.mixers:
            self.refuse_unless(mixer.norm_eps, config.norm_eps, f"norm_eps of {self.mixer}")
        theirs = self.config_class(
            **{name: getattr(config, name) for name in self.same},
            **{name: getattr(config, ours) for name, ours in FIELDS.items()},
            **{name: getattr(mixer, ours) for name, ours in self.mixer_fields.items()},
            **rest,
            dtype=config.dtype,
            architectures=[self.architecture],
        )
        for name, only in self.only.items():
            self.refuse_unless(getattr(theirs, name, only), only, name)
        return json.loads(theirs.to_json_string())

    def write_rest(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Their fields beyond those in the tables; what theirs cannot say is an error."""
        raise NotImplementedError

    def refuse_unless(self, value: Any, wanted: Any, name: str) -> None:
        check_one_of(name, f"a {self.name}", value, [wanted], NO_WORD)

    def transforms(self, config: PreTrainedConfig) -> list[WeightTransform]:
        kinds = {self.mixer: "mamba", "attention": "self_attn"}
        mixers = {f"layers.{i}.{kinds.get(mixer)}.": f"layers.{i}.mixer." for i, mixer in enumerate(config.mixers)}
        return renamings({**self.names, **mixers})
