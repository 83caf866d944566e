"""GLA as its paper's own repository writes it, berlino/gated_linear_attention."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.core_model_loading import WeightTransform

from hf_linear.checkpoints.fields import Fields, check_said, kept
from hf_linear.checkpoints.layout import Layout, renamings

FIELDS = Fields(
    of="the original GLA",
    names={
        "vocab_size": "vocab_size",
        "d_model": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_heads",
        "context_length": "max_position_embeddings",
    },
    only={"use_gk": True, "use_gv": False},
    without_effect=frozenset({"architectures", "auto_map", "load_from_llama", "transformers_version"}),
    fixed={
        "expand_k": 0.5,
        "expand_v": 1.0,
        "output_gate_bias": True,
        "head_norm": "layer",
        "elementwise_affine": False,
        "norm_eps": 1e-5,
    },
)
# Of their config class.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 50432,
    "d_model": 2048,
    "n_layer": 24,
    "n_head": 8,
    "context_length": 2048,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


class OriginalGLA(Layout):
    name = "gla_original"
    title = "the GLA of its paper's repository (transformer.h.0.attn.k_gate...)"

    def has_config(self, fields: Mapping[str, Any]) -> bool:
        return "d_model" in fields

    def read_config(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Their layer multiplies k by (d_model / n_head) ** -0.5 and calls an operator with the scale of ours, K ** -0.5.

        The head norm undoes the first but for its eps, which is that much smaller beside their outputs than beside ours.
        """
        ours, rest = FIELDS.read({**DEFAULTS, **fields})
        head_norm_eps = ours["norm_eps"] * ours["hidden_size"] / ours["num_heads"]
        return {**rest, **ours, "head_norm_eps": head_norm_eps, "model_type": "gla"}

    def write_config(self, config: PreTrainedConfig) -> dict[str, Any]:
        fields = kept(config) | FIELDS.write(config)
        check_said(FIELDS.of, config, self.read_config(fields))
        return fields

    def has_weights(self, keys: Collection[str]) -> bool:
        return any(".attn.k_gate." in key for key in keys)

    def transforms(self, config: PreTrainedConfig) -> list[WeightTransform]:
        names = {
            "transformer.wte.": "model.embed_tokens.",
            "transformer.ln_f.": "model.norm.",
            "transformer.h.": "model.layers.",
            ".ln_1.": ".mixer_norm.",
            ".ln_2.": ".mlp_norm.",
            ".w1.": ".mlp.gate_proj.",
            ".w2.": ".mlp.down_proj.",
            ".w3.": ".mlp.up_proj.",
            ".attn.": ".mixer.",
            ".k_gate.": ".gk_proj.",
            ".out_proj.": ".o_proj.",
        }
        return renamings(names)
