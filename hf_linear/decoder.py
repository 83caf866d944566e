"""The one decoder of all families: x + mixer(norm(x)), x + mlp(norm(x)), with a mixer of its own for every layer.

A family is a config, a choice of mixers and names. What differs between families is a class attribute or a config field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from hf_linear.cache import CACHE_NAME, prepare_cache, takes_cache_by_either_name
from hf_linear.checkpoints.layout import (
    check_derived,
    check_known,
    check_loaded,
    layout_of_weights,
    read_keys,
)
from hf_linear.config import LinearConfig
from hf_linear.inputs import (
    PREFIX,
    check_inputs,
    check_mask,
    check_packed,
    check_window,
    document_boundaries,
    follows_prefix,
    padding_mask,
    positions,
)
from hf_linear.mixers import MIXERS
from hf_linear.mixers.attention import Attention, Product
from hf_linear.mixers.hyena import HyenaFilter
from hf_linear.mixers.mamba import Mamba
from hf_linear.mixers.mamba2 import Mamba2
from hf_linear.mixers.shared_attention import SharedAttention, SharedBlock, SharedMLP
from hf_linear.modules.loss import linear_cross_entropy, share_of_labels
from hf_linear.modules.mlp import GatedMLP
from hf_linear.modules.moe import Experts, SparseMLP, TopKRouter, load_balancing_loss
from hf_linear.modules.norm import RMSNorm, add_norm


class DecoderLayer(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x)), where there is an MLP."""

    def __init__(
        self, config: LinearConfig, layer_idx: int, mixer: str, norm: type[nn.Module], mlp: type[nn.Module] | None
    ) -> None:
        super().__init__()
        self.residual_multiplier = config.residual_multiplier
        self.mixer_norm = norm(config.hidden_size, eps=config.norm_eps)
        self.mixer = MIXERS[mixer](config.for_mixer(mixer), layer_idx)
        self.mlp_norm = None if mlp is None else norm(config.hidden_size, eps=config.norm_eps)
        self.mlp = None if mlp is None else mlp(config)

    def forward(self, x: Tensor, shared: Product | None = None, **kwargs: Any) -> Tensor:
        site = {} if shared is None else {"shared": shared}
        x, normed = add_norm(x, None, self.mixer_norm)
        y, _ = self.mixer(normed, past_key_values=kwargs.pop(CACHE_NAME, None), **site, **kwargs)
        y = times(y, self.residual_multiplier)
        if self.mlp is None or self.mlp_norm is None:
            return x + y
        x, normed = add_norm(x, y, self.mlp_norm)
        return x + times(self.mlp(normed, **site), self.residual_multiplier)


def times(x: Tensor, factor: float) -> Tensor:
    """x * factor, without a pass for nothing."""
    return x if factor == 1 else x * factor


class LinearPreTrainedModel(PreTrainedModel):
    """Weights, loading and saving."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["DecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _is_stateful = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": DecoderLayer,
        "attentions": OutputRecorder(Attention, index=1),
        "router_logits": OutputRecorder(TopKRouter, index=0),
    }
    norm_class: ClassVar[type[nn.Module]] = RMSNorm
    mlp_class: ClassVar[type[nn.Module]] = GatedMLP

    def __init__(self, config: LinearConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        states = [MIXERS[name].cache_layer for name in config.mixers or []]
        self._can_compile_fullgraph = all(state is None or state.is_compileable for state in states)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, HyenaFilter):
            init.copy_(module.z, module.positions())
            init.constant_(module.freq, module.config.activation_freq)
            init.normal_(module.skip)
        elif isinstance(module, Mamba):
            init.copy_(module.A_log, module.initial_A_log(module.D.numel()))
            init.ones_(module.D)
            init.copy_(module.dt_proj.bias, module.initial_dt_bias())
        elif isinstance(module, Mamba2):
            init.copy_(module.A_log, module.initial_A_log())
            init.ones_(module.D)
            init.copy_(module.dt_bias, module.initial_dt_bias())
        elif isinstance(module, Experts):  # parameters that are no Linear's
            init.normal_(module.gate_up_proj, std=self.config.initializer_range)
            init.normal_(module.down_proj, std=self.config.initializer_range)

    @staticmethod
    def _load_pretrained_model(
        model: LinearPreTrainedModel,
        state_dict: Mapping[str, Tensor] | None,
        checkpoint_files: list[str] | None,
        load_config: LoadStateDictConfig,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As everywhere; a checkpoint in a layout of `config.layouts` by that layout's table, and then without exceptions."""
        keys = read_keys(state_dict, checkpoint_files)
        layout = layout_of_weights(model.config.layouts, keys)
        transforms = layout.transforms(model.config) if layout else []
        load_config = dataclasses.replace(load_config, weight_mapping=[*(load_config.weight_mapping or []), *transforms])
        loaded = PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        if layout is None:
            check_known(model.config.layouts, keys, loaded[0])
        else:
            check_derived(layout, model.config, keys, state_dict, checkpoint_files)
            check_loaded(layout, transforms, model, keys, loaded[0])
            # Transformers would save by the table that it loaded by: we save our own layout.
            model._weight_conversions = [used for used in model._weight_conversions if used not in transforms]
        return loaded

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # Transformers looks for the interface in the source of a family's file: it is in modules/moe.py


class LinearModel(LinearPreTrainedModel):
    """Token embedding, decoder layers, final norm."""

    def __init__(self, config: LinearConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        norm = partial(self.norm_class, config.hidden_size, eps=config.norm_eps)
        self.embed_norm = norm() if config.use_embedding_norm else nn.Identity()
        kinds = zip(config.mixers or [], config.mlp_layer_types or [], strict=True)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, mixer, self.norm_class, self.mlp_of(mixer, mlp)) for i, (mixer, mlp) in enumerate(kinds)
        )
        self.shared_block = SharedBlock(config) if "shared_attention" in (config.mixers or []) else None
        self.norm = norm()
        self.gradient_checkpointing = False
        self._keep_in_fp32_modules_strict = {name for m in config.mixers or [] for name in MIXERS[m].float32_modules}
        self.post_init()

    def mlp_of(self, mixer: str, kind: str) -> type[nn.Module] | None:
        """What a layer has behind its mixer, which brings its own where both are shared."""
        if kind == "none":
            return None
        if kind == "sparse":
            return SparseMLP
        return SharedMLP if mixer == "shared_attention" else self.mlp_class

    @takes_cache_by_either_name
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Hidden states of a batch, of a padded batch, or of documents packed in one row.

        Args:
            input_ids: [B, T], or `inputs_embeds` [B, T, hidden_size] in its place.
            attention_mask: [B, past + T] with 0 on padding, or what `generate` prepared from it.
            position_ids: [B or 1, T]. Without a mask and a cache, positions that restart mean packed documents (B = 1), as
                `DataCollatorWithFlattening` emits them; so does `cu_seq_lens_q`, their boundaries.
            past_key_values: a cache of this model; also taken as `cache`. A packed row has none.
        """
        if (input_ids is None) == (inputs_embeds is None):
            got, remedy = ("neither", "add one") if input_ids is None else ("both", "leave one out")
            raise ValueError(f"give exactly one of input_ids and inputs_embeds, got {got}: {remedy}")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        check_inputs(x, self.config.hidden_size, position_ids)
        mixers = [layer.mixer for layer in self.layers]
        if past_key_values is not None:
            past_key_values = prepare_cache(past_key_values, mixers)
        check_mask(x, attention_mask, past_key_values)
        cu_seqlens = document_boundaries(x, attention_mask, position_ids, kwargs)
        if cu_seqlens is not None:
            check_packed(x, attention_mask, past_key_values, cu_seqlens)
        elif use_cache and past_key_values is None:
            past_key_values = prepare_cache(DynamicCache(config=self.config), mixers)
        if position_ids is None:
            position_ids = positions(x, attention_mask, cu_seqlens, past_key_values)
        # Attention's mask tells documents apart by positions: by those of the boundaries, whatever the caller's are.
        places = position_ids if cu_seqlens is None else positions(x, None, cu_seqlens, None)
        masks = self.make_masks(x, attention_mask, places, past_key_values)
        x = self.embed_norm(times(x, self.config.embedding_multiplier))
        # A method, not the block: with a layer's inputs, what has parameters would be moved between devices.
        shared = None if self.shared_block is None else self.shared_block.product
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            x = layer(
                x,
                attention_mask=masks[kind],
                position_ids=position_ids,
                cu_seqlens=cu_seqlens,
                shared=shared if isinstance(layer.mixer, SharedAttention) else None,
                **{CACHE_NAME: past_key_values},
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(x), **{CACHE_NAME: past_key_values})

    def make_masks(
        self, x: Tensor, attention_mask: Tensor | dict | None, position_ids: Tensor, past_key_values: Cache | None
    ) -> dict:
        """The mask of every layer type, each of a size that a cache layer of that type says itself."""
        if isinstance(attention_mask, dict):
            return attention_mask
        kinds = self.config.layer_types
        masks: dict[str, Any] = {}
        if "linear_attention" in kinds:
            masks["linear_attention"] = padding_mask(attention_mask, x.shape[1])
        arguments = {
            "config": self.config,
            "inputs_embeds": x,
            "attention_mask": attention_mask,
            CACHE_NAME: past_key_values,
            "position_ids": position_ids.expand(x.shape[0], -1),
        }
        if "full_attention" in kinds:
            layer_idx = kinds.index("full_attention")
            sdpa = self.config._attn_implementation == "sdpa"
            if sdpa and follows_prefix(attention_mask, x.shape[1], past_key_values, layer_idx):
                masks["full_attention"] = PREFIX
            else:
                masks["full_attention"] = create_causal_mask(**arguments, layer_idx=layer_idx)
        if "sliding_attention" in kinds:
            check_window(attention_mask, past_key_values, self.config.sliding_window)
            layer_idx = kinds.index("sliding_attention")
            masks["sliding_attention"] = create_sliding_window_causal_mask(**arguments, layer_idx=layer_idx)
        return masks


class LinearForCausalLM(LinearPreTrainedModel, GenerationMixin):
    """The decoder with a language-model head."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    model_class: ClassVar[type[LinearModel]]

    def __init__(self, config: LinearConfig):
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @takes_cache_by_either_name
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits [B, T, vocab_size], and the loss for `labels` [B, T] (-100 where none is wanted).

        In training, `config.fuse_linear_cross_entropy` gives the loss alone. `output_router_logits`, here or in the config,
        adds the load-balancing loss of sparse layers.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        loss = logits = aux_loss = None
        hidden_states = times(outputs.last_hidden_state, 1 / self.config.logits_scaling)
        known = {name: kwargs.get(name) for name in ("num_items_in_batch", "shift_labels")}
        if labels is not None and self.training and self.config.fuse_linear_cross_entropy:
            loss = linear_cross_entropy(hidden_states, self.lm_head, labels, **known)
        else:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, keep])
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if outputs.router_logits:
            aux_loss = self.load_balancing_loss(outputs, attention_mask)
            if loss is not None and labels is not None:
                loss = loss + self.config.router_aux_loss_coef * share_of_labels(labels, **known) * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    def load_balancing_loss(self, outputs: MoeModelOutputWithPast, attention_mask: Tensor | dict | None) -> Tensor:
        x = outputs.last_hidden_state
        routed = any(logits.requires_grad for logits in outputs.router_logits)
        if self.model.gradient_checkpointing and x.requires_grad and not routed:
            raise ValueError(
                "router logits must carry gradients for their loss to teach, got those of reentrant gradient checkpointing: "
                "pass gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        real = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 else None
        real = x.new_ones(x.shape[:2]) if real is None else real[:, -x.shape[1] :]
        return load_balancing_loss(outputs.router_logits, self.config.num_experts_per_tok, real)

    def create_masks_for_generate(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, **kwargs: Any
    ) -> dict:
        """What `generate` prepares outside a compiled step: the masks that the model would make itself."""
        cache = kwargs[CACHE_NAME]
        if position_ids is None:
            position_ids = positions(inputs_embeds, attention_mask, None, cache)
        return self.model.make_masks(inputs_embeds, attention_mask, position_ids, cache)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get(CACHE_NAME)
        if cache is not None:  # before the first forward: `generate` asks it for its length
            model_kwargs[CACHE_NAME] = prepare_cache(cache, [layer.mixer for layer in self.model.layers])


class LinearForSequenceClassification(GenericForSequenceClassification):
    """The decoder with a score for each row, read at its last real token."""


class LinearForTokenClassification(GenericForTokenClassification):
    """The decoder with a score for each token."""
