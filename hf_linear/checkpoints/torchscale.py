"""RetNet as torchscale 0.3.0 writes it, and as syncdoth's port of it to Transformers does.

Both have torchscale's names of arguments and parameters. The port has a config.json; the arguments of a torchscale model lie
beside its state dict, or with it in a file of fairseq (`conversion/torchscale.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import inf, nextafter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.core_model_loading import PrefixChange, WeightTransform

from hf_linear.checkpoints.fields import NOT_HERE, Fields, check_one_of, check_said, kept
from hf_linear.checkpoints.layout import Layout, renamings
from hf_linear.mixers.retention import THETA
from hf_linear.modules.rotary import linspace_frequencies
from hf_linear.ops import retention_decay

NAMES = {
    "vocab_size": "vocab_size",
    "decoder_embed_dim": "hidden_size",
    "decoder_layers": "num_hidden_layers",
    "decoder_retention_heads": "num_heads",
    "decoder_ffn_embed_dim": "intermediate_size",
    "layernorm_eps": "norm_eps",
    "layernorm_embedding": "use_embedding_norm",
}
FIXED = {
    "expand_k": 1.0,
    "use_output_gate": True,
    "elementwise_affine": False,
    "retention_norm": "decay",
    "rope_style": "interleaved",
    "rope_frequencies": "linspace",
}
WITHOUT_EFFECT = {"activation_dropout", "dropout", "drop_path_rate", "recurrent_chunk_size"}
ONLY_TORCHSCALE = {
    "checkpoint_activations",
    "chunkwise_recurrent",
    "ddp_rank",
    "fsdp",
    "max_rel_pos",
    "moe_eval_capacity_token_fraction",
    "moe_expert_count",
    "moe_gating_use_fp32",
    "moe_normalize_gate_prob_before_dropping",
    "moe_second_expert_policy",
    "moe_top1_expert",
    "rel_pos_buckets",
    "use_xmoe",
    "xpos_rel_pos",
    "xpos_scale_base",
}
ONLY_SYNCDOTH = {
    "architectures",
    "auto_map",
    "forward_impl",
    "is_decoder",
    "output_retentions",
    "transformers_version",
    "unk_token_id",
    "use_ffn_rms_norm",
    "z_loss_coeff",
}
TORCHSCALE_FIELDS = Fields(
    of="torchscale's RetNet",
    names=NAMES
    | {"max_target_positions": "max_position_embeddings", "share_decoder_input_output_embed": "tie_word_embeddings"},
    only={"deepnorm": False, "moe_freq": 0, "multiway": False, "no_output_layer": False},
    without_effect=frozenset(WITHOUT_EFFECT | ONLY_TORCHSCALE),
    fixed=FIXED,
)
SYNCDOTH_FIELDS = Fields(
    of="syncdoth's RetNet",
    names=NAMES,
    only={"deepnorm": False, "use_glu": True, "use_lm_decay": False},
    without_effect=frozenset(WITHOUT_EFFECT | ONLY_SYNCDOTH),
    fixed=FIXED,
)
# Of both libraries' config classes, for what a config leaves out.
DEFAULTS: dict[str, Any] = {
    "decoder_embed_dim": 768,
    "decoder_value_embed_dim": 1280,
    "decoder_layers": 12,
    "decoder_retention_heads": 3,
    "decoder_ffn_embed_dim": 1280,
    "activation_fn": "gelu",
    "layernorm_eps": 1e-6,
    "layernorm_embedding": False,
    "no_scale_embedding": True,
    "decoder_normalize_before": True,
    "subln": True,
}
ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "swish": "silu"}


def read_fields(fields: Fields, theirs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ours, and those of theirs that no table knows."""
    theirs = {**DEFAULTS, **theirs}
    width, value_width = theirs["decoder_embed_dim"], theirs.pop("decoder_value_embed_dim")
    activation, scaled = theirs.pop("activation_fn"), not theirs.pop("no_scale_embedding")
    normalize_before = theirs.pop("decoder_normalize_before") | theirs.pop("subln")  # the second implies the first
    check_one_of("activation_fn", fields.of, activation, [*ACTIVATIONS], "it has no other")
    check_one_of("decoder_normalize_before", fields.of, normalize_before, [True], NOT_HERE)
    ours, rest = fields.read(theirs)
    ours["hidden_act"] = ACTIVATIONS[activation]
    ratio = value_width / width  # which may be rounded to just below the one whose product with the width is whole
    ours["expand_v"] = ratio if int(width * ratio) == value_width else nextafter(ratio, inf)
    ours["embedding_multiplier"] = width**0.5 if scaled else 1.0
    return ours, rest


def write_fields(fields: Fields, config: PreTrainedConfig) -> dict[str, Any]:
    activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    return fields.write(config) | {
        "decoder_value_embed_dim": config.value_dim,
        "activation_fn": activations.get(config.hidden_act, config.hidden_act),
        "no_scale_embedding": config.embedding_multiplier == 1,
        "decoder_normalize_before": True,
        "subln": True,
    }


class Syncdoth(Layout):
    name = "syncdoth"
    title = "the RetNet of syncdoth (model.layers.0.retention...)"

    def has_config(self, fields: Mapping[str, Any]) -> bool:
        return "decoder_retention_heads" in fields

    def read_config(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        tokens = {"bos_token_id": None, "pad_token_id": 0, "eos_token_id": 0}
        ours, rest = read_fields(SYNCDOTH_FIELDS, {"vocab_size": 50257, **fields})
        return {**tokens, **rest, **ours, "model_type": "retnet"}

    def write_config(self, config: PreTrainedConfig) -> dict[str, Any]:
        fields = kept(config) | {"initializer_range": config.initializer_range} | write_fields(SYNCDOTH_FIELDS, config)
        check_said(SYNCDOTH_FIELDS.of, config, self.read_config(fields))
        return fields

    def has_weights(self, keys: Collection[str]) -> bool:
        return any(key.startswith("model.") and ".retention." in key for key in keys)

    def transforms(self, config: PreTrainedConfig) -> list[WeightTransform]:
        names = {
            "layernorm_embedding.": "embed_norm.",
            ".retention_layer_norm.": ".mixer_norm.",
            ".final_layer_norm.": ".mlp_norm.",
            "model.layer_norm.": "model.norm.",
            ".ffn.fc1.": ".mlp.gate_proj.",  # which they activate
            ".ffn.gate.": ".mlp.up_proj.",
            ".ffn.fc2.": ".mlp.down_proj.",
            ".retention.": ".mixer.",
            ".out_proj.": ".o_proj.",
        }
        return renamings(names)

    def derived(self, config: PreTrainedConfig) -> dict[str, Tensor]:
        width = config.key_dim // config.num_heads
        frequencies = linspace_frequencies(width, THETA, torch.device("cpu"), torch.float32)
        angle, decay = frequencies.repeat_interleave(2), retention_decay(config.num_heads)
        return {"model.retnet_rel_pos.angle": angle, "model.retnet_rel_pos.decay": decay}


class Torchscale(Syncdoth):
    """Syncdoth's keys without `model.`, and another name of the head."""

    arguments = TORCHSCALE_FIELDS.known | DEFAULTS.keys()
    name = "torchscale"
    title = "torchscale's RetNet (layers.0.retention...)"

    def has_config(self, fields: Mapping[str, Any]) -> bool:
        return "share_decoder_input_output_embed" in fields  # theirs alone, in what `save` writes: they have no config.json

    def read_config(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Ours for the arguments of torchscale's RetNetConfig. None stands for its default, as in fairseq's."""
        given = {name: value for name, value in fields.items() if value is not None and name not in ("model_type", "dtype")}
        ours, rest = read_fields(TORCHSCALE_FIELDS, {"max_target_positions": 1024, **given})
        if rest:
            raise ValueError(
                f"arguments of torchscale's RetNet must be those of its RetNetConfig, got {sorted(rest)}: take out what has no "
                "effect"
            )
        return {"bos_token_id": None, "eos_token_id": None, **ours, "model_type": "retnet"}

    def write_config(self, config: PreTrainedConfig) -> dict[str, Any]:
        fields = write_fields(TORCHSCALE_FIELDS, config) | {"model_type": config.model_type}
        check_said(TORCHSCALE_FIELDS.of, config, self.read_config(fields))
        return fields

    def has_weights(self, keys: Collection[str]) -> bool:
        return any(key.startswith("layers.") and ".retention." in key for key in keys)

    def transforms(self, config: PreTrainedConfig) -> list[WeightTransform]:
        prefix = PrefixChange(prefix_to_add="model")
        return [prefix, *renamings({"model.output_projection.": "lm_head."}), *super().transforms(config)]
