"""Hybrids of other libraries that are not read, each with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REASONS = {
    "zamba": "its shared block also reads the token embeddings and feeds the Mamba layer behind it",
    "zamba2": "its shared block also reads the token embeddings and feeds the Mamba layer behind it",
    "falcon_h1": "its layers mix by Mamba-2 and by attention at once",
    "nemotron_h": "its MLPs and its experts are layers of their own",
    "minimax": "its lightning attention has no rotation and decays of its own",
    "qwen3_next": "its linear layers are gated delta rules",
    "recurrent_gemma": "its linear layers are gated linear recurrent units",
}


def check_model_type(fields: Mapping[str, Any], ours: str) -> None:
    """A config.json that is neither ours nor in a layout that we read is an error: nothing of it is guessed."""
    kind = fields.get("model_type", ours)
    if kind != ours:
        why = REASONS.get(kind, "nothing here says how its layers are ours")
        raise ValueError(
            f"model_type must be {ours!r} or that of a layout in docs/checkpoints.md, got {kind!r}, and {why}: "
            "AutoModelForCausalLM opens it"
        )
