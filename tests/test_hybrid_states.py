"""The bytes of state in docs/hybrids.md: counted without data, and the same as a model's that ran."""

from pathlib import Path

import pytest
import torch
from families import PRESETS, ids, tiny_config, tiny_model

from benchmarks.hybrid_states import bytes_after, in_units, table, transformer_like
from hf_linear.cache import cache_bytes

DOCS = Path(__file__).parent.parent / "docs" / "hybrids.md"


@pytest.mark.parametrize("name", [*PRESETS, "hybrid-shared"])
def test_is_the_cache_of_a_model_that_ran(name):
    lengths = [1, 5, 21]  # one, and shorter and longer than Samba's window of 8
    found = bytes_after(tiny_config(name), lengths)
    model = tiny_model(name, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = [cache_bytes(model(ids(1, n), use_cache=True).past_key_values) for n in lengths]
    assert found == expected


def test_a_transformer_keeps_all_keys_and_values():
    config = transformer_like(tiny_config("jamba"))
    assert set(config.mixers) == {"attention"} and config.mlp_layer_types == tiny_config("jamba").mlp_layer_types
    # k and v, 8 layers, 1 head of 16 channels, 2 bytes
    assert bytes_after(config, [10, 30]) == [2 * 8 * 16 * 2 * 10, 2 * 8 * 16 * 2 * 30]


def test_the_table_of_the_docs():
    assert table() in DOCS.read_text()


def test_units():
    assert [in_units(x) for x in (0, 1000, 1536, 5 * 2**20, 2**35)] == ["0 B", "1000 B", "1.5 KiB", "5 MiB", "32 GiB"]
