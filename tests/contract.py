"""What the tests of the contract share: the five invariances of docs/design.md, section 3, over every tiny config.

Everything runs in float64, so that an error of the algorithm cannot hide behind rounding.
"""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from families import CONFIGS, ONE_OF_EACH, PRESETS, WITHOUT_HYENA, ids
from torch import Tensor
from transformers import Cache, PreTrainedModel

# Logits are of order 1, float64 rounds at 1e-16 and the filters of Hyena magnify that by their sines to 1e-12. One token
# misplaced, forgotten or counted twice moves some logit by 1e-3 or more in every one of these models.
ROUNDING = 1e-10

every_config = pytest.mark.parametrize("name", CONFIGS)
every_model = pytest.mark.parametrize("name", [*CONFIGS, *PRESETS])
one_of_each = pytest.mark.parametrize("name", ONE_OF_EACH)
# The state of a Hyena layer grows, so a static cache cannot hold it: generate says so, see test_errors.
STATIC = [(name, "static") for name in WITHOUT_HYENA]


def assert_equal_to_rounding(actual: Tensor, expected: Tensor, what: str = "logits") -> None:
    assert actual.shape == expected.shape, what
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error <= ROUNDING, f"{what} differ by {error:.1e} of their largest"  # NaN fails too


def gradients(model: PreTrainedModel, objective: Tensor) -> dict[str, Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(objective, list(trained.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(trained.items(), found, strict=True)}


def assert_equal_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, gradient in expected.items():
        assert_equal_to_rounding(actual[name], gradient, f"gradients of {name}")


def weights_like(x: Tensor, seed: int = 5) -> Tensor:
    """Random weights of a sum of logits: an objective in which every logit counts."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


def logits_and_gradients(model: PreTrainedModel, call: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    found = call()
    return found.detach(), gradients(model, (weights_like(found) * found).sum())


def in_calls(
    model: PreTrainedModel, x: Tensor, lengths: list[int], cache: Cache | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Cache]:
    """Logits of `x` given in calls of these lengths, and the cache. Without a cache the first call makes one.

    `mask` is the one of the last call; the others get its beginning.
    """
    assert sum(lengths) == x.shape[1]
    ends = torch.tensor(lengths).cumsum(0) - x.shape[1]
    found, seen = [], []
    for part, end in zip(x.split(lengths, dim=1), ends.tolist(), strict=True):
        now = None if mask is None else mask[:, : mask.shape[1] + end]
        with torch.no_grad():
            output = model(part, attention_mask=now, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
        seen.append(int(cache.get_seq_length()))
    assert [b - a for a, b in pairwise(seen)] == lengths[1:]
    return torch.cat(found, 1), cache


def pad(rows: list[Tensor], side: str, width: int) -> tuple[Tensor, Tensor]:
    """Rows [T] in a batch [B, width] and its mask. Padding holds random tokens, so that none of them passes unnoticed."""
    x, mask = ids(len(rows), width, seed=9), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        free = width - len(row)
        start = {"left": free, "right": 0, "both": (free + 1) // 2}[side]
        x[i, start : start + len(row)] = row
        mask[i, start : start + len(row)] = 1
    return x, mask


def documents(*lengths: int) -> list[Tensor]:
    return [ids(n, seed=n) for n in lengths]
