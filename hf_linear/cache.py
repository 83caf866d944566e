"""The state cache: the one file that knows the inside of Transformers' caches.

Transformers builds a cache from `config.layer_types`, with a `LinearAttentionLayer` for every recurrent layer. That layer does
not count tokens, forgets states that no convolution accompanies, and cannot be repeated for beam search. `StateLayer` can,
and `prepare_cache` puts it in the place of the fresh original, whichever cache class the user or `generate` chose.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPast

# What Transformers itself calls a cache in calls and outputs: "cache" from 5.24 on, "past_key_values" before.
CACHE_NAME = dataclasses.fields(BaseModelOutputWithPast)[1].name


def takes_cache_by_either_name(forward: Callable) -> Callable:
    """Let users of any Transformers call a model with `past_key_values=` or `cache=`."""

    @functools.wraps(forward)
    def renamed(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.pop("cache", None)
        if cache is not None:
            if kwargs.get("past_key_values") is not None:
                raise ValueError("a cache must be given once, got both past_key_values and cache: leave one out")
            kwargs["past_key_values"] = cache
        return forward(self, *args, **kwargs)

    return renamed


class StateLayer(LinearAttentionLayer, CacheLayerMixin):
    """The states of one mixer: named tensors whose first dimension is the batch.

    A state of unchanged shape is written in place, at a fixed address, as CUDA graphs need; not so while a gradient flows
    through it.
    """

    is_compileable = True
    is_croppable = False  # a recurrent state has forgotten what to go back to
    is_sliding = None  # neither True nor False: masks take their size from a layer of attention

    def __init__(self, mixer: str, static: bool = False, max_length: int = -1):
        LinearAttentionLayer.__init__(self)
        CacheLayerMixin.__init__(self)
        self.mixer, self.max_length = mixer, max_length
        # A compiled decoding step would be compiled anew for every value of a Python integer.
        self.seen_tokens: int | Tensor = torch.tensor(0) if static else 0

    @property
    def states(self) -> dict[str, Tensor]:
        return {
            name: states[0]
            for name, states in (("recurrent", self.recurrent_states), ("conv", self.conv_states))
            if states[0] is not None
        }

    def read(self, name: str) -> Tensor | None:
        """The state called "recurrent" or "conv", None before the first write."""
        return self.states.get(name) if self.has_previous_state[0] else None

    def write(self, tokens: int, **states: Tensor) -> None:
        """Keep the states that `tokens` more tokens lead to."""
        if self.has_previous_state[0] and self.states.keys() != states.keys():
            raise ValueError(
                f"the cache of {self.mixer} must hold the states {sorted(states)}, got {sorted(self.states)}: "
                "this is the cache of another model, pass DynamicCache(config=model.config) or one that this model returned"
            )
        if isinstance(self.seen_tokens, Tensor) and not self.has_previous_state[0]:
            self.seen_tokens = self.seen_tokens.to(next(iter(states.values())).device)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.seen_tokens)
        self.seen_tokens += tokens
        self.has_previous_state[0] = True
        for name, state in states.items():
            held = self.states.get(name)
            if held is None or held.shape != state.shape or held.requires_grad or state.requires_grad:
                self._put(name, state)
            elif held is not state:  # what a step has written in place is there already
                held.copy_(state)
        self.device = state.device

    def _put(self, name: str, state: Tensor) -> None:
        if name == "conv":
            self.conv_states[0], self.is_conv_states_initialized[0] = state, True
        else:
            self.recurrent_states[0], self.is_recurrent_states_initialized[0] = state, True
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(state)

    def update(self, key_states, value_states, *args, **kwargs):
        raise ValueError("a recurrent layer keeps a state, got keys and values: is the cache of another model?")

    def batch_repeat_interleave(self, repeats: int) -> None:
        for name, state in self.states.items():
            self._put(name, state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        for name, state in self.states.items():
            self._put(name, state[indices])

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        self.seen_tokens *= 0  # in place where it is a tensor

    def get_seq_length(self) -> int | Tensor:
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen_tokens + query_length, 0

    def get_max_length(self) -> int:
        return self.max_length


class HistoryLayer(StateLayer):
    """A state that grows along its last dimension, to at most twice the tokens: what an implicit long convolution remembers."""

    is_compileable = False

    def reset(self) -> None:
        super().reset()
        self.recurrent_states[0], self.is_recurrent_states_initialized[0] = None, False


def prepare_cache(cache: Cache, mixers: Sequence) -> Cache:
    """Give every mixer the cache layer it asks for; a cache that belongs to another model is an error.

    Args:
        cache: any cache that Transformers makes from this model's config, or one that went through here before.
        mixers: the mixer of each layer; `mixer.cache_layer` is a `StateLayer` class, None for attention.
    """
    if not isinstance(cache, Cache):
        raise ValueError(
            f"past_key_values must be a transformers Cache, got {type(cache).__name__}: pass DynamicCache(config=model.config)"
        )
    if not cache.layers and not any(mixer.cache_layer for mixer in mixers):
        return cache  # layers of attention alone are made as they are used
    if len(cache.layers) != len(mixers):
        raise ValueError(
            f"past_key_values must have the model's {len(mixers)} layers, got {len(cache.layers)}: "
            "pass DynamicCache(config=model.config) or the cache that this model returned"
        )
    for i, (layer, mixer) in enumerate(zip(cache.layers, mixers, strict=True)):
        wanted = mixer.cache_layer
        recurrent = isinstance(layer, LinearAttentionLayer)
        fresh = type(layer) is LinearAttentionLayer and not layer.has_previous_state[0]
        name, static = type(mixer).__name__, isinstance(cache, StaticCache)
        if wanted is not None and static and not wanted.is_compileable:
            raise ValueError(
                f"past_key_values must be a DynamicCache for {name}, whose state grows, got {type(cache).__name__}: "
                "pass DynamicCache(config=model.config), or none"
            )
        if wanted is not None and fresh:
            cache.layers[i] = wanted(name, static=static, **mixer.cache_options)
        elif recurrent != (wanted is not None) or (wanted is not None and getattr(layer, "mixer", None) != name):
            raise ValueError(
                f"past_key_values.layers[{i}] must fit {name}, got that of {getattr(layer, 'mixer', type(layer).__name__)}: "
                "this is the cache of another model, pass DynamicCache(config=model.config) or one that this model returned"
            )
    return cache


def check_keys(cache: Cache, layer_idx: int, k: Tensor) -> None:
    """The keys that a layer of attention holds are of the batch, heads, width and dtype of its new ones, [B, H, T, D]."""
    held = cache.layers[layer_idx].keys if layer_idx < len(cache.layers) else None
    if held is None or held.dim() != 4:
        return  # nothing yet
    got, wanted = (([x.shape[i] for i in (0, 1, 3)], x.dtype) for x in (held, k))
    if got != wanted:
        raise ValueError(
            f"past_key_values.layers[{layer_idx}] must hold keys of [B, H, D] = {wanted[0]} in {wanted[1]}, got {got[0]} in "
            f"{got[1]}: this is the cache of another model or batch, pass DynamicCache(config=model.config)"
        )


def cache_bytes(cache: Cache) -> int:
    """Bytes that a model keeps of its sequences: the states of recurrent layers, the keys and values of attention."""
    held = [layer.states.values() if isinstance(layer, StateLayer) else (layer.keys, layer.values) for layer in cache.layers]
    return sum(x.nbytes for tensors in held for x in tensors)
