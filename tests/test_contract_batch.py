"""The contract, batch: a row is what it is alone, also when the rows of a cache change."""

from collections.abc import Callable

import pytest
import torch
from contract import assert_equal_to_rounding, every_config, every_model, in_calls
from families import WITHOUT_HYENA, ids, logits, new_cache, tiny_model
from transformers import Cache, StaticCache


@every_model
def test_batch(name):
    """A row's logits do not depend on its neighbours."""
    model, x = tiny_model(name), ids(4, 70)
    together = logits(model, x)
    for i in range(4):
        assert_equal_to_rounding(together[i : i + 1], logits(model, x[i : i + 1]), f"logits of row {i}")


BATCH_CHANGES: dict[str, tuple[Callable[[Cache], None], list[int]]] = {
    "reordered": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "repeated": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "one_selected": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "two_selected": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
}


@pytest.mark.parametrize("change, rows", BATCH_CHANGES.values(), ids=BATCH_CHANGES)
@every_config
def test_cache_of_a_changed_batch(name, change, rows):
    model, prompt, more = tiny_model(name), ids(3, 13), ids(len(rows), 8, seed=2)
    _, cache = in_calls(model, prompt, [9, 4], new_cache(model))
    change(cache)
    found, _ = in_calls(model, more, [1, 6, 1], cache)
    assert_equal_to_rounding(found, logits(model, torch.cat([prompt[rows], more], 1))[:, 13:])


@pytest.mark.parametrize("name", WITHOUT_HYENA)
def test_static_cache_reordered_and_reset(name):
    model, prompt, more = tiny_model(name), ids(3, 13), ids(3, 8, seed=2)
    cache = StaticCache(config=model.config, max_cache_len=24)
    in_calls(model, prompt, [9, 4], cache)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    found, _ = in_calls(model, more, [1, 6, 1], cache)
    assert_equal_to_rounding(found, logits(model, torch.cat([prompt[[2, 0, 0]], more], 1))[:, 13:])
    cache.reset()
    found, _ = in_calls(model, more, [5, 1, 2], cache)
    assert_equal_to_rounding(found, logits(model, more))
