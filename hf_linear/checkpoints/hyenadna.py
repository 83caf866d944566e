"""Hyena as HyenaDNA and safari write it: the fields of their configs, the keys of their weights, the DNA tokenizer.

Their checkpoints share one core of keys, `backbone.layers.0.mixer.in_proj.weight`, and differ in what stands around it:
    hyena.    the -hf repositories of LongSafari, whose config.json has the model_type "hyenadna"
    model.    weights.ckpt of HyenaDNA and safari, saved by Lightning
    nothing   a state dict of safari's model, or of the backbone of an -hf repository
A model that was trained with gradient checkpointing has `mixer.layer.` and `mlp.layer.` for `mixer.` and `mlp.`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from hf_linear.mixers.hyena import HyenaFilter

MODEL_TYPE = "hyenadna"
LAYOUTS = {
    "hyena.": "an -hf repository of HyenaDNA (hyena.backbone...)",
    "model.": "a Lightning checkpoint of HyenaDNA or safari (model.backbone...)",
    "": "a plain state dict of HyenaDNA or safari (backbone...)",
}

# --- Configs ---------------------------------------------------------------------------------------------------------

# Theirs, flat in an -hf repository, partly under `layer` elsewhere: ours.
FIELDS = {
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
    "d_inner": "intermediate_size",
    "vocab_size": "vocab_size",
    "layer_norm_epsilon": "norm_eps",
    "initializer_range": "initializer_range",
    "max_seq_len": "max_position_embeddings",
    "l_max": "max_position_embeddings",
    "emb_dim": "filter_emb_dim",
    "filter_order": "filter_order",
    "short_filter_order": "short_filter_order",
    "num_inner_mlps": "num_inner_mlps",
    "activation_freq": "activation_freq",
    "w": "activation_freq",
    "train_freq": "train_freq",
    "modulate": "filter_modulate",
    "shift": "filter_shift",
    "normalized": "filter_normalize",
}
# The one value that means what our models compute. Of a higher order, the originals disagree about the filters' channels.
ONLY: dict[str, Any] = {
    "hyena_order": 2,
    "order": 2,
    "bias": True,
    "num_heads": 1,
    "num_blocks": 1,
    "inner_factor": 1,
    "outer_mixing": False,
    "post_order_ffn": False,
    "activation": "id",
    "filter_cls": "hyena-filter",
    "linear_mixer": False,
    "bidirectional": False,
    "attn_layer_idx": None,
    "attn_cfg": None,
    "max_position_embeddings": 0,
    "fast_decay_pct": HyenaFilter.FAST,
    "slow_decay_pct": HyenaFilter.SLOW,
    "target": HyenaFilter.TARGET,
}
# What concerns training, speed or the originals' code alone; `use_bias` is read by none of them, `local_order` neither.
WITHOUT_EFFECT = {
    "_name_",
    "architectures",
    "auto_map",
    "channels",
    "checkpoint_mixer",
    "checkpoint_mlp",
    "dropout",
    "embed_dropout",
    "filter_dropout",
    "fused_bias_fc",
    "fused_dropout_add_ln",
    "fused_fft_conv",
    "fused_mlp",
    "hyena_dropout",
    "hyena_filter_dropout",
    "initializer_cfg",
    "jit_filter",
    "local_order",
    "lr",
    "lr_pos_emb",
    "modulation_lr",
    "model_type",
    "pad_vocab_size_multiple",
    "resid_dropout",
    "residual_in_fp32",
    "return_hidden_state",
    "return_state",
    "transformers_version",
    "use_bias",
    "wd",
}
DNA_TOKENS = {"pad_token_id": 4, "bos_token_id": 2, "eos_token_id": 1}  # [PAD], [BOS], [SEP]


def config_fields(theirs: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """The fields of HyenaConfig for a config.json of theirs; `defaults` are ours, for what their file leaves open.

    A flat config is that of an -hf repository, whose other fields (`id2label`, ...) are Transformers' own and are kept. In a
    config with `layer`, the arguments of the original model, a field that nobody knows is an error.
    """
    nested = "layer" in theirs
    fields = {**theirs, **theirs["layer"]} if nested else dict(theirs)
    fields.pop("layer", None)
    if nested:  # defaults of the originals' classes; an -hf repository says all of it
        ours: dict[str, Any] = {"filter_emb_dim": 3, "activation_freq": 1, "filter_order": 64, "tie_word_embeddings": True}
        ours["train_filter_positions"] = fields.get("lr_pos_emb", 1e-5) != 0
    else:
        ours = {"filter_shift": 0.05, "train_filter_positions": False, "tie_word_embeddings": False, **DNA_TOKENS}
    ours |= {"short_filter_order": 3, "num_inner_mlps": 2} | defaults
    for name in ("d_model", "n_layer", "vocab_size", "l_max" if nested else "max_seq_len"):
        if name not in fields:
            raise ValueError(f"a config of HyenaDNA or safari must have {name}, got {sorted(fields)}: is it another model's?")
    for name, value in fields.items():
        if name in ONLY:
            if value != ONLY[name]:
                raise ValueError(f"{name} of {MODEL_TYPE} must be {ONLY[name]!r}, got {value!r}: this variant is not here")
        elif name in FIELDS:
            ours[FIELDS[name]] = value
        elif name not in WITHOUT_EFFECT:
            if nested:
                raise ValueError(
                    f"a config of HyenaDNA or safari must have known fields, got {name!r}: take it out if it has no effect"
                )
            ours[name] = value
    if ours.get("intermediate_size") is None:
        ours["intermediate_size"] = 4 * ours["hidden_size"]
    multiple = fields.get("pad_vocab_size_multiple", 1 if nested else 8)
    ours["vocab_size"] = -(-ours["vocab_size"] // multiple) * multiple  # the embedding has rows that no token uses
    return ours


# --- Weights ---------------------------------------------------------------------------------------------------------

HEADS = ("lm_head.", "score.")
# Both sides are names of modules or parameters; weights and biases follow by themselves.
OUTSIDE = {"backbone.embeddings.word_embeddings": "model.embed_tokens", "backbone.ln_f": "model.norm"}
LAYER = {
    "norm1": "mixer_norm",
    "norm2": "mlp_norm",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mixer.in_proj": "mixer.in_proj",
    "mixer.out_proj": "mixer.out_proj",
    "mixer.short_filter": "mixer.short_filter",
    "mixer.filter_fn.bias": "mixer.implicit_filter.skip",
    "mixer.filter_fn.pos_emb.z": "mixer.implicit_filter.z",
    "mixer.filter_fn.implicit_filter.1.freq": "mixer.implicit_filter.freq",
}


def key_map(config: PreTrainedConfig) -> dict[str, str]:
    """Their modules and parameters, without what stands before `backbone.`, and ours."""
    last = config.num_inner_mlps + 1  # their sequence of layers: Linear, sine, Linear, sine, ..., Linear
    layer = LAYER | {f"mixer.filter_fn.implicit_filter.{2 * i}": f"mixer.implicit_filter.layers.{i}" for i in range(last)}
    layer[f"mixer.filter_fn.implicit_filter.{2 * last}"] = "mixer.implicit_filter.out"
    depth = range(config.num_hidden_layers)
    layers = {f"backbone.layers.{i}.{a}": f"model.layers.{i}.{b}" for i in depth for a, b in layer.items()}
    return OUTSIDE | layers | {"lm_head": "lm_head", "score": "score"}


def is_foreign(keys: Collection[str]) -> bool:
    return any("backbone." in key for key in keys)


def convert_weights(theirs: Mapping[str, Tensor], config: PreTrainedConfig, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict under our keys, every key and shape checked against `wanted`, the state dict of a model of ours.

    Heads are looser: one that `wanted` lacks is handed on, `score` may be missing, and `lm_head` where it is tied.
    """
    prefix = next((key.partition("backbone.")[0] for key in theirs if "backbone." in key), None)
    if prefix not in LAYOUTS:
        known = [f"{prefix}backbone." for prefix in LAYOUTS]
        raise ValueError(
            f"keys of HyenaDNA or safari must begin with one of {known}, got {sorted(theirs)[:3]}: is it another model's?"
        )
    assumed = f"the checkpoint is read as {LAYOUTS[prefix]}; does the config belong to it?"
    ours_of = key_map(config)
    theirs_of = {b: a for a, b in ours_of.items()}
    ours: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for key, x in theirs.items():
        core = key.removeprefix(prefix).replace(".mixer.layer.", ".mixer.").replace(".mlp.layer.", ".mlp.")
        # One sine serves all layers of a filter: it is saved once, or under the name of each.
        core = re.sub(r"\.implicit_filter\.\d+\.freq$", ".implicit_filter.1.freq", core)
        if core.endswith((".pos_emb.t", ".modulation.deltas")):
            check_derived(key, x, config)
            continue
        name = translated(core, ours_of)
        if name is None or not (name in wanted or name.startswith(HEADS)):
            raise ValueError(f"unexpected key {key!r} of shape {list(x.shape)}: {assumed}")
        if name in wanted and not name.startswith("score."):  # Transformers itself looks at the shape of a new head
            shape = their_shape(core, wanted[name])
            if list(x.shape) != shape:
                raise ValueError(f"{key!r} must have the shape {shape}, got {list(x.shape)}: {assumed}")
            x = x.reshape(wanted[name].shape)
        if name in ours and not torch.equal(ours[name], x):
            raise ValueError(f"{origin[name]!r} and {key!r} must be one tensor, got two that differ: {assumed}")
        ours[name], origin[name] = x, key
    optional = ("score.", "lm_head.") if config.tie_word_embeddings else ("score.",)
    for name in [name for name in wanted if name not in ours and not name.startswith(optional)]:
        core = translated(name, theirs_of) or name
        key = core if core.startswith(HEADS) else prefix + core
        raise ValueError(f"missing key {key!r}, wanted with the shape {their_shape(core, wanted[name])}: {assumed}")
    return ours


def translated(key: str, names: Mapping[str, str]) -> str | None:
    """The key of a parameter, or of a module's weight or bias, in the other language."""
    module, _, parameter = key.rpartition(".")
    return names.get(key) or (f"{names[module]}.{parameter}" if module in names else None)


def their_shape(core: str, ours: Tensor) -> list[int]:
    """Theirs of the positions is [1, length, features] and of the frequencies [1, width]; ours are without the 1."""
    return [1] * core.endswith((".pos_emb.z", ".freq")) + list(ours.shape)


def check_derived(key: str, x: Tensor, config: PreTrainedConfig) -> None:
    """The times and decays of a filter's window, which they save and we compute: a checkpoint must have the same."""
    if key.endswith(".t"):
        expected = torch.linspace(0, 1, config.max_position_embeddings)[None, :, None]
    else:
        target = math.log(HyenaFilter.TARGET)
        expected = torch.linspace(target / HyenaFilter.SLOW, target / HyenaFilter.FAST, config.hidden_size)[None, None]
    rounding = 8 * torch.finfo(x.dtype).eps * expected.abs().max().item()
    if x.shape != expected.shape or not torch.allclose(x.float().cpu(), expected, rtol=0, atol=rounding):
        raise ValueError(
            f"{key!r} must be the window's {list(expected.shape)} for max_position_embeddings = "
            f"{config.max_position_embeddings}, got {list(x.shape)}, or other values: other windows are not here"
        )


# --- Tokenizer -------------------------------------------------------------------------------------------------------

SPECIAL = ["[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]"]


def dna_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """HyenaDNA's: a token a character of ACGTN, [UNK] for any other, [SEP] at the end, padding on the left."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *"ACGTN"])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    characters.decoder = decoders.Fuse()
    characters.post_processor = processors.TemplateProcessing("$A [SEP]", "$A [SEP] $B:1 [SEP]:1", [("[SEP]", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        model_max_length=max_length,
        padding_side="left",
        bos_token="[BOS]",
        eos_token="[SEP]",
        sep_token="[SEP]",
        cls_token="[CLS]",
        pad_token="[PAD]",
        mask_token="[MASK]",
        unk_token="[UNK]",
    )
