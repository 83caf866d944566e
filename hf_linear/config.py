"""The fields that every family's config shares, and what must hold between them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.activations import ACT2FN

from hf_linear.checkpoints.layout import Layout, layout_of_config
from hf_linear.mixers import MIXERS
from hf_linear.modules.rotary import ROPE_TYPES


class LinearConfig(PreTrainedConfig):
    """The fields that every family shares; a family adds those of its mixer.

    Args:
        intermediate_size: width of the MLP; None for hidden_size * hidden_ratio * 2 / 3 rounded up to a multiple of 256.
        num_kv_heads: key-value heads; None for num_heads.
        head_dim: width of an attention head; None for hidden_size / num_heads.
        attention_output_gate: multiply what attention's heads give by sigmoid(W x).
        use_qk_norm: normalise the heads of attention's queries and keys.
        attention_multiplier: what attention's scores are multiplied by; None for head_dim ** -0.5.
        residual_multiplier: what mixers and MLPs give is multiplied by before it is added.
        logits_scaling: what the logits are divided by.
        rope_parameters: rotary positions of attention layers, as everywhere in Transformers; None for no positions.
        embedding_multiplier: what embeddings are multiplied by; sqrt(hidden_size) in models of fairseq.
        use_embedding_norm: normalise embeddings, once multiplied.
        sliding_window: tokens that a sliding attention layer sees.
        mixers: the mixer of each layer, by name; None for the family's own in every layer.
        layer_types: Transformers' words for the mixers; follows from `mixers`, and stands in for it when given alone.
        fuse_linear_cross_entropy: in training with labels, compute the loss without ever holding the logits of all tokens. The
            output then has none: Trainer needs them in evaluation alone, where they are there as ever.
        mlp_layer_types: "dense", "sparse" or "none" for each layer: an MLP, or a mixture of experts in its place, or neither,
            the mixer alone. None for dense layers, and for sparse ones where `num_experts` is given.
        num_experts: experts of a sparse layer; answers to `num_local_experts` too.
        num_experts_per_tok: experts that a token goes through.
        moe_intermediate_size: width of an expert; None for intermediate_size.
        norm_topk_prob: whether the weights of a token's experts add up to 1 (Mixtral), or are their probabilities among all
            (Jamba).
        num_shared_experts: experts that every token goes through besides.
        output_router_logits: return the routers' logits, and add the load-balancing loss to that of the labels.
        router_aux_loss_coef: what the load-balancing loss is multiplied by.
    """

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache", "aux_loss", "router_logits"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "num_local_experts": "num_experts",
    }
    mixer: ClassVar[str]
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    layouts: ClassVar[tuple[Layout, ...]] = ()  # of other libraries, read as they are
    # Fields of flash-linear-attention that are none of ours, each with the one value that means what our models compute.
    foreign: ClassVar[dict[str, Any]] = {"attn": None}

    vocab_size: int = 32000
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    hidden_ratio: float | int = 4
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    embedding_multiplier: float | int = 1.0
    use_embedding_norm: bool = False
    attention_bias: bool = False
    attention_output_gate: bool = False
    use_qk_norm: bool = False
    attention_multiplier: float | int | None = None
    residual_multiplier: float | int = 1.0
    logits_scaling: float | int = 1.0
    rope_parameters: dict | None = None
    sliding_window: int | None = None
    mixers: list[str] | None = None
    layer_types: list[str] | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    fuse_linear_cross_entropy: bool = False
    mlp_layer_types: list[str] | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    norm_topk_prob: bool = True
    num_shared_experts: int = 0
    output_router_logits: bool = False
    router_aux_loss_coef: float | int = 0.001

    def __post_init__(self, **kwargs: Any) -> None:
        self.check_names(kwargs)
        if self.num_kv_heads is None:
            self.num_kv_heads = self.num_heads
        self.check_divides("num_heads", self.num_heads, "hidden_size", self.hidden_size)
        self.check_divides("num_kv_heads", self.num_kv_heads, "num_heads", self.num_heads)
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_heads
        if self.intermediate_size is None:
            self.intermediate_size = -(-int(self.hidden_size * self.hidden_ratio * 2 / 3) // 256) * 256
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim", "intermediate_size", "max_position_embeddings")
        self.check_least(**dict.fromkeys(sizes, 1))
        self.check_choice("hidden_act", ACT2FN)
        if self.logits_scaling <= 0:
            raise ValueError(f"logits_scaling must be above 0, got {self.logits_scaling}: leave it out for no scaling")
        self.set_layers()
        self.set_experts()
        no_positions = self.rope_parameters is None and "rope_theta" not in kwargs and "rope_scaling" not in kwargs
        super().__post_init__(**kwargs)
        if no_positions:  # the base class reads None as its default rotary positions
            self.rope_parameters = None
        self.check_rope()

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As everywhere; a foreign layout of this family is read here already, or Transformers would warn of its model type."""
        fields, rest = super().get_config_dict(*args, **kwargs)
        layout = layout_of_config(cls.layouts, fields)
        ours = layout.read_config(fields) if layout else fields
        return ours if ours.get("model_type", cls.model_type) == cls.model_type else fields, rest

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> LinearConfig:
        """As everywhere; a config.json in a foreign layout gives the config of the family that it is here."""
        layout = layout_of_config(cls.layouts, config_dict)
        if layout is None:
            return super().from_dict(config_dict, **kwargs)
        fields = layout.read_config(config_dict)
        model_type = fields.get("model_type", cls.model_type)
        family = cls if model_type == cls.model_type else CONFIG_MAPPING[model_type]
        return family.from_dict(fields, **kwargs)

    @classmethod
    def known_mixers(cls) -> list[str]:
        """What `mixers` may name: the family's own, and attention, whose fields every config has."""
        return [cls.mixer, "attention", "sliding_attention"]

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> LinearConfig:
        """The config of a published shape, by name."""
        if name not in cls.presets:
            raise ValueError(
                f"preset of {cls.model_type} must be one of {sorted(cls.presets)}, got {name!r}: other shapes are set by fields"
            )
        return cls(**{**cls.presets[name], **overrides})

    def for_mixer(self, name: str) -> LinearConfig:
        """The config that a layer's mixer reads."""
        return self

    def check_names(self, extra: dict) -> None:
        """Transformers keeps unknown keywords as attributes; one that looks like a field is a slip of the pen."""
        fields = {field.name for field in dataclasses.fields(self)} | set(self.attribute_map)
        for name in extra:
            close = difflib.get_close_matches(name, fields, n=1, cutoff=0.85)
            if close and name not in fields:
                raise ValueError(f"{type(self).__name__} has no field {name!r}: did you mean {close[0]!r}?")
        for name, only in self.foreign.items():
            if extra.get(name, only) != only:
                raise ValueError(
                    f"{name} of {self.model_type} must be {only!r}, got {extra[name]!r}: this variant of "
                    "flash-linear-attention is not here; attention layers are named in `mixers`"
                )

    def check_divides(self, part_name: str, part: int, whole_name: str, whole: int) -> None:
        if part < 1 or whole < 1 or whole % part:
            raise ValueError(f"{part_name} must divide {whole_name} = {whole}, got {part}: change either")

    def check_least(self, **bounds: int) -> None:
        for name, bound in bounds.items():
            if getattr(self, name) < bound:
                raise ValueError(
                    f"{name} of {self.model_type} must be {bound} or more, got {getattr(self, name)}: "
                    "leave it out for the default"
                )

    def check_choice(self, name: str, choices: Collection) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(
                f"{name} of {self.model_type} must be one of {sorted(choices)}, got {value!r}: leave it out for the default"
            )

    def set_layers(self) -> None:
        """Fill `mixers` and `layer_types` from each other and check that they agree."""
        names = {
            "linear_attention": self.mixer,
            "full_attention": "attention",
            "sliding_attention": "sliding_attention",
        }
        if self.mixers is None:
            kinds = self.layer_types or ["linear_attention"] * self.num_hidden_layers
            unknown = sorted(set(kinds) - set(names))
            if unknown:
                raise ValueError(f"layer_types must be of {sorted(names)}, got {unknown}: name other layers in `mixers`")
            self.mixers = [names[kind] for kind in kinds]
        unknown = sorted(set(self.mixers) - set(self.known_mixers()))
        if unknown:
            raise ValueError(
                f"mixers of {self.model_type} must be of {sorted(self.known_mixers())}, got {unknown}: "
                f"a linear_hybrid takes any of {sorted(MIXERS)}"
            )
        if len(self.mixers) != self.num_hidden_layers:
            raise ValueError(
                f"mixers (or layer_types) must name one for each of num_hidden_layers = {self.num_hidden_layers}, "
                f"got {len(self.mixers)}: add the missing, or change num_hidden_layers"
            )
        layer_types = [MIXERS[name].layer_type for name in self.mixers]
        if self.layer_types not in (None, layer_types):
            raise ValueError(f"layer_types must be those of mixers, {layer_types}, got {self.layer_types}: leave one out")
        self.layer_types = layer_types
        if "sliding_attention" in self.mixers and (self.sliding_window or 0) < 1:
            raise ValueError(
                f"sliding_window must be 1 or more tokens for sliding_attention layers, got {self.sliding_window}: "
                "set it, or take attention layers"
            )

    def set_experts(self) -> None:
        """Fill `mlp_layer_types` and `moe_intermediate_size`, and check what sparse layers are made of."""
        if self.mlp_layer_types is None:
            self.mlp_layer_types = ["sparse" if self.num_experts else "dense"] * self.num_hidden_layers
        unknown = sorted(set(self.mlp_layer_types) - {"dense", "sparse", "none"})
        if unknown:
            raise ValueError(
                f"mlp_layer_types must be of ['dense', 'sparse', 'none'], got {unknown}: what mixes tokens is named in `mixers`"
            )
        if len(self.mlp_layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"mlp_layer_types must name one for each of num_hidden_layers = {self.num_hidden_layers}, "
                f"got {len(self.mlp_layer_types)}: add the missing, or change num_hidden_layers"
            )
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        self.check_least(num_experts=0, num_shared_experts=0, moe_intermediate_size=1, router_aux_loss_coef=0)
        if "sparse" not in self.mlp_layer_types:
            return
        if self.num_experts < 1:
            raise ValueError(
                f"num_experts must be 1 or more for sparse layers, got {self.num_experts}: "
                "set it, or make mlp_layer_types dense"
            )
        for name in ("hidden_size", "moe_intermediate_size"):
            if getattr(self, name) % 8:
                raise ValueError(
                    f"{name} must be a multiple of 8 for sparse layers, got {getattr(self, name)}: "
                    "grouped products read rows of 16 bytes, round it up"
                )
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok must be from 1 to num_experts = {self.num_experts}, got {self.num_experts_per_tok}: "
                "change either"
            )

    def validate(self) -> None:
        """Transformers' own checks, without the one that knows no layer that is a mixer alone: `set_experts` has it."""
        kinds, self.mlp_layer_types = self.mlp_layer_types, None
        super().validate()
        self.mlp_layer_types = kinds

    def check_rope(self) -> None:
        rope = self.rope_parameters
        if rope is None or set(self.layer_types or []) <= {"linear_attention"}:
            return
        if rope.get("rope_type") not in ROPE_TYPES:
            raise ValueError(
                f"rope_parameters must have a rope_type of {sorted(ROPE_TYPES)}, got {rope}: None is for no positions"
            )
        turned = int((self.head_dim or 0) * rope.get("partial_rotary_factor", 1.0))
        if turned < 2 or turned % 2:
            raise ValueError(
                f"rope_parameters must turn an even number of channels, got {turned} of head_dim = {self.head_dim}: "
                "change head_dim, or partial_rotary_factor"
            )
