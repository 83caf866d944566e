"""The contract, split: any division of a sequence into calls with a cache gives what one call gives."""

import copy
from itertools import product

import pytest
import torch
from contract import STATIC, assert_equal_to_rounding, every_config, in_calls
from families import CONFIGS, PRESETS, ids, logits, new_cache, tiny_model
from transformers import StaticCache

SPLITS = {
    "one_call": [21],
    "token_by_token": [1] * 21,
    "13_1_7": [13, 1, 7],
    "1_20": [1, 20],
    "turns": [5, 1, 1, 6, 1, 1, 6],
    "over_chunks": [70, 1, 65],
}


@pytest.mark.parametrize("lengths", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("name, cache_of", [*product(CONFIGS, ["user", "model"]), *product(PRESETS, ["user"]), *STATIC])
def test_split(name, cache_of, lengths):
    """Any split into calls with a cache gives the logits of one call without."""
    model, x = tiny_model(name), ids(2, sum(lengths))
    if cache_of == "static":
        cache = StaticCache(config=model.config, max_cache_len=x.shape[1])
    else:
        cache = new_cache(model) if cache_of == "user" else None
    found, returned = in_calls(model, x, lengths, cache)
    assert cache is None or returned is cache
    assert_equal_to_rounding(found, logits(model, x))


@every_config
def test_snapshot_and_restore(name):
    """A copy of the cache keeps the past it was taken at; the cache and its copy go separate ways."""
    model, prompt, first, second = tiny_model(name), ids(2, 13), ids(2, 8, seed=2), ids(2, 8, seed=3)
    _, cache = in_calls(model, prompt, [13], new_cache(model))
    snapshot = copy.deepcopy(cache)
    one, _ = in_calls(model, first, [1, 6, 1], cache)
    other, _ = in_calls(model, second, [6, 1, 1], copy.deepcopy(snapshot))
    again, _ = in_calls(model, first, [8], snapshot)
    assert_equal_to_rounding(one, logits(model, torch.cat([prompt, first], 1))[:, 13:])
    assert_equal_to_rounding(other, logits(model, torch.cat([prompt, second], 1))[:, 13:])
    assert_equal_to_rounding(again, one)


@every_config
def test_split_of_embeddings(name):
    """`inputs_embeds` in place of `input_ids`, in one call and in several."""
    model, x = tiny_model(name), ids(2, 21)
    embeddings = model.get_input_embeddings()(x).detach()
    with torch.no_grad():
        first = model(inputs_embeds=embeddings[:, :13])
        rest = model(inputs_embeds=embeddings[:, 13:], past_key_values=first.past_key_values)
    assert_equal_to_rounding(torch.cat([first.logits, rest.logits], 1), logits(model, x))
