"""GLA and RetNet as flash-linear-attention 0.6.0 writes them. Most of its fields and keys are ours."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.core_model_loading import WeightTransform

from hf_linear.checkpoints.layout import Layout, renamings

# Fields of speed and of training alone: kernels, fusions, and a penalty on large logits.
WITHOUT_EFFECT = {"attn_mode", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "use_l2warp"}


class FLA(Layout):
    name = "fla"
    title = "flash-linear-attention's (model.layers.0.attn_norm...)"

    def has_config(self, fields: Mapping[str, Any]) -> bool:
        return "mixers" not in fields and not WITHOUT_EFFECT.isdisjoint(fields)

    def read_config(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in fields.items() if name not in WITHOUT_EFFECT}

    def write_config(self, config: PreTrainedConfig) -> dict[str, Any]:
        return config.to_dict()

    def has_weights(self, keys: Collection[str]) -> bool:
        return any(".attn_norm." in key for key in keys)

    def transforms(self, config: PreTrainedConfig) -> list[WeightTransform]:
        norms = {".mixer.g_norm.": ".mixer.norm."}
        if config.use_output_gate:  # what gates the output in the same kernel is called otherwise, and that is the default
            norms[".mixer.g_norm_swish_gate."] = ".mixer.norm."
        return renamings({"embeddings.": "embed_tokens.", ".attn_norm.": ".mixer_norm.", ".attn.": ".mixer.", **norms})
