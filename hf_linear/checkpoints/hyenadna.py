"""Hyena as HyenaDNA and safari write it: the fields of their configs, the keys of their weights, the DNA tokenizer.

Their checkpoints share one core of keys, `backbone.layers.0.mixer.in_proj.weight`, and differ in what stands before it:
"hyena." in the -hf repositories, "model." where Lightning saved them, nothing in a state dict of safari's model. A model that
was trained with gradient checkpointing has `mixer.layer.` and `mlp.layer.` for `mixer.` and `mlp.`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerFast
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform

from hf_linear.checkpoints.fields import Fields, check_said, kept
from hf_linear.checkpoints.layout import Layout, renamings
from hf_linear.mixers.hyena import HyenaFilter

# --- Configs ---------------------------------------------------------------------------------------------------------

# Of an -hf repository and of the originals' arguments, where the model's and those under `layer` are taken together.
NAMES = {
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
    "d_inner": "intermediate_size",
    "vocab_size": "vocab_size",
    "layer_norm_epsilon": "norm_eps",
    "initializer_range": "initializer_range",
    "emb_dim": "filter_emb_dim",
    "filter_order": "filter_order",
    "short_filter_order": "short_filter_order",
    "num_inner_mlps": "num_inner_mlps",
    "train_freq": "train_freq",
}
REPOSITORY = Fields(
    of="HyenaDNA",
    names=NAMES | {"max_seq_len": "max_position_embeddings", "activation_freq": "activation_freq"},
    only={"hyena_order": 2},
    without_effect=frozenset(
        {
            "architectures",
            "auto_map",
            "embed_dropout",
            "hyena_dropout",
            "hyena_filter_dropout",
            "model_type",
            "pad_vocab_size_multiple",
            "transformers_version",
            "use_bias",
        }
    ),
)
ORIGINAL = Fields(
    of="HyenaDNA or safari",
    names=NAMES
    | {"l_max": "max_position_embeddings", "w": "activation_freq"}
    | {"modulate": "filter_modulate", "shift": "filter_shift", "normalized": "filter_normalize"},
    only={
        "order": 2,  # of a higher one, the originals disagree about the filters' channels
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
    },
    without_effect=frozenset(
        {
            "_name_",
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
            "initializer_cfg",
            "jit_filter",
            "layer",
            "local_order",  # which no code reads
            "lr",
            "lr_pos_emb",
            "modulation_lr",
            "pad_vocab_size_multiple",
            "resid_dropout",
            "residual_in_fp32",
            "return_hidden_state",
            "return_state",
            "wd",
        }
    ),
)
DNA_TOKENS = {"pad_token_id": 4, "bos_token_id": 2, "eos_token_id": 1}  # [PAD], [BOS], [SEP]


def repository_fields(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Ours for the config.json of an -hf repository; its other fields (`id2label`, ...) are Transformers' own and are kept."""
    ours, rest = REPOSITORY.read(theirs)
    defaults = {"filter_shift": 0.05, "train_filter_positions": False, "tie_word_embeddings": False, **DNA_TOKENS}
    return completed(REPOSITORY, {**defaults, **rest, **ours, "model_type": "hyena"}, theirs.get("pad_vocab_size_multiple", 8))


def original_fields(theirs: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """Ours for the arguments of an original model; `defaults` are fields of ours that these leave open."""
    theirs = {**theirs, **theirs.get("layer", {})}
    ours, rest = ORIGINAL.read(theirs)
    if rest:
        raise ValueError(f"a config of {ORIGINAL.of} must have known fields, got {sorted(rest)}: take out what has no effect")
    known = {"filter_emb_dim": 3, "activation_freq": 1, "filter_order": 64, "tie_word_embeddings": True}
    known["train_filter_positions"] = theirs.get("lr_pos_emb", 1e-5) != 0
    return completed(ORIGINAL, {**known, **defaults, **ours}, theirs.get("pad_vocab_size_multiple", 1))


def completed(fields: Fields, ours: dict[str, Any], vocab_multiple: int) -> dict[str, Any]:
    """With the defaults that both have, and what follows from other fields."""
    for name, field in fields.names.items():
        if field in ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings") and field not in ours:
            raise ValueError(f"a config of {fields.of} must have {name}, got none: is it another model's?")
    ours = {"short_filter_order": 3, "num_inner_mlps": 2} | ours
    if ours.get("intermediate_size") is None:
        ours["intermediate_size"] = 4 * ours["hidden_size"]
    ours["vocab_size"] = -(-ours["vocab_size"] // vocab_multiple) * vocab_multiple  # the embedding has rows that no token uses
    return ours


# --- Weights ---------------------------------------------------------------------------------------------------------


class OneTensor(ConversionOps):
    """[1, ...] under one name or under several, all the same, to [...]; written under the first."""

    def __init__(self, backwards: bool = False):
        self.backwards = backwards

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        several = [x for tensors in input_dict.values() for x in (tensors if isinstance(tensors, list) else [tensors])]
        if any(not torch.equal(x, several[0]) for x in several[1:]):
            raise ValueError(f"{sorted(input_dict)} must be one tensor, got some that differ")
        return {target_patterns[0]: several[0][None] if self.backwards else several[0].squeeze(0)}

    @property
    def reverse_op(self) -> ConversionOps:
        return OneTensor(not self.backwards)


class Original(Layout):
    """A plain state dict of a model; what `prefix` names stands before every key."""

    title = "a plain state dict of HyenaDNA or safari (backbone...)"
    prefix = ""

    def has_weights(self, keys: Collection[str]) -> bool:
        return any(key.startswith(f"{self.prefix}backbone.") for key in keys)

    def transforms(self, config: PreTrainedConfig) -> list[WeightTransform]:
        theirs, ours = ".mixer.filter_fn.", ".mixer.implicit_filter."
        last = config.num_inner_mlps + 1  # their sequence of layers: Linear, sine, Linear, sine, ..., Linear
        names = {
            f"^{self.prefix}backbone.embeddings.word_embeddings.": "model.embed_tokens.",
            f"^{self.prefix}backbone.layers.": "model.layers.",
            f"^{self.prefix}backbone.ln_f.": "model.norm.",
            ".norm1.": ".mixer_norm.",
            ".norm2.": ".mlp_norm.",
            ".mixer.(?:layer.|)": ".mixer.",  # read with `layer.` or without, written without
            ".mlp.(?:layer.|)": ".mlp.",
            f"{theirs}bias": f"{ours}skip",
            **{f"{theirs}implicit_filter.{2 * i}.": f"{ours}layers.{i}." for i in range(last)},
            f"{theirs}implicit_filter.{2 * last}.": f"{ours}out.",
        }
        sines = [f"{theirs}implicit_filter.{2 * i + 1}.freq" for i in range(last)]  # one serves all layers
        return [
            *renamings(names),
            WeightConverter(sines, f"{ours}freq", [OneTensor()]),
            WeightConverter(f"{theirs}pos_emb.z", f"{ours}z", [OneTensor()]),
        ]

    def derived(self, config: PreTrainedConfig) -> dict[str, Tensor]:
        """The times and decays of a filter's window."""
        target = math.log(HyenaFilter.TARGET)
        window: dict[str, Tensor] = {}
        for i in range(config.num_hidden_layers):
            filter_fn = f"model.layers.{i}.mixer.filter_fn."
            window[f"{filter_fn}pos_emb.t"] = torch.linspace(0, 1, config.max_position_embeddings)[None, :, None]
            decays = torch.linspace(target / HyenaFilter.SLOW, target / HyenaFilter.FAST, config.hidden_size)
            window[f"{filter_fn}modulation.deltas"] = decays[None, None]
        return window


class Lightning(Original):
    """weights.ckpt of HyenaDNA and safari."""

    title = "a Lightning checkpoint of HyenaDNA or safari (model.backbone...)"
    prefix = "model."

    def transforms(self, config: PreTrainedConfig) -> list[WeightTransform]:
        return [*renamings({"^model.lm_head.": "lm_head."}), *super().transforms(config)]


class HyenaDNA(Original):
    """The -hf repositories of LongSafari."""

    model_type = "hyenadna"
    name = "hyenadna"
    title = "an -hf repository of HyenaDNA (hyena.backbone...)"
    prefix = "hyena."

    def has_config(self, fields: Mapping[str, Any]) -> bool:
        return fields.get("model_type") == self.model_type

    def read_config(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        return repository_fields(fields)

    def write_config(self, config: PreTrainedConfig) -> dict[str, Any]:
        fields = kept(config) | REPOSITORY.write(config)
        fields |= {"model_type": self.model_type, "architectures": ["HyenaDNAForCausalLM"], "pad_vocab_size_multiple": 1}
        check_said(REPOSITORY.of, config, self.read_config(fields))
        return fields


LAYOUTS: tuple[Layout, ...] = (HyenaDNA(), Lightning(), Original())


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
