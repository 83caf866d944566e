"""What recurrent mixers share."""

from __future__ import annotations

from typing import ClassVar

from torch import nn
from transformers import Cache, PreTrainedConfig

from hf_linear.cache import StateLayer


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
