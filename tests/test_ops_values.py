"""Outputs, states and gradients of the ops: against closed forms, and the backends against each other."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from op_cases import (
    ATTENTION,
    BACKENDS,
    CASES,
    FULL_CASES,
    GATED,
    LINEAR_ATTENTION,
    ROUNDING,
    SAME_SUMS,
    SELECTIVE_SCAN,
    SHORT_CONV,
    assert_equal_to_rounding,
    case_and_decay,
    cotangents,
    named,
    outputs_and_gradients,
)
from torch.autograd import gradcheck, gradgradcheck

from hf_linear import ops
from hf_linear.ops import chunked as chunked_ops

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("state", [True, False], ids=["initial_state", "no_initial_state"])
@pytest.mark.parametrize("T", [1, 2, 5, 18])
@case_and_decay(CASES)
def test_reference_equals_closed_form(case, decay, T, state):
    inputs = case.sample(T, decay=decay, K=5, V=3, state=state)
    expected = outputs_and_gradients(lambda **x: case.closed_form(**x, **case.options), inputs)
    actual = outputs_and_gradients(partial(case, "reference"), inputs)
    assert_equal_to_rounding(actual, expected, inputs, ROUNDING)


@pytest.mark.parametrize("backend", BACKENDS)
@named([LINEAR_ATTENTION[2], *GATED])
def test_full_reset_forgets_everything(case, backend):
    """exp(-inf) is exactly 0: with g = -inf at token t, the tokens from t on are a sequence of their own."""
    inputs = case.sample(140, decay="0.01", K=5, V=3)
    for t in (3, 64, 70):
        inputs["g"][:, t] = -torch.inf
    o, state = case(backend, **inputs)
    pieces = [case(backend, **case.slice_time(inputs, *ends)) for ends in pairwise([0, 3, 64, 70, 140])]
    first = case(backend, **case.slice_time(inputs, 0, 3), initial_state=inputs["initial_state"])
    expected = {"o": torch.cat([first[0], *[o for o, _ in pieces[1:]]], 1), "state": pieces[-1][1]}
    assert_equal_to_rounding({"o": o, "state": state}, expected, inputs, ROUNDING)


@pytest.mark.parametrize("T", [1, 2, 15, 16, 63, 64, 65, 127, 200])
@named(CASES)
def test_chunked_equals_reference_at_any_length(case, T):
    inputs = case.sample(T, decay=case.hardest_decay)
    expected = outputs_and_gradients(partial(case, "reference"), inputs)
    assert_equal_to_rounding(outputs_and_gradients(partial(case, "chunked"), inputs), expected, inputs, ROUNDING)


@pytest.mark.parametrize("T", [65, 200])
@case_and_decay([*ATTENTION, SELECTIVE_SCAN[0]])
def test_chunked_equals_reference_at_any_decay(case, decay, T):
    inputs = case.sample(T, decay=decay)
    expected = outputs_and_gradients(partial(case, "reference"), inputs)
    assert_equal_to_rounding(outputs_and_gradients(partial(case, "chunked"), inputs), expected, inputs, ROUNDING)


@pytest.mark.parametrize("dims", [(5, 3), (60, 100), (1, 1), (100, 1)], ids=str)
@named(FULL_CASES)
def test_chunked_equals_reference_at_any_width(case, dims):
    inputs = case.sample(67, K=dims[0], V=dims[1], H=1, state=False)
    expected = outputs_and_gradients(partial(case, "reference"), inputs)
    assert_equal_to_rounding(outputs_and_gradients(partial(case, "chunked"), inputs), expected, inputs, ROUNDING)


@pytest.mark.parametrize("T", [1, 67])
@named(FULL_CASES)
def test_auto_is_one_of_the_backends(case, T):
    inputs = case.sample(T, K=5, V=3)
    expected = outputs_and_gradients(partial(case, "reference"), inputs)
    assert_equal_to_rounding(outputs_and_gradients(case, inputs), expected, inputs, ROUNDING)


@pytest.mark.parametrize("backend", BACKENDS)
@named(ATTENTION)
def test_scale(case, backend):
    """It multiplies o and leaves the state alone; 0 is a scale like any other."""
    inputs = case.sample(67, K=5, V=3)
    o, state = case(backend, **inputs)
    for scale in (0.0, 1.0, -2.5, 5**-0.5):
        scaled = dict(zip(("o", "state"), case(backend, **inputs, scale=scale), strict=True))
        assert_equal_to_rounding(scaled, {"o": o * (scale * 5**0.5), "state": state}, inputs, SAME_SUMS)


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_three_shapes_of_one_decay(backend, packed):
    """None is zeros, [H] is [B, T, H] with the same row everywhere, and [B, T, H] is GLA with equal channels."""
    case = LINEAR_ATTENTION[1]
    inputs = case.sample(67, B=1, N=2 if packed else None, K=5, V=3, decay="spread")
    if packed:
        inputs["cu_seqlens"] = torch.tensor([0, 13, 67])
    g = inputs.pop("g")

    def run(op, g):
        return dict(zip(("o", "state"), op(**inputs, g=g, backend=backend), strict=True))

    per_token = g.expand(1, 67, 3)
    expected = run(ops.linear_attention, per_token)
    assert_equal_to_rounding(run(ops.linear_attention, g), expected, inputs, ROUNDING)
    per_channel = per_token[..., None].expand(1, 67, 3, 5)
    assert_equal_to_rounding(run(ops.gated_linear_attention, per_channel), expected, inputs, ROUNDING)
    zeros = torch.zeros_like(per_token)
    assert_equal_to_rounding(run(ops.linear_attention, None), run(ops.linear_attention, zeros), inputs, ROUNDING)


@pytest.mark.parametrize("through", ["o", "state"])
@named(CASES)
def test_gradients_through_one_output_alone(case, through):
    inputs = case.sample(67, K=5, V=3)
    expected = outputs_and_gradients(partial(case, "reference"), inputs, through=through)
    actual = outputs_and_gradients(partial(case, "chunked"), inputs, through=through)
    assert_equal_to_rounding(actual, expected, inputs, ROUNDING)


@named(FULL_CASES)
def test_gradient_of_one_input_alone(case):
    """An input that wants no gradient (a frozen layer) must not cost another its own."""
    inputs = case.sample(67, K=5, V=3)
    together = outputs_and_gradients(partial(case, "chunked"), inputs)
    for name, x in inputs.items():
        leaf = x.detach().requires_grad_()
        outputs = case("chunked", **(inputs | {name: leaf}))
        reached = [(x, dx) for x, dx in zip(outputs, cotangents(*outputs), strict=True) if x.requires_grad]
        (alone,) = torch.autograd.grad([x for x, _ in reached], [leaf], [dx for _, dx in reached])
        assert_equal_to_rounding(together | {f"d{name}": alone}, together, inputs, SAME_SUMS)


@pytest.mark.parametrize("backend", BACKENDS)
@named(FULL_CASES)
def test_no_gradient_no_difference(case, backend):
    inputs = case.sample(67, K=5, V=3)
    expected = case(backend, **{name: x.requires_grad_() for name, x in inputs.items()})
    with torch.inference_mode():
        for actual, wanted in zip(case(backend, **inputs), expected, strict=True):
            torch.testing.assert_close(actual, wanted.detach(), rtol=0, atol=1e-13)  # values of size 1, the same sums


@named(FULL_CASES)
def test_second_derivatives(case):
    """Through a chunk border, which T = 67 has for every chunk size up to 64."""
    sample = case.sample(67, B=1, H=1, K=2, V=3, P=2, decay="0.01")  # so weak that the border is still felt at the end
    names, tensors = list(sample), [x.requires_grad_() for x in sample.values()]

    def function(*tensors):
        return case("chunked", **dict(zip(names, tensors, strict=True)))

    assert gradcheck(function, tensors, fast_mode=True)
    assert gradgradcheck(function, tensors, fast_mode=True)


# Documents over several pieces, several documents in a piece, none, and borders that are those of pieces.
@pytest.mark.parametrize("lengths", [None, [150, 50], [0, 64, 10, 20, 0, 34, 72, 0]], ids=["whole", "two", "many"])
@named(GATED)
def test_a_long_sequence_in_pieces(case, lengths, monkeypatch):
    """A CPU works piece by piece and carries the state on, to second derivatives."""
    index = {} if lengths is None else {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)}
    function = partial(case, "chunked", **index)
    inputs = case.sample(200, B=2 if lengths is None else 1, N=lengths and len(lengths), H=2, K=3, V=2)
    expected = outputs_and_gradients(function, inputs)
    monkeypatch.setattr(chunked_ops, "PIECE", 64)
    assert_equal_to_rounding(outputs_and_gradients(function, inputs), expected, inputs, ROUNDING)
    tensors = [x.requires_grad_() for x in inputs.values()]
    assert gradgradcheck(lambda *x: function(**dict(zip(inputs, x, strict=True))), tensors, fast_mode=True)


@pytest.mark.parametrize("T", [1, 2, 6, 23])
@named(SHORT_CONV)
def test_short_conv_in_pieces_of_a_few_tokens(case, T, monkeypatch):
    """Taps that reach from one piece into the last, several back, and into the state."""
    inputs = case.sample(T, K=5, V=3)
    monkeypatch.setattr(chunked_ops.Taps, "NUMBERS", 2 * inputs["x"][:, 0].numel())
    expected = outputs_and_gradients(partial(case, "reference"), inputs)
    assert_equal_to_rounding(outputs_and_gradients(partial(case, "chunked"), inputs), expected, inputs, ROUNDING)
