"""The ops in lower precision: errors against float64, dtypes, and decays beyond what a dtype holds."""

from functools import partial
from math import sqrt

import pytest
import torch
from op_cases import (
    BACKENDS,
    CASES,
    GATED,
    LINEAR_ATTENTION,
    LONG_CONV,
    SHORT_CONV,
    case_and_decay,
    errors,
    named,
    of_dtype,
    outputs_and_gradients,
    scales,
    to,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@of_dtype(torch.float32, torch.bfloat16)
@case_and_decay(CASES)
def test_chunked_is_as_precise_as_reference(case, decay, dtype):
    """The error against float64 is at most twice what the recurrence itself makes in that dtype, or `floor`."""
    inputs = case.sample(200, decay=decay, dtype=dtype)
    exact = outputs_and_gradients(partial(case, "reference"), to(inputs, torch.float64))
    reference = outputs_and_gradients(partial(case, "reference"), inputs)
    chunked = outputs_and_gradients(partial(case, "chunked"), inputs)

    # Sums are accumulated in float32 whatever the dtype. Where the recurrence is all but exact (the decay leaves one
    # term), a sum in another order still may round a few times.
    eps = torch.finfo(torch.float32).eps
    floor = dict.fromkeys(exact, 4 * eps)
    # dg sums the terms of all later tokens, each rounded by itself: a random walk of 200 steps.
    floor["dg"] = 4 * sqrt(200) * eps
    if case in LONG_CONV:
        # A transform of n points rounds log2(n) times on the way there and as often on the way back.
        floor = dict.fromkeys(exact, 2 * 10 * eps)
    recurrent, found = errors(reference, exact, inputs), errors(chunked, exact, inputs)
    wrong = {n: (e, recurrent[n]) for n, e in found.items() if not e <= max(2 * recurrent[n], floor[n])}
    assert not wrong, f"(chunked, reference) errors: {wrong}"

    # So that the recurrence cannot lower the bar: a narrow result is the exact one rounded once, by half a unit in the
    # last place. Before that float32 may err by half a unit in each of 200 steps, all the same way where the decay is
    # constant, and an element may be five times the RMS.
    scale = scales(exact, inputs)
    for results in (reference, chunked):
        for name, x in results.items():
            half_unit = torch.finfo(x.dtype).eps / 2 if x.dtype != torch.float32 else 0.0
            excess = (x.double() - exact[name]).abs() - half_unit * exact[name].abs()
            assert (excess <= 5 * 200 * eps / 2 * scale[name]).all(), f"{name} is off by {excess.max():g}"


@pytest.mark.parametrize("backend", BACKENDS)
@of_dtype(torch.float32, torch.bfloat16, torch.float16)
@pytest.mark.parametrize("strength", [50.0, 1e4, 1e30])
@named([LINEAR_ATTENTION[2], *GATED])
def test_strong_decay_stays_finite(case, strength, dtype, backend):
    inputs = case.sample(130, dtype=dtype, K=5, V=3)
    inputs["g"] = inputs["g"] * strength
    for name, x in outputs_and_gradients(partial(case, backend), inputs).items():
        assert x.isfinite().all(), name


@pytest.mark.parametrize("backend", BACKENDS)
@of_dtype(torch.float64, torch.float32, torch.bfloat16, torch.float16)
@pytest.mark.parametrize("state", [True, False], ids=["initial_state", "no_initial_state"])
@named(CASES)
def test_dtypes(case, state, dtype, backend):
    inputs = case.sample(9, dtype=dtype, K=5, V=3, state=state)
    results = outputs_and_gradients(partial(case, backend), inputs)
    wanted = {f"d{name}": x.dtype for name, x in inputs.items()} | {"o": dtype}
    # A short convolution carries inputs on, the others what they accumulate.
    wanted["state"] = dtype if case in SHORT_CONV else torch.promote_types(dtype, torch.float32)
    assert {name: x.dtype for name, x in results.items()} == wanted


@pytest.mark.parametrize("backend", BACKENDS)
@of_dtype(torch.float32, torch.bfloat16)
@named(CASES)
def test_autocast_lowers_no_precision(case, dtype, backend):
    """The dtypes of the inputs decide: under autocast a float32 state must not be summed up in bfloat16."""
    inputs = case.sample(67, K=5, V=3, dtype=dtype)
    expected = dict(zip(("o", "state"), case(backend, **inputs), strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        actual = dict(zip(("o", "state"), case(backend, **inputs), strict=True))
    for name, x in actual.items():
        assert x.dtype == expected[name].dtype, name
        assert torch.equal(x, expected[name]), name
