"""Jamba as Transformers and AI21 write it: v0.1, 1.5, Jamba2, the dense ones, and whatever has their fields and keys.

On disk every expert has keys of its own, in a Transformers 5 in memory all experts of a layer are two tensors: both are read,
the first is written. What older configs say besides is read by Transformers' own config, whose defaults hold.
"""

from __future__ import annotations

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
    ".feed_forward.": ".mlp.",
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
            **{name: getattr(theirs, name) for name in SAME},
            **{ours: getattr(theirs, name) for name, ours in FIELDS.items()},
            "head_dim": getattr(theirs, "head_dim", None),
            "mixers": mixers,
            "mlp_layer_types": mlps,
            "num_experts": theirs.num_experts if "sparse" in mlps else 0,
            "norm_topk_prob": False,
            "mixer_options": {"mamba": mamba} if "mamba" in mixers else None,
            "dtype": theirs.dtype,
        }

    def write_config(self, config: PreTrainedConfig) -> dict[str, Any]:
        sparse = [kind == "sparse" for kind in config.mlp_layer_types]
        expected = EXPECTED | (EXPECTED_OF_EXPERTS if any(sparse) else {})
        if any(sparse):
            expected["moe_intermediate_size"] = config.intermediate_size
        if config.head_dim * config.num_heads != config.hidden_size:
            expected["head_dim"] = config.hidden_size // config.num_heads
        for name, wanted in expected.items():
            refuse_unless(name, getattr(config, name), wanted)
        mamba = config.for_mixer("mamba")
        for name, wanted in {"inner_layernorms": True, "norm_eps": config.norm_eps}.items():
            refuse_unless(f"{name} of mamba", getattr(mamba, name), wanted)
        attention_period, attention_offset = every([mixer == "attention" for mixer in config.mixers])
        expert_period, expert_offset = every(sparse) if any(sparse) else (2, 1)
        theirs = JambaConfig(
            **{name: getattr(config, name) for name in SAME},
            **{name: getattr(config, ours) for name, ours in FIELDS.items()},
            **{name: getattr(mamba, ours) for name, ours in MAMBA_FIELDS.items()},
            attn_layer_period=attention_period,
            attn_layer_offset=attention_offset,
            expert_layer_period=expert_period,
            expert_layer_offset=expert_offset,
            num_experts=config.num_experts if any(sparse) else 1,
            dtype=config.dtype,
            architectures=["JambaForCausalLM"],
        )
        read = self.read_config(theirs.to_dict())
        for name in ("mixers", "mlp_layer_types"):
            refuse_unless(name, getattr(config, name), read[name])
        return theirs.to_dict()

    def has_weights(self, keys: Collection[str]) -> bool:
        return any(".pre_ff_layernorm." in key for key in keys)

    def transforms(self, config: PreTrainedConfig) -> list[WeightTransform]:
        kinds = {"mamba": "mamba", "attention": "self_attn"}
        mixers = {f"layers.{i}.{kinds[mixer]}.": f"layers.{i}.mixer." for i, mixer in enumerate(config.mixers)}
        experts = "mlp.experts.*."
        return [
            *renamings(NAMES | mixers),
            WeightConverter(
                [f"{experts}gate_proj.weight", f"{experts}up_proj.weight"],
                "mlp.experts.gate_up_proj",
                [MergeModulelist(dim=0), Concatenate(dim=1)],
            ),
            WeightConverter(f"{experts}down_proj.weight", "mlp.experts.down_proj", [MergeModulelist(dim=0)]),
        ]


def every(chosen: list[bool]) -> tuple[int, int]:
    """The period and the offset of the chosen layers, if they have one; what they are is looked at afterwards."""
    places = [i for i, x in enumerate(chosen) if x]
    if not places:
        return len(chosen) + 1, len(chosen)
    period = places[1] - places[0] if len(places) > 1 else len(chosen)
    return period, min(places[0], period - 1)


def refuse_unless(name: str, value: Any, wanted: Any) -> None:
    if value != wanted:
        raise ValueError(f"{name} must be {wanted!r} to be written as a Jamba, got {value!r}: save_pretrained writes ours")
