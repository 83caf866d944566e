"""RetNet's three views of retention are one function (arXiv 2307.08621, section 2)."""

import pytest
import torch
from op_cases import (
    LINEAR_ATTENTION,
    assert_equal_to_rounding,
    closed_linear_attention,
    errors,
    outputs_and_gradients,
    to,
)

from hf_linear.ops.retention import retention_chunkwise, retention_parallel, retention_recurrent

pytestmark = pytest.mark.usefixtures("poisoned_memory")

VIEWS = {"parallel": retention_parallel, "recurrent": retention_recurrent, "chunkwise": retention_chunkwise}
each_view = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())

# Sums of at most 200 tokens times 24 channels in float64, whose rounding is 1.1e-16; a slip in an exponent shows at
# 1e-2, what the weakest decay of the ladder does in one step.
ROUNDING = 1e-11


def gammas(H):
    """The log-decays of the paper: gamma_h = 1 - 2 ** (-5 - h)."""
    return torch.log1p(-(2.0 ** (-5 - torch.arange(H, dtype=torch.float64))))


def sample(T, *, state=True, H=3, K=24, V=40, B=2):
    return LINEAR_ATTENTION[1].sample(T, H=H, K=K, V=V, B=B, state=state) | {"g": gammas(H)}


@each_view
@pytest.mark.parametrize("state", [True, False], ids=["initial_state", "no_initial_state"])
@pytest.mark.parametrize("T", [1, 2, 7, 17])
def test_view_equals_closed_form(view, T, state):
    inputs = sample(T, state=state, K=5, V=3)
    expected = outputs_and_gradients(closed_linear_attention, inputs)
    assert_equal_to_rounding(outputs_and_gradients(view, inputs), expected, inputs, ROUNDING)


@pytest.mark.parametrize("other", ["parallel", "chunkwise"])
@pytest.mark.parametrize("state", [True, False], ids=["initial_state", "no_initial_state"])
@pytest.mark.parametrize("T", [1, 15, 63, 65, 127, 199])
def test_views_are_equal(other, T, state):
    """Values, the final state, and the gradients of q, k, v, g and the initial state."""
    inputs = sample(T, state=state)
    expected = outputs_and_gradients(retention_recurrent, inputs)
    assert_equal_to_rounding(outputs_and_gradients(VIEWS[other], inputs), expected, inputs, ROUNDING)


@each_view
def test_one_view_continues_another(view):
    """Prefill with any view, go on with any other: the state is the same thing."""
    inputs = sample(70)
    q, k, v, g, initial_state = (inputs[name] for name in ("q", "k", "v", "g", "initial_state"))
    o, state = retention_recurrent(q, k, v, g, initial_state=initial_state)
    for then in VIEWS.values():
        first, carried = view(q[:, :33], k[:, :33], v[:, :33], g, initial_state=initial_state)
        second, final = then(q[:, 33:], k[:, 33:], v[:, 33:], g, initial_state=carried)
        actual = {"o": torch.cat([first, second], 1), "state": final}
        assert_equal_to_rounding(actual, {"o": o, "state": state}, inputs, ROUNDING)


@each_view
def test_scale(view):
    inputs = sample(20)
    o, state = view(**inputs)
    for scale in (0.0, 1.0, 24**-0.5):
        scaled = dict(zip(("o", "state"), view(**inputs, scale=scale), strict=True))
        assert_equal_to_rounding(scaled, {"o": o * scale * 24**0.5, "state": state}, inputs, ROUNDING)


@each_view
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_precision_and_dtypes(view, dtype):
    """Every view is as precise as the recurrence: twice its error against float64, in either dtype."""
    inputs = to(sample(130), dtype) | {"g": gammas(3).float()}
    inputs["initial_state"] = inputs["initial_state"].float()
    exact = outputs_and_gradients(retention_recurrent, to(inputs, torch.float64))
    results = outputs_and_gradients(view, inputs)
    assert results["o"].dtype == dtype
    assert results["state"].dtype == torch.float32
    recurrent = errors(outputs_and_gradients(retention_recurrent, inputs), exact, inputs)
    found = errors(results, exact, inputs)
    # Sums are accumulated in float32 whatever the dtype; one made in another order may cost a few roundings more.
    floor = 4 * torch.finfo(torch.float32).eps
    wrong = {n: (e, recurrent[n]) for n, e in found.items() if not e <= max(2 * recurrent[n], floor)}
    assert not wrong, f"(view, recurrent) errors: {wrong}"


@each_view
def test_strong_decay_stays_finite(view):
    inputs = sample(130)
    inputs["g"] = torch.tensor([-50.0, -1e4, 0.0], dtype=torch.float64)
    for name, x in outputs_and_gradients(view, to(inputs, torch.float32)).items():
        assert x.isfinite().all(), name


@each_view
def test_wants_one_decay_a_head(view):
    inputs = sample(6)
    for shape in ((2,), (2, 6, 3), ()):
        with pytest.raises(ValueError, match=r"\bg\b") as info:
            view(**(inputs | {"g": torch.zeros(shape, dtype=torch.float64)}))
        assert str(list(shape)) in str(info.value)
        assert "[H]" in str(info.value) or "[3]" in str(info.value)
