"""GLA and RetNet as flash-linear-attention (fla) writes them, 0.6.0 and before. Most of its fields and keys are ours.

A hybrid, whose config has `attn`, is a linear_hybrid here: its attention layers have heads of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.core_model_loading import Chunk, WeightConverter, WeightTransform

from hf_linear.checkpoints.fields import NO_WORD, NOT_HERE, PLAIN, check_one_of
from hf_linear.checkpoints.layout import Layout, renamings

# --- Configs ---------------------------------------------------------------------------------------------------------

# fla's defaults, which stand for what a config.json leaves out.
BOTH: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_kv_heads": None,
    "intermediate_size": None,
    "feature_map": None,
    "use_output_gate": True,
    "elementwise_affine": True,
    "norm_eps": 1e-6,
    "hidden_act": "swish",
    "max_position_embeddings": 2048,
    "attn": None,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "fuse_linear_cross_entropy": False,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "gla": BOTH
    | {"expand_k": 0.5, "expand_v": 1.0, "hidden_ratio": 4, "num_heads": 4}
    | {"use_short_conv": False, "conv_size": 4, "clamp_min": None},
    "retnet": BOTH | {"expand_k": 1.0, "expand_v": 2.0, "hidden_ratio": 2, "num_heads": 8},
}
# The one value that means what our models compute.
ONLY: dict[str, Any] = {"use_gk": True, "use_gv": False, "attnres_block_size": None}
# What concerns speed, training or fla's own code alone. RetNet's short convolution is named in its config and never built.
WITHOUT_EFFECT = {
    "gla": {"attn_mode", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "use_l2warp", "share_conv_kernel", "auto_map"},
}
WITHOUT_EFFECT["retnet"] = WITHOUT_EFFECT["gla"] | {"use_short_conv", "conv_size"}
# GLA looks its feature map up among fla's activations, RetNet among those of Transformers.
ACTIVATIONS: dict[str | None, str] = {None: "identity", "relu": "relu", "sigmoid": "sigmoid", "silu": "silu", "swish": "silu"}
FEATURE_MAPS = {
    "gla": ACTIVATIONS | {"sqrelu": "relu2", "gelu": "gelu_pytorch_tanh"},
    "retnet": ACTIVATIONS | {"relu2": "relu2", "gelu_pytorch_tanh": "gelu_pytorch_tanh"},
}
# Fields of ours that fla has no word for, each with what it computes.
CONSTANT: dict[str, dict[str, Any]] = {
    "gla": {"gate_low_rank_dim": 16, "gate_logit_normalizer": 16, "output_gate_bias": False, "head_norm": "rms"},
    "retnet": {"retention_norm": "none", "rope_style": "half", "rope_frequencies": "standard"},
}
MIXERS = {"gla": "gla", "retnet": "retention"}
# What the recurrent layers of a hybrid have of their own.
OF_MIXER = {"expand_k", "expand_v", "num_heads", "num_kv_heads", "feature_map", "use_output_gate", "elementwise_affine"}
OF_MIXER |= {"use_short_conv", "conv_size", "clamp_min", "head_norm_eps"}
# An entry of `attn`, with fla's defaults.
ATTENTION: dict[str, Any] = {"num_kv_heads": None, "qkv_bias": False, "window_size": None, "rope_theta": 10000.0}


def config_fields(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of GLAConfig or RetNetConfig for a config.json of fla; of LinearHybridConfig where it has `attn`."""
    family = theirs["model_type"]
    skipped = WITHOUT_EFFECT[family] | set(ONLY)
    ours = DEFAULTS[family] | {name: value for name, value in theirs.items() if name not in skipped}
    if "rms_norm_eps" in ours:  # its name until 2024
        ours["norm_eps"] = ours.pop("rms_norm_eps")
    wanted = {name: [value] for name, value in ONLY.items()}
    wanted |= {"hidden_act": ["swish", "silu"], "feature_map": list(FEATURE_MAPS[family])}
    for name, values in wanted.items():
        check_one_of(name, f"fla's {family}", theirs.get(name, values[0]), values, NOT_HERE)
    ours["hidden_act"] = "silu"
    ours["feature_map"] = FEATURE_MAPS[family][ours["feature_map"]]
    ours["hidden_ratio"] = ours["hidden_ratio"] or 4  # what fla's MLP makes of None
    ours["num_kv_heads"] = ours["num_kv_heads"] or ours["num_heads"]
    ours["elementwise_affine"] = bool(ours["elementwise_affine"])
    if ours.get("clamp_min") is not None:
        ours["clamp_min"] = float(ours["clamp_min"])
    attn = ours.pop("attn") or []
    entries = [entry for entry in ([attn] if isinstance(attn, dict) else attn) if entry.get("layers") != []]
    return hybrid_fields(ours, entries) if entries else ours


def hybrid_fields(fields: dict[str, Any], attn: list[dict[str, Any]]) -> dict[str, Any]:
    """The fields of a hybrid from those of its recurrent layers and the entries of `attn`, each with its layers."""
    family, depth = fields["model_type"], fields["num_hidden_layers"]
    mixers = [MIXERS[family]] * depth
    heads, windows = set(), set()
    for entry in attn:
        named = {"layers", "num_heads"}
        unknown = [name for name in entry.keys() - ATTENTION.keys() - named if entry[name]]
        entry = ATTENTION | entry
        if unknown or not named <= entry.keys() or not set(entry["layers"]) <= set(range(depth)) or entry["rope_theta"] is None:
            raise ValueError(
                f"attn of fla's {family} must have layers below {depth}, num_heads and any of {sorted(ATTENTION)}, "
                f"got {entry}: this variant is not here"
            )
        heads.add((entry["num_heads"], entry["num_kv_heads"] or entry["num_heads"], entry["qkv_bias"], entry["rope_theta"]))
        windows.add(entry["window_size"])
        for i in entry["layers"]:
            mixers[i] = "sliding_attention" if entry["window_size"] else "attention"
    if len(heads) > 1 or len(windows - {None}) > 1:
        raise ValueError(
            f"attn of fla's {family} must have the same heads, qkv_bias and rope_theta in every entry, and one window_size "
            f"besides None, got {attn}: layers that differ more are not here"
        )
    ((num_heads, num_kv_heads, bias, theta),) = heads
    of_mixer = {name: fields[name] for name in OF_MIXER & fields.keys()}
    shared = {name: value for name, value in fields.items() if name not in OF_MIXER and name != "architectures"}
    return shared | {
        "model_type": "linear_hybrid",
        "mixers": mixers,
        "mixer_options": {MIXERS[family]: of_mixer} if MIXERS[family] in mixers else {},
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "attention_bias": bias,
        "sliding_window": next(iter(windows - {None}), None),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(theta)},
    }


def family_of(config: PreTrainedConfig) -> str | None:
    """fla's model with the recurrent layers of ours; None where it has none."""
    mixers = set(config.mixers) - {"attention", "sliding_attention"} or {config.mixer}
    return next((family for family, mixer in MIXERS.items() if {mixer} == mixers), None)


def foreign_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The config.json of fla for a config of ours."""
    family = family_of(config)
    if family is None:
        raise ValueError(
            f"mixers of a model for fla must be attention and one of {sorted(MIXERS.values())}, got {config.mixers}: "
            "it has no model that mixes others"
        )
    own = config.for_mixer(MIXERS[family])
    names = {ours: theirs for theirs, ours in reversed(FEATURE_MAPS[family].items())}
    wanted = {name: [value] for name, value in CONSTANT[family].items()}
    wanted |= {"hidden_act": ["silu", "swish"], "feature_map": list(names), "num_experts": [0]}
    wanted |= {"mlp_layer_types": [["dense"] * config.num_hidden_layers], **{name: [value] for name, value in PLAIN.items()}}
    if family == "gla":
        wanted["head_norm_eps"] = [own.norm_eps]
    attn = attn_entries(config)
    if attn:
        theta = (config.rope_parameters or {}).get("rope_theta", 10000.0)
        wanted["rope_parameters"] = [{"rope_type": "default", "rope_theta": theta}]
        wanted["head_dim"] = [config.hidden_size // config.num_heads]
    for name, values in wanted.items():
        value = getattr(own if name in OF_MIXER or name in CONSTANT[family] else config, name)
        check_one_of(name, f"fla's {family}", value, values, NO_WORD)
    fields = {name: getattr(own if name in OF_MIXER else config, name) for name in DEFAULTS[family] if name != "attn"}
    return fields | {
        "model_type": family,
        "architectures": ["GLAForCausalLM" if family == "gla" else "RetNetForCausalLM"],
        "hidden_act": "swish",
        "feature_map": names[own.feature_map],
        "attn": attn[0] if len(attn) == 1 else attn or None,
        "fuse_norm": True,
        "fuse_cross_entropy": not config.fuse_linear_cross_entropy,
    }


def attn_entries(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The entries of `attn` for the attention layers of a config of ours."""
    entries = []
    for kind in ("attention", "sliding_attention"):
        layers = [i for i, mixer in enumerate(config.mixers) if mixer == kind]
        entry = {
            "layers": layers,
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "qkv_bias": config.attention_bias,
            "window_size": config.sliding_window if kind == "sliding_attention" else None,
            "rope_theta": (config.rope_parameters or {}).get("rope_theta"),
        }
        entries += [entry] if layers else []
    return entries


# --- Weights ---------------------------------------------------------------------------------------------------------


class FLA(Layout):
    """Since February 2025."""

    name = "fla"
    title = "flash-linear-attention's (model.layers.0.attn_norm...)"

    def has_config(self, fields: Mapping[str, Any]) -> bool:
        family = fields.get("model_type")
        return (
            family in DEFAULTS
            and "mixers" not in fields
            and any(name in fields for name in WITHOUT_EFFECT[family] | ONLY.keys() | {"attn"})
        )

    def read_config(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        return config_fields(fields)

    def write_config(self, config: PreTrainedConfig) -> dict[str, Any]:
        return foreign_fields(config)

    def has_weights(self, keys: Collection[str]) -> bool:
        return any(".attn_norm." in key for key in keys) and any(".mlp.up_proj." in key for key in keys)

    def transforms(self, config: PreTrainedConfig) -> list[WeightTransform]:
        norms = {".mixer.g_norm.": ".mixer.norm."}
        if config.for_mixer(MIXERS[family_of(config) or "gla"]).use_output_gate:
            # What norms and gates in one kernel, fla's default, has a name of its own: the last one is what we write.
            norms[".mixer.g_norm_swish_gate."] = ".mixer.norm."
        return renamings({"embeddings.": "embed_tokens.", ".attn_norm.": ".mixer_norm.", ".attn.": ".mixer.", **norms})


class FusedFLA(FLA):
    """Before February 2025 the two halves of the MLP's input lay in one `gate_proj`."""

    name = "fla_2024"
    title = "flash-linear-attention's of 2024 (model.layers.0.attn_norm..., both halves of the MLP in gate_proj)"

    def has_config(self, fields: Mapping[str, Any]) -> bool:
        return False  # the configs are the same

    def has_weights(self, keys: Collection[str]) -> bool:
        return any(".attn_norm." in key for key in keys) and not any(".mlp.up_proj." in key for key in keys)

    def transforms(self, config: PreTrainedConfig) -> list[WeightTransform]:
        halves = [r"mlp\.gate_proj\.weight", r"mlp\.up_proj\.weight"]
        return [*super().transforms(config), WeightConverter(halves[0], halves, [Chunk(dim=0)])]


LAYOUTS: tuple[Layout, ...] = (FLA(), FusedFLA())
