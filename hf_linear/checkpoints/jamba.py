"""Jamba as Transformers and AI21 write it: v0.1, 1.5, Jamba2, the dense ones, and whatever has their fields and keys.

On disk every expert has keys of its own, in the memory of Transformers 5 all experts of a layer are two tensors: both are read,
the first is written. Of older configs, what Transformers passes over is passed over, but for `mamba_inner_layernorms`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from transformers import JambaConfig, PreTrainedConfig
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightTransform

from hf_linear.checkpoints.transformers_hybrid import SAME, TransformersHybrid


class Jamba(TransformersHybrid):
    name = "jamba"
    title = "Jamba's (model.layers.0.pre_ff_layernorm...)"
    config_class = JambaConfig
    architecture = "JambaForCausalLM"
    mixer = "mamba"
    same = (*SAME, "intermediate_size", "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef")
    mixer_fields: Mapping[str, str] = {
        "mamba_d_state": "state_size",
        "mamba_d_conv": "conv_kernel",
        "mamba_expand": "expand",
        "mamba_dt_rank": "time_step_rank",
        "mamba_conv_bias": "use_conv_bias",
        "mamba_proj_bias": "use_bias",
    }
    only: Mapping[str, Any] = {"hidden_act": "silu", "sliding_window": None}
    expected: Mapping[str, Any] = {**TransformersHybrid.expected, "rope_parameters": None}
    names: Mapping[str, str] = {
        "final_layernorm.": r"(?<!\w)norm.",
        ".input_layernorm.": ".mixer_norm.",
        ".pre_ff_layernorm.": ".mlp_norm.",
        # All but the keys of single experts, whose converters say their whole way.
        ".feed_forward.(?!experts.[0-9])": ".mlp.",
        ".mlp.router.": ".mlp.router.proj.",
    }

    def read_config(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        known = {name for name in JambaConfig().to_dict() if name.startswith("mamba_")} | {"mamba_inner_layernorms"}
        unknown = sorted(name for name in fields if name.startswith("mamba_") and name not in known)
        if unknown:
            raise ValueError(f"mamba_* of a jamba must be of {sorted(known)}, got {unknown}: this variant is not here")
        ours = super().read_config(fields)
        if ours["mixer_options"]:
            ours["mixer_options"]["mamba"]["inner_layernorms"] = fields.get("mamba_inner_layernorms", True)
        return ours

    def read_rest(self, theirs: PreTrainedConfig) -> dict[str, Any]:
        mlps = ["sparse" if experts > 1 else "dense" for experts in theirs.layers_num_experts]
        return {
            "mlp_layer_types": mlps,
            "num_experts": theirs.num_experts if "sparse" in mlps else 0,
            "norm_topk_prob": False,
        }

    def write_rest(self, config: PreTrainedConfig) -> dict[str, Any]:
        attention_period, attention_offset = self.every("mixers", config.mixers, "attention", "mamba")
        expert_period, expert_offset = self.every("mlp_layer_types", config.mlp_layer_types, "sparse", "dense")
        sparse = "sparse" in config.mlp_layer_types
        if sparse:
            self.refuse_unless(config.norm_topk_prob, False, "norm_topk_prob")
            self.refuse_unless(config.num_shared_experts, 0, "num_shared_experts")
            self.refuse_unless(config.moe_intermediate_size, config.intermediate_size, "moe_intermediate_size")
        if "mamba" in config.mixers:
            self.refuse_unless(config.for_mixer("mamba").inner_layernorms, True, "inner_layernorms of mamba")
        return {
            "attn_layer_period": attention_period,
            "attn_layer_offset": attention_offset,
            "expert_layer_period": expert_period,
            "expert_layer_offset": expert_offset,
            "num_experts": config.num_experts if sparse else 1,
        }

    def every(self, field: str, layers: list[str], kind: str, other: str) -> tuple[int, int]:
        """Period and offset of the layers of one kind among those of another; of none, an offset beyond the depth."""
        places = [i for i, layer in enumerate(layers) if layer == kind] or [len(layers)]
        period = places[1] - places[0] if len(places) > 1 else max(len(layers), places[0] + 1)
        offset = places[0] % period
        self.refuse_unless(layers, [kind if i % period == offset else other for i in range(len(layers))], field)
        return period, offset

    def has_weights(self, keys: Collection[str]) -> bool:
        return any(".pre_ff_layernorm." in key for key in keys) and any(".mamba.dt_proj." in key for key in keys)

    def transforms(self, config: PreTrainedConfig) -> list[WeightTransform]:
        experts = "feed_forward.experts.*."
        return [
            *super().transforms(config),
            WeightConverter(
                [f"{experts}gate_proj.weight", f"{experts}up_proj.weight"],
                "mlp.experts.gate_up_proj",
                [MergeModulelist(dim=0), Concatenate(dim=1)],
            ),
            WeightConverter(f"{experts}down_proj.weight", "mlp.experts.down_proj", [MergeModulelist(dim=0)]),
        ]
