"""Packed documents of the ops are the documents alone."""

from functools import partial
from math import sqrt

import pytest
import torch
from op_cases import (
    BACKENDS,
    CASES,
    FULL_CASES,
    LONG_CONV,
    ROUNDING,
    assert_equal_to_rounding,
    errors,
    named,
    outputs_and_gradients,
    to,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Lengths of documents: empty ones first, last and between, of one token, shorter than a filter, and on, before, after
# and across the borders of chunks.
PACKINGS = {
    "mixed": [0, 5, 1, 70, 0, 0, 64, 1, 2, 31, 0],
    "aligned": [64, 64, 16, 16],
    "one": [67],
    "tokens": [1] * 17,
    "long": [3, 130, 1],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state", [True, False], ids=["initial_state", "no_initial_state"])
@pytest.mark.parametrize("packing", PACKINGS)
@named(CASES)
def test_packed_documents_equal_documents_alone(case, packing, state, backend):
    cu_seqlens = torch.tensor([0, *PACKINGS[packing]]).cumsum(0)
    T, N = int(cu_seqlens[-1]), len(cu_seqlens) - 1
    inputs = case.sample(T, B=1, N=N, K=5, V=3, decay=case.hardest_decay, state=state)
    # The reference by itself: a backend that packs wrongly cannot excuse itself.
    expected = outputs_and_gradients(case.document_by_document(cu_seqlens.tolist(), "reference"), inputs)
    for dtype in (torch.int64, torch.int32):
        packed = partial(case, backend, cu_seqlens=cu_seqlens.to(dtype))
        actual = outputs_and_gradients(packed, inputs)
        assert_equal_to_rounding(actual, expected, inputs, ROUNDING)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_packed_row_may_be_longer_than_the_filter(backend):
    """No document is: the convolution restarts at each."""
    case = LONG_CONV[1]
    inputs = case.sample(100, B=1, N=3, K=5)
    inputs["h"] = inputs["h"][:, :40]
    cu_seqlens = torch.tensor([0, 40, 63, 100])
    expected = outputs_and_gradients(case.document_by_document(cu_seqlens.tolist(), "reference"), inputs)
    actual = outputs_and_gradients(partial(case, backend, cu_seqlens=cu_seqlens), inputs)
    assert_equal_to_rounding(actual, expected, inputs, ROUNDING)
    with pytest.raises(ValueError, match=r"\bh\b"):
        case(backend, **inputs, cu_seqlens=torch.tensor([0, 41, 63, 100]))


@named(FULL_CASES)
def test_packing_loses_no_precision(case):
    """Documents of strong decay beside one of weak decay, in float32: within twice the error of the recurrence."""
    lengths = [40, 50, 60]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    inputs = case.sample(150, B=1, N=3, K=5, V=3, dtype=torch.float32, decay="0.01")
    if "g" in inputs:
        inputs["g"][:, :40] *= 1e6
        inputs["g"][:, 90:] *= 1e4
    alone = case.document_by_document(cu_seqlens.tolist(), "reference")
    exact = outputs_and_gradients(alone, to(inputs, torch.float64))
    reference = errors(outputs_and_gradients(alone, inputs), exact, inputs)
    together = partial(case, "chunked", cu_seqlens=cu_seqlens)
    packed = errors(outputs_and_gradients(together, inputs), exact, inputs)
    # The floors of test_chunked_is_as_precise_as_reference: a few roundings, and the longest random walk for dg.
    eps = torch.finfo(torch.float32).eps
    floor = dict.fromkeys(exact, 20 * eps if case in LONG_CONV else 4 * eps) | {"dg": 4 * sqrt(60) * eps}
    wrong = {n: (e, reference[n]) for n, e in packed.items() if not e <= max(2 * reference[n], floor[n])}
    assert not wrong, f"(chunked, reference) errors: {wrong}"
