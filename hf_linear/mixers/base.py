"""What recurrent mixers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig

from hf_linear.cache import StateLayer
from hf_linear.ops import recurrent_step
from hf_linear.ops.dispatch import needs_gradient


class RecurrentMixer(nn.Module):
    """A mixer whose past is a state."""

    layer_type = "linear_attention"
    cache_layer: type[StateLayer] | None = StateLayer
    float32_modules: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.cache_options: dict[str, int] = {}

    def state(self, past_key_values: Cache | None) -> StateLayer | None:
        return None if past_key_values is None else past_key_values.layers[self.layer_idx]

    @staticmethod
    def steps(state: Tensor | None, T: int, *inputs: Tensor | None) -> bool:
        """Whether a token moves the state on in place: one does, unless it belongs to a graph or the state does."""
        return state is not None and T == 1 and not (state.requires_grad or needs_gradient(*inputs))

    @classmethod
    def attend(
        cls,
        op: Callable,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        cache: StateLayer | None,
        cu_seqlens: Tensor | None,
        scale: float | None = None,
        /,
        **states: Tensor,
    ) -> Tensor:
        """o of `op`, from the cache's recurrent state and on to the next, which is kept together with the other `states`."""
        state = None if cache is None else cache.read("recurrent")
        if state is not None and cls.steps(state, q.shape[1], q, k, v, g):
            o, state = recurrent_step(q, k, v, g, state, scale=scale)
        else:
            o, state = op(q, k, v, g, scale=scale, initial_state=state, cu_seqlens=cu_seqlens)
        if cache is not None:
            cache.write(q.shape[1], recurrent=state, **states)
        return o
