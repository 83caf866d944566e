"""What the presets of hybrids remember, in bytes a sequence, beside a Transformer of the same width, depth and heads.

    python -m benchmarks.hybrid_states    # the table of docs/hybrids.md

Nothing is computed and nothing is allocated: the models are as large as published, on PyTorch's "meta" device.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import DynamicCache

from hf_linear import LinearHybridConfig, LinearHybridModel
from hf_linear.cache import cache_bytes

LENGTHS = {"4K": 4096, "32K": 32768, "256K": 262144}


@torch.no_grad()
def bytes_after(config: LinearHybridConfig, lengths: Iterable[int]) -> list[int]:
    """Bytes in the cache of a model in bfloat16 after so many tokens of one sequence, lengths in rising order.

    The first token makes the states, which stay as large as they are. The others make the keys longer by the cache's own
    layers: that of a sliding window keeps what the window covers.
    """
    sizes, seen = [], 1
    # MLPs remember nothing, and are most of what there would be to make.
    mlps = ["dense" if mixer == "shared_attention" else "none" for mixer in config.mixers]
    config = LinearHybridConfig(**{**config.to_dict(), "mlp_pattern": None, "mlp_layer_types": mlps})
    with torch.device("meta"):
        model = LinearHybridModel(config).to(torch.bfloat16)
        cache = model(torch.zeros(1, 1, dtype=torch.long), past_key_values=DynamicCache(config=config)).past_key_values
        attention = [i for i, kind in enumerate(config.layer_types) if kind != "linear_attention"]
        one = {i: cache.layers[i].keys for i in attention}
        for length in lengths:
            for i in attention:
                more = one[i].expand(-1, -1, length - seen, -1)
                cache.layers[i].update(more, more)
            seen = length
            sizes.append(cache_bytes(cache))
    return sizes


def transformer_like(config: LinearHybridConfig) -> LinearHybridConfig:
    """Attention to all tokens in every layer, all else the same."""
    plain = {"pattern": "A", "mixers": None, "layer_types": None, "mixer_options": None, "sliding_window": None}
    return LinearHybridConfig(**{**config.to_dict(), **plain})


def in_units(size: int) -> str:
    power = min(max(size.bit_length() - 1, 0) // 10, 3)
    number = size / 1024**power
    return f"{float(f'{number:.3g}'):g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def table() -> str:
    """A row a preset, from one period of its pattern: every other is the same."""
    rows = [["preset", "a token", "fixed", *LENGTHS, *(f"Transformer, {length}" for length in LENGTHS)]]
    rows.append(["---"] * len(rows[0]))
    for name in LinearHybridConfig.presets:
        whole = LinearHybridConfig.from_preset(name)
        period = LinearHybridConfig.from_preset(name, num_hidden_layers=len(whole.pattern))
        repeats = whole.num_hidden_layers // period.num_hidden_layers
        sizes, plain = (
            [repeats * size for size in bytes_after(config, LENGTHS.values())] for config in (period, transformer_like(period))
        )
        a_token = (sizes[1] - sizes[0]) // (LENGTHS["32K"] - LENGTHS["4K"])
        fixed = sizes[0] - a_token * LENGTHS["4K"]
        rows.append([f"`{name}`", *map(in_units, [a_token, fixed, *sizes, *plain])])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    print(table())
