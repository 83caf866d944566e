"""Granite 4's hybrids as Transformers writes them: Mamba-2 and attention, an MLP or experts beside shared ones behind each."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from transformers import GraniteMoeHybridConfig, PreTrainedConfig
from transformers.core_model_loading import Chunk, WeightConverter, WeightTransform

from hf_linear.checkpoints.layout import renamings
from hf_linear.checkpoints.transformers_hybrid import MAMBA2_FIELDS, MAMBA2_ONLY, SAME, TransformersHybrid

SCALES = ("embedding_multiplier", "residual_multiplier", "logits_scaling")


class GraniteHybrid(TransformersHybrid):
    name = "granite_hybrid"
    title = "Granite's (model.layers.0.shared_mlp...)"
    config_class = GraniteMoeHybridConfig
    architecture = "GraniteMoeHybridForCausalLM"
    mixer = "mamba2"
    same = (*SAME, *SCALES, "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef")
    mixer_fields: Mapping[str, str] = MAMBA2_FIELDS
    only: Mapping[str, Any] = MAMBA2_ONLY
    expected: Mapping[str, Any] = {
        name: value for name, value in TransformersHybrid.expected.items() if name not in (*SCALES, "attention_multiplier")
    }
    names: Mapping[str, str] = {
        ".input_layernorm.": ".mixer_norm.",
        ".post_attention_layernorm.": ".mlp_norm.",
        ".block_sparse_moe.router.layer.": ".mlp.router.proj.",
        ".block_sparse_moe.input_linear.weight": ".mlp.experts.gate_up_proj",
        ".block_sparse_moe.output_linear.weight": ".mlp.experts.down_proj",
    }

    def read_rest(self, theirs: PreTrainedConfig) -> dict[str, Any]:
        rest = {
            "rope_parameters": theirs.rope_parameters if theirs.position_embedding_type == "rope" else None,
            "attention_multiplier": theirs.attention_multiplier,
        }
        if not theirs.num_local_experts:
            return {**rest, "intermediate_size": theirs.shared_intermediate_size, "num_experts": 0}
        shared, left = divmod(theirs.shared_intermediate_size, theirs.intermediate_size)
        if left or not shared:
            raise ValueError(
                f"shared_intermediate_size of a {self.name} must be a multiple of intermediate_size = "
                f"{theirs.intermediate_size}, got {theirs.shared_intermediate_size}: this variant is not here"
            )
        return {
            **rest,
            "intermediate_size": theirs.intermediate_size,
            "moe_intermediate_size": theirs.intermediate_size,
            "num_experts": theirs.num_local_experts,
            "num_shared_experts": shared,
        }

    def write_rest(self, config: PreTrainedConfig) -> dict[str, Any]:
        kinds = sorted(set(config.mlp_layer_types))
        self.refuse_unless(kinds, ["sparse"] if "sparse" in kinds else ["dense"], "mlp_layer_types")
        rope = config.rope_parameters
        rest = {
            "layer_types": ["full_attention" if mixer == "attention" else "linear_attention" for mixer in config.mixers],
            "position_embedding_type": None if rope is None else "rope",
            "rope_parameters": rope,
            "attention_multiplier": config.head_dim**-0.5
            if config.attention_multiplier is None
            else config.attention_multiplier,
        }
        if kinds == ["dense"]:
            return {**rest, "num_local_experts": 0, "shared_intermediate_size": config.intermediate_size}
        self.refuse_unless(config.norm_topk_prob, True, "norm_topk_prob")
        self.refuse_unless(config.num_shared_experts > 0, True, "num_shared_experts > 0")
        return {
            **rest,
            "intermediate_size": config.moe_intermediate_size,
            "num_local_experts": config.num_experts,
            "shared_intermediate_size": config.num_shared_experts * config.moe_intermediate_size,
        }

    def has_weights(self, keys: Collection[str]) -> bool:
        return any(".shared_mlp." in key for key in keys)

    def transforms(self, config: PreTrainedConfig) -> list[WeightTransform]:
        ours = "mlp.shared_experts" if config.num_experts else "mlp"
        return [
            *super().transforms(config),
            *renamings({".shared_mlp.output_linear.": f".{ours}.down_proj."}),
            WeightConverter(
                "shared_mlp.input_linear.weight",
                [f"{ours}.gate_proj.weight", f"{ours}.up_proj.weight"],
                [Chunk(dim=0)],
            ),
        ]
