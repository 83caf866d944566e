"""The contract, padding: real tokens are what they are without it, on any side and with any cache."""

from itertools import product

import pytest
import torch
from contract import (
    STATIC,
    assert_equal_gradients,
    assert_equal_to_rounding,
    documents,
    every_config,
    every_model,
    gradients,
    in_calls,
    one_of_each,
    pad,
    weights_like,
)
from families import CONFIGS, SLIDING_WINDOW, ids, logits, new_cache, tiny_model
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

SIDES = ["left", "right", "both"]


@pytest.mark.parametrize("side", SIDES)
@every_model
def test_padding(name, side):
    """Real tokens have the logits and pass on the gradients that they have without padding."""
    model, rows = tiny_model(name), documents(1, 9, 17, 30)
    x, mask = pad(rows, side, 33)
    padded = model(x, attention_mask=mask, use_cache=False).logits
    assert padded.isfinite().all()
    objective = actual = 0.0
    for i, row in enumerate(rows):
        alone, real = model(row[None], use_cache=False).logits[0], padded[i][mask[i].bool()]
        assert_equal_to_rounding(real, alone, f"logits of row {i}")
        objective, actual = objective + (weights_like(alone) * alone).sum(), actual + (weights_like(alone) * real).sum()
    assert_equal_gradients(gradients(model, actual), gradients(model, objective))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float64], ids=str)
@one_of_each
def test_padding_mask_of_any_dtype(name, dtype):
    model = tiny_model(name)
    x, mask = pad(documents(4, 9), "left", 12)
    assert_equal_to_rounding(
        logits(model, x, attention_mask=mask.to(dtype))[mask.bool()], logits(model, x, attention_mask=mask)[mask.bool()]
    )


@every_config
def test_a_mask_that_hides_nothing_changes_nothing(name):
    model, x = tiny_model(name), ids(2, 21)
    assert_equal_to_rounding(logits(model, x, attention_mask=torch.ones_like(x)), logits(model, x))
    found, _ = in_calls(model, x, [9, 1, 11], mask=torch.ones_like(x))
    assert_equal_to_rounding(found, logits(model, x))


def expect_continuations(model: PreTrainedModel, rows: list[Tensor], more: Tensor, found: Tensor) -> None:
    for i, row in enumerate(rows):
        alone = logits(model, torch.cat([row, more[i]])[None])[:, len(row) :]
        assert_equal_to_rounding(found[i : i + 1], alone, f"logits after row {i}")


@pytest.mark.parametrize("lengths", [[8], [1] * 8, [3, 1, 4]], ids=["at_once", "token_by_token", "3_1_4"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name, cache_of", [*product(CONFIGS, ["user"]), *STATIC])
def test_cache_after_padding(name, side, lengths, cache_of):
    """The cache after a padded prompt leads on as that of the bare prompt does, whatever side the padding is on."""
    # A sliding window counts places in the cache, as Transformers makes it: it must reach past the padding inside it.
    window = {"sliding_window": 32} if name in SLIDING_WINDOW and side != "left" else {}
    model, rows, more = tiny_model(name, **window), documents(1, 9, 17), ids(3, 8, seed=2)
    x, mask = pad(rows, side, 19)
    mask = torch.cat([mask, torch.ones_like(more)], 1)
    cache = new_cache(model) if cache_of == "user" else StaticCache(config=model.config, max_cache_len=27)
    in_calls(model, x, [19], cache, mask[:, :19])
    found, _ = in_calls(model, more, lengths, cache, mask)
    expect_continuations(model, rows, more, found)


@pytest.mark.parametrize("side", SIDES)
@every_config
def test_padded_prompt_token_by_token(name, side):
    """A padded prompt fed token by token, with the mask that grows: rows start, and end, at different calls."""
    model, rows = tiny_model(name), documents(1, 9, 17)
    x, mask = pad(rows, side, 19)
    for lengths in ([1] * 19, [6, 1, 1, 11]):
        found, _ = in_calls(model, x, lengths, mask=mask)
        assert found.isfinite().all()
        for i, row in enumerate(rows):
            assert_equal_to_rounding(found[i][mask[i].bool()], logits(model, row[None])[0], f"logits of row {i}")
