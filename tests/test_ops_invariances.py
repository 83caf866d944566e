"""What must not matter to the ops: later tokens, how a sequence is split, the rest of the batch, the layout in memory."""

from functools import partial

import pytest
import torch
from op_cases import (
    BACKENDS,
    CASES,
    FULL_CASES,
    LONG_CONV,
    ROUNDING,
    SAME_SUMS,
    assert_equal_to_rounding,
    named,
    outputs_and_gradients,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("t", [1, 40, 64, 99])
@named(FULL_CASES)
def test_causality(case, t, backend):
    inputs = case.sample(100, K=5, V=3)
    changed = {name: x.clone() for name, x in inputs.items()}
    for name, axis in case.time.items():
        changed[name].narrow(axis, t, 100 - t).mul_(3)
    before, after = case(backend, **inputs)[0], case(backend, **changed)[0]
    early, late = ((0, t), (t, 100 - t))
    assert not torch.equal(before.narrow(case.out_time, *late), after.narrow(case.out_time, *late))
    # A Fourier transform mixes all tokens: where the late ones cancel, the rounding of the largest is left.
    allowed = SAME_SUMS * after.abs().max() if case in LONG_CONV and backend == "chunked" else 0
    assert ((after - before).narrow(case.out_time, *early).abs() <= allowed).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "splits",
    [[1, 129], [129, 1], [64, 66], [63, 2, 65], [15, 16, 17, 82], [1] * 20 + [110]],
    ids=lambda splits: f"{len(splits)} pieces from {splits[0]}",
)
@named(FULL_CASES)
def test_split_and_carry_equals_whole(case, splits, backend):
    inputs = case.sample(130, K=5, V=3, decay=case.hardest_decay)
    expected = outputs_and_gradients(partial(case, backend), inputs)
    actual = outputs_and_gradients(case.piece_by_piece(splits, backend), inputs)
    assert_equal_to_rounding(actual, expected, inputs, ROUNDING)


@pytest.mark.parametrize("backend", BACKENDS)
@named(CASES)
def test_split_without_an_initial_state(case, backend):
    inputs = case.sample(70, K=5, V=3, state=False)
    expected = outputs_and_gradients(partial(case, backend), inputs)
    actual = outputs_and_gradients(case.piece_by_piece([2, 1, 67], backend), inputs)
    assert_equal_to_rounding(actual, expected, inputs, ROUNDING)


@pytest.mark.parametrize("backend", BACKENDS)
@named(CASES)
def test_rows_of_a_batch_are_independent(case, backend):
    """Neighbours of NaN change no bit of a row, and a row alone is the row in its batch."""
    inputs = case.sample(67, B=3, K=5, V=3, decay=case.hardest_decay)
    batched = {name for name in inputs if name in case.time or name == "initial_state"}
    expected = dict(zip(("o", "state"), case(backend, **inputs), strict=True))

    poisoned = {name: x.clone() for name, x in inputs.items()}
    for name in batched:
        poisoned[name][::2] = torch.nan
    for name, x in zip(("o", "state"), case(backend, **poisoned), strict=True):
        assert torch.equal(x[1], expected[name][1]), name

    for row in range(3):
        alone = {name: x[row : row + 1] if name in batched else x for name, x in inputs.items()}
        actual = dict(zip(("o", "state"), case(backend, **alone), strict=True))
        # Another batch size may choose another matrix kernel.
        assert_equal_to_rounding(actual, {n: x[row : row + 1] for n, x in expected.items()}, alone, SAME_SUMS)


def transposed(x):
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def sliced(x):
    """Every other element of a wider tensor, itself a part of one: what a fused projection hands over."""
    return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]


def expanded(x):
    """The first slice of the first axis, repeated with a stride of 0."""
    return x[:1].expand(x.shape)


def expanded_last(x):
    return x[..., :1].expand(x.shape)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [transposed, sliced, expanded, expanded_last], ids=lambda f: f.__name__)
@named(CASES)
def test_strides_do_not_matter(case, layout, backend):
    inputs = {name: layout(x) for name, x in case.sample(67, K=5, V=3, decay=case.hardest_decay).items()}
    contiguous = {name: x.clone(memory_format=torch.contiguous_format) for name, x in inputs.items()}
    expected = outputs_and_gradients(partial(case, backend), contiguous)
    assert_equal_to_rounding(outputs_and_gradients(partial(case, backend), inputs), expected, inputs, SAME_SUMS)
