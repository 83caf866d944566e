"""Bamba as Transformers writes it: Mamba-2 and attention of which half of the channels turn, an MLP behind each."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from transformers import BambaConfig, PreTrainedConfig

from hf_linear.checkpoints.transformers_hybrid import MAMBA2_FIELDS, MAMBA2_ONLY, SAME, TransformersHybrid


class Bamba(TransformersHybrid):
    name = "bamba"
    title = "Bamba's (model.layers.0.pre_ff_layernorm...)"
    config_class = BambaConfig
    architecture = "BambaForCausalLM"
    mixer = "mamba2"
    same = (*SAME, "intermediate_size", "rope_parameters")
    mixer_fields: Mapping[str, str] = MAMBA2_FIELDS
    only: Mapping[str, Any] = {**MAMBA2_ONLY, "mlp_bias": False}
    names: Mapping[str, str] = {
        "final_layernorm.": r"(?<!mamba.)(?<!\w)norm.",
        ".input_layernorm.": ".mixer_norm.",
        ".pre_ff_layernorm.": ".mlp_norm.",
        ".feed_forward.": ".mlp.",
    }

    def read_rest(self, theirs: PreTrainedConfig) -> dict[str, Any]:
        return {"mlp_layer_types": ["dense"] * theirs.num_hidden_layers}

    def write_rest(self, config: PreTrainedConfig) -> dict[str, Any]:
        self.refuse_unless(config.mlp_layer_types, ["dense"] * config.num_hidden_layers, "mlp_layer_types")
        rope = config.rope_parameters or {}
        self.refuse_unless(rope.get("partial_rotary_factor"), 0.5, "partial_rotary_factor")  # fixed in their code
        return {"attn_layer_indices": [i for i, mixer in enumerate(config.mixers) if mixer == "attention"]}

    def has_weights(self, keys: Collection[str]) -> bool:
        return any(".pre_ff_layernorm." in key for key in keys) and not any(".mamba.dt_proj." in key for key in keys)
