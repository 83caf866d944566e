"""Jamba as Transformers and AI21 write it: v0.1, 1.5, Jamba2, the dense ones, and whatever has their fields and keys.

On disk every expert has keys of its own, in a Transformers 5 in memory all experts of a layer are two tensors: both are read,
the first is written. What older configs say besides is read by Transformers' own config, whose defaults hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from transformers import JambaConfig, PreTrainedConfig
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightTransform

from hf_linear.checkpoints.layout import Layout, renamings

SAME = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings", "initializer_range"),
    *("tie_word_embeddings", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id"),
    *("num_experts_per_tok", "output_router_logits", "router_aux_loss_coef"),
)
FIELDS = {"num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads", "rms_norm_eps": "norm_eps"}
MAMBA_FIELDS = {
    "mamba_d_state": "state_size",
    "mamba_d_conv": "conv_kernel",
    "mamba_expand": "expand",
    "mamba_dt_rank": "time_step_rank",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_proj_bias": "use_bias",
}
# Labels and the like, which every config may have; what is in these says nothing about layers.
OF_ANY_MODEL = {field.name for field in dataclasses.fields(PreTrainedConfig)} - {
    "architectures",
    "dtype",
    "transformers_version",
}
# The one value that means what our models compute.
ONLY: dict[str, Any] = {"hidden_act": "silu", "sliding_window": None}
# What their models have and ours may have otherwise.
EXPECTED: dict[str, Any] = {
    "hidden_act": "silu",
    "rope_parameters": None,
    "attention_bias": False,
    "attention_output_gate": False,
    "use_qk_norm": False,
}
EXPECTED_OF_EXPERTS: dict[str, Any] = {"norm_topk_prob": False, "num_shared_experts": 0}
NAMES = {
    "final_layernorm.": r"(?<!\w)norm.",
    ".input_layernorm.": ".mixer_norm.",
    ".pre_ff_layernorm.": ".mlp_norm.",
    # All but the keys of single experts, whose converters below say their whole way.
    ".feed_forward.(?!experts.[0-9])": ".mlp.",
    ".mlp.router.": ".mlp.router.proj.",
}


class Jamba(Layout):
    name = "jamba"
    title = "Jamba's (model.layers.0.pre_ff_layernorm...)"

    def has_config(self, fields: Mapping[str, Any]) -> bool:
        return fields.get("model_type") == "jamba"

    def read_config(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        known = {field for field in JambaConfig().to_dict() if field.startswith("mamba_")} | {"mamba_inner_layernorms"}
        unknown = sorted(field for field in fields if field.startswith("mamba_") and field not in known)
        if unknown:
            raise ValueError(f"mamba_* of a Jamba must be of {sorted(known)}, got {unknown}: this variant is not here")
        theirs = JambaConfig(**fields)
        for name, only in ONLY.items():
            if getattr(theirs, name, only) != only:
                raise ValueError(f"{name} of a Jamba must be {only!r}, got {getattr(theirs, name)!r}: this variant is not here")
        mamba = {ours: getattr(theirs, name) for name, ours in MAMBA_FIELDS.items()}
        mamba["inner_layernorms"] = getattr(theirs, "mamba_inner_layernorms", True)
        mixers = ["mamba" if kind == "mamba" else "attention" for kind in theirs.layers_block_type]
        mlps = ["sparse" if experts > 1 else "dense" for experts in theirs.layers_num_experts]
        return {
            "model_type": "linear_hybrid",
            **{name: getattr(theirs, name) for name in OF_ANY_MODEL & fields.keys()},
            "dtype": theirs.dtype,
            **{name: getattr(theirs, name) for name in SAME},
            **{ours: getattr(theirs, name) for name, ours in FIELDS.items()},
            "head_dim": getattr(theirs, "head_dim", None),
            "mixers": mixers,
            "mlp_layer_types": mlps,
            "num_experts": theirs.num_experts if "sparse" in mlps else 0,
            "norm_topk_prob": False,
            "mixer_options": {"mamba": mamba} if "mamba" in mixers else None,
        }

    def write_config(self, config: PreTrainedConfig) -> dict[str, Any]:
        attention_period, attention_offset = every("mixers", config.mixers, "attention", "mamba")
        expert_period, expert_offset = every("mlp_layer_types", config.mlp_layer_types, "sparse", "dense")
        sparse, mamba = "sparse" in config.mlp_layer_types, config.for_mixer("mamba")
        expected = EXPECTED | {"head_dim": config.hidden_size // config.num_heads}
        if sparse:
            expected |= EXPECTED_OF_EXPERTS | {"moe_intermediate_size": config.intermediate_size}
        for name, wanted in expected.items():
            refuse_unless(name, getattr(config, name), wanted)
        if "mamba" in config.mixers:
            refuse_unless("inner_layernorms of mamba", mamba.inner_layernorms, True)
            refuse_unless("norm_eps of mamba", mamba.norm_eps, config.norm_eps)
        theirs = JambaConfig(
            **{name: getattr(config, name) for name in SAME},
            **{name: getattr(config, ours) for name, ours in FIELDS.items()},
            **{name: getattr(mamba, ours) for name, ours in MAMBA_FIELDS.items()},
            attn_layer_period=attention_period,
            attn_layer_offset=attention_offset,
            expert_layer_period=expert_period,
            expert_layer_offset=expert_offset,
            num_experts=config.num_experts if sparse else 1,
            dtype=config.dtype,
            architectures=["JambaForCausalLM"],
        )
        return theirs.to_diff_dict()

    def has_weights(self, keys: Collection[str]) -> bool:
        return any(".pre_ff_layernorm." in key for key in keys)

    def transforms(self, config: PreTrainedConfig) -> list[WeightTransform]:
        kinds = {"mamba": "mamba", "attention": "self_attn"}
        mixers = {f"layers.{i}.{kinds[mixer]}.": f"layers.{i}.mixer." for i, mixer in enumerate(config.mixers)}
        experts = "feed_forward.experts.*."
        return [
            *renamings(NAMES | mixers),
            WeightConverter(
                [f"{experts}gate_proj.weight", f"{experts}up_proj.weight"],
                "mlp.experts.gate_up_proj",
                [MergeModulelist(dim=0), Concatenate(dim=1)],
            ),
            WeightConverter(f"{experts}down_proj.weight", "mlp.experts.down_proj", [MergeModulelist(dim=0)]),
        ]


def every(field: str, layers: list[str], kind: str, other: str) -> tuple[int, int]:
    """The period and the offset of the layers of one kind among those of another; none are at an offset beyond the depth."""
    places = [i for i, layer in enumerate(layers) if layer == kind] or [len(layers)]
    period = places[1] - places[0] if len(places) > 1 else max(len(layers), places[0] + 1)
    offset = places[0] % period
    refuse_unless(field, layers, [kind if i % period == offset else other for i in range(len(layers))])
    return period, offset


def refuse_unless(name: str, value: Any, wanted: Any) -> None:
    if value != wanted:
        raise ValueError(f"{name} must be {wanted!r} to be written as a Jamba, got {value!r}: save_pretrained writes ours")
