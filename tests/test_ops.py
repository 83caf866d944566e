"""The ops of hf_linear against closed forms, against each other, and against the promises of their signatures."""

import re
from functools import partial
from itertools import pairwise
from math import sqrt

import pytest
import torch
from op_cases import (
    ATTENTION,
    CASES,
    FULL_CASES,
    GATED,
    LINEAR_ATTENTION,
    LONG_CONV,
    SELECTIVE_SCAN,
    SHORT_CONV,
    Case,
    assert_equal_to_rounding,
    cotangents,
    errors,
    outputs_and_gradients,
    scales,
    to,
)
from torch.autograd import gradcheck, gradgradcheck

from hf_linear import ops
from hf_linear.ops import chunked as chunked_ops

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BACKENDS = ["reference", "chunked"]

# Two exact evaluations of one sum in float64. Rounding is 1.1e-16; the longest sums here have 200 tokens times 100
# channels, and a log-decay that adds up to 8e4 is held to 8e4 * 1.1e-16 = 1e-11, which is the relative error of its
# exponential. A slip in a formula shows at 1e-4 (the weakest decay) or above.
ROUNDING = 1e-10

# One evaluation made twice with the same sums in another order or with another matrix kernel: nothing but rounding.
SAME_SUMS = 1e-12


def named(cases: list[Case]):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def of_dtype(*dtypes: torch.dtype):
    return pytest.mark.parametrize("dtype", dtypes, ids=lambda dtype: str(dtype).removeprefix("torch."))


def case_and_decay(cases: list[Case]):
    return pytest.mark.parametrize(
        ("case", "decay"), [pytest.param(c, d, id=f"{c.name}-decay{d}") for c in cases for d in c.decays]
    )


# --- Values, states and gradients ---


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


@pytest.mark.parametrize("T", [1, 2, 6, 23])
@named(SHORT_CONV)
def test_short_conv_in_pieces_of_a_few_tokens(case, T, monkeypatch):
    """Taps that reach from one piece into the last, several back, and into the state."""
    inputs = case.sample(T, K=5, V=3)
    monkeypatch.setattr(chunked_ops.Taps, "NUMBERS", 2 * inputs["x"][:, 0].numel())
    expected = outputs_and_gradients(partial(case, "reference"), inputs)
    assert_equal_to_rounding(outputs_and_gradients(partial(case, "chunked"), inputs), expected, inputs, ROUNDING)


def test_short_conv_keeps_its_inputs_alone():
    """In bfloat16: neither a wide copy of the sequence nor a product with a tap."""
    x, w, kept = torch.randn(1, 200, 24).bfloat16().requires_grad_(), torch.randn(24, 3, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda z: kept.append(z) or z, lambda z: z):
        ops.short_conv(x, w)[0].sum()
    assert {z.untyped_storage().data_ptr() for z in kept if z.numel() >= 200} == {x.untyped_storage().data_ptr()}


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


def test_no_pieces_in_a_graph(monkeypatch):
    """A graph of pieces would grow with the sequence."""
    monkeypatch.setattr(chunked_ops, "PIECE", 64)
    monkeypatch.setattr(chunked_ops, "in_pieces", None)
    torch._dynamo.reset()
    torch.compile(partial(GATED[0], "chunked"), fullgraph=True, backend="eager")(**GATED[0].sample(200))


# --- Lower precision ---


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
@named(ATTENTION)
def test_scale(case, backend):
    """It multiplies o and leaves the state alone; 0 is a scale like any other."""
    inputs = case.sample(67, K=5, V=3)
    o, state = case(backend, **inputs)
    for scale in (0.0, 1.0, -2.5, 5**-0.5):
        scaled = dict(zip(("o", "state"), case(backend, **inputs, scale=scale), strict=True))
        assert_equal_to_rounding(scaled, {"o": o * (scale * 5**0.5), "state": state}, inputs, SAME_SUMS)


# --- Invariances ---


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


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("T", [1, 67])
@named(CASES)
def test_outputs_are_no_windows_on_inputs(case, T, packed, backend):
    """A cache writes to the state it was given; that must change neither the inputs nor what else was returned."""
    inputs = case.sample(T, B=1, N=3 if packed else None, K=5, V=3, decay=case.hardest_decay)
    copies = {name: x.clone() for name, x in inputs.items()}
    index = {"cu_seqlens": torch.tensor([0, 0, T, T])} if packed else {}
    with torch.no_grad():
        o, state = case(backend, **inputs, **index)
        before = o.clone()
        state.fill_(torch.nan)
        assert torch.equal(o, before)
        o.fill_(torch.nan)
    for name, x in inputs.items():
        assert torch.equal(x, copies[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@named(CASES)
def test_state_keeps_no_sequence_alive(case, packed, backend):
    """A view of a longer tensor would hold all of it for as long as a cache holds the state."""
    inputs = case.sample(200, B=1, N=2 if packed else None, K=5, V=3)
    index = {"cu_seqlens": torch.tensor([0, 70, 200])} if packed else {}
    _, state = case(backend, **inputs, **index)
    a_token = 8 * 5 * 3  # in float64; the window of a token-by-token convolution holds one input more than the state
    assert state.untyped_storage().nbytes() <= state.nbytes + a_token * state.shape[0]


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


@pytest.mark.parametrize("backend", BACKENDS)
@named(FULL_CASES)
def test_no_gradient_no_difference(case, backend):
    inputs = case.sample(67, K=5, V=3)
    expected = case(backend, **{name: x.requires_grad_() for name, x in inputs.items()})
    with torch.inference_mode():
        for actual, wanted in zip(case(backend, **inputs), expected, strict=True):
            torch.testing.assert_close(actual, wanted.detach(), rtol=0, atol=1e-13)  # values of size 1, the same sums


@pytest.mark.parametrize("T", [1, 67])
@named(FULL_CASES)
def test_auto_is_one_of_the_backends(case, T):
    inputs = case.sample(T, K=5, V=3)
    expected = outputs_and_gradients(partial(case, "reference"), inputs)
    assert_equal_to_rounding(outputs_and_gradients(case, inputs), expected, inputs, ROUNDING)


# --- torch.compile ---


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@named(FULL_CASES)
def test_compiled_equals_eager(case, packed):
    inputs = case.sample(70, B=1 if packed else 2, N=3 if packed else None, K=5, V=3)
    index = {"cu_seqlens": torch.tensor([0, 66, 66, 70])} if packed else {}
    torch._dynamo.reset()
    compiled = torch.compile(lambda **x: case(**x, **index), fullgraph=True, backend="aot_eager")
    expected = outputs_and_gradients(lambda **x: case(**x, **index), inputs)
    assert_equal_to_rounding(outputs_and_gradients(compiled, inputs), expected, inputs, SAME_SUMS)


@named(FULL_CASES)
def test_compiled_once_serves_other_documents(case):
    """The borders are data: a graph made for some documents must serve others of the same number."""
    inputs = case.sample(70, B=1, N=3, K=5, V=3)
    torch._dynamo.reset()
    compiled = torch.compile(case, fullgraph=True, backend="aot_eager")
    for borders in ([0, 66, 66, 70], [0, 1, 30, 70]):
        index = torch.tensor(borders)
        expected = dict(zip(("o", "state"), case(**inputs, cu_seqlens=index), strict=True))
        with torch.compiler.set_stance("default" if borders[1] == 66 else "fail_on_recompile"):
            actual = dict(zip(("o", "state"), compiled(**inputs, cu_seqlens=index), strict=True))
        assert_equal_to_rounding(actual, expected, inputs, SAME_SUMS)


# --- Errors ---


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    return torch.zeros(*shape, dtype=dtype, device=device) if shape else torch.zeros((), dtype=dtype, device=device)


def plain(message: str) -> str:
    """Shapes as [2, 6, 3, 5] and dtypes as float32, however they are printed."""
    message = message.replace("torch.Size(", "").replace("torch.", "")
    return re.sub(r"\(([\d, ]+?),?\)", r"[\1]", message)


def check_error(case: Case, changes: dict, name: str, got: str, wanted: str) -> None:
    """A ValueError that names the argument, what was got and what was wanted (all three patterns), and then the way out."""
    N = 2 if "cu_seqlens" in changes else None
    inputs = case.sample(6, B=2 if N is None else 1, N=N, dtype=torch.float32, K=5, V=4, P=2) | case.options | changes
    for backend in [changes["backend"]] if "backend" in changes else ["auto", *BACKENDS]:
        with pytest.raises(ValueError) as info:
            case.op(**(inputs | {"backend": backend}))
        message = plain(str(info.value))
        assert re.search(rf"\b{name}\b", message), f"{message!r} names no {name}"
        assert re.search(got, message), f"{message!r} does not say what was got: {got}"
        assert re.search(wanted, message), f"{message!r} does not say what was wanted: {wanted}"
        assert re.search(r"\bgot\b.*: \S.*\w", message), f"{message!r} shows no way out"


def wrong(id: str, name: str, value, got: str, wanted: str, **more):
    """A call like check_error's with one argument replaced, and `more` beside it."""
    return pytest.param({name: value} | more, name, got, wanted, id=id)


def wrong_shape(id: str, name: str, *shape: int, wanted: str, **more):
    return wrong(id, name, zeros(*shape), re.escape(str(list(shape))), wanted, **more)


def wrong_dtype(name: str, *shape: int, dtype: torch.dtype = torch.int64, wanted: str = "float(?!64)", **more):
    got = str(dtype).removeprefix("torch.")
    return wrong(f"{name} in {got}", name, zeros(*shape, dtype=dtype), rf"\b{got}\b", wanted, **more)


def wrong_device(name: str, *shape: int):
    return wrong(f"{name} on another device", name, zeros(*shape, device="meta"), "meta", "cpu")


def wrong_backend(name: str):
    return wrong(f"backend {name!r}", "backend", name, repr(name), "(?=.*auto)(?=.*reference).*chunked")


def errors_of(*params):
    return pytest.mark.parametrize(("changes", "name", "got", "wanted"), params)


KEYS = r"\[2, 6, 3, 5\]|\[B, T, H, K\]"
VALUES = r"\[2, 6, 3, \w+\]|\[B, T, H, V\]"
STATE = r"\[2, 3, 5, 4\]"
SHAPES = {"q": (2, 6, 3, 5), "k": (2, 6, 3, 5), "v": (2, 6, 3, 4), "g": (2, 6, 3)}
IN_FLOAT64 = {name: zeros(*shape, dtype=torch.float64) for name, shape in SHAPES.items()}
NO_TOKEN = {"k": zeros(2, 0, 3, 5), "v": zeros(2, 0, 3, 4), "g": zeros(2, 0, 3)}


@errors_of(
    wrong_shape("q of three axes", "q", 6, 3, 5, wanted=r"\[B, T, H, K\]"),
    wrong_shape("k of another head", "k", 2, 6, 2, 5, wanted=KEYS),
    wrong_shape("k of another width", "k", 2, 6, 3, 4, wanted=KEYS),
    wrong_shape("k of another length", "k", 2, 7, 3, 5, wanted=KEYS),
    wrong_shape("k of another batch", "k", 1, 6, 3, 5, wanted=KEYS),
    wrong_shape("v of another head", "v", 2, 6, 1, 4, wanted=VALUES),
    wrong_shape("v of another length", "v", 2, 1, 3, 4, wanted=VALUES),
    wrong_shape("v of three axes", "v", 2, 6, 3, wanted=VALUES),
    wrong("no token", "q", zeros(2, 0, 3, 5), r"\[2, 0, 3, 5\]|T ?=+ ?0", "1", **NO_TOKEN),
    wrong_dtype("q", 2, 6, 3, 5),
    wrong_dtype("k", 2, 6, 3, 5, dtype=torch.int32),
    wrong_dtype("v", 2, 6, 3, 4),
    wrong_dtype("v", 2, 6, 3, 4, dtype=torch.complex64),
    wrong_dtype("v", 2, 6, 3, 4, dtype=torch.bool),
    wrong_dtype("g", 2, 6, 3),
    wrong_device("k", 2, 6, 3, 5),
    wrong_device("g", 2, 6, 3),
    wrong_device("initial_state", 2, 3, 5, 4),
    wrong_shape("state transposed", "initial_state", 2, 3, 4, 5, wanted=STATE),
    wrong_shape("state of another batch", "initial_state", 1, 3, 5, 4, wanted=STATE),
    wrong_shape("state of three axes", "initial_state", 3, 5, 4, wanted=STATE),
    wrong_dtype("initial_state", 2, 3, 5, 4, dtype=torch.bfloat16, wanted=r"\bfloat32\b"),
    wrong_dtype("initial_state", 2, 3, 5, 4, dtype=torch.float64, wanted=r"\bfloat32\b"),
    wrong_dtype("initial_state", 2, 3, 5, 4, dtype=torch.float32, wanted=r"\bfloat64\b", **IN_FLOAT64),
    wrong_backend("cuda"),
    wrong_backend(""),
)
@named([LINEAR_ATTENTION[2], *GATED])
def test_attention_errors(case, changes, name, got, wanted):
    if case in GATED and "g" in changes:  # the same mistake in GLA's shape
        changes = changes | {"g": changes["g"][..., None].expand(*changes["g"].shape, 5)}
    check_error(case, changes, name, got, wanted)


@pytest.mark.parametrize("value", [0.25, torch.inf])
@named([*LINEAR_ATTENTION[1:], *GATED])
def test_a_log_decay_is_not_positive(case, value):
    g = case.sample(6, dtype=torch.float32, K=5, V=4)["g"]
    g.view(-1)[-1] = value
    check_error(case, {"g": g}, "g", rf"\b{value}\b", "log-decay <= 0")


def of_shape(*shapes: tuple[int, ...]):
    return pytest.mark.parametrize("shape", shapes, ids=lambda shape: str(list(shape)))


@of_shape((2,), (1,), (), (2, 6), (6, 3), (1, 6, 3), (2, 1, 3), (2, 6, 1), (2, 6, 3, 5))
def test_linear_attention_wants_g_of_a_head(shape):
    wanted = r"\[H\]" if len(shape) == 1 else r"\[B, T, H\]|\[2, 6, 3\]"
    check_error(LINEAR_ATTENTION[2], {"g": zeros(*shape)}, "g", re.escape(str(list(shape))), wanted)


@of_shape((3,), (5,), (2, 6, 3), (2, 6, 3, 1), (2, 6, 3, 4), (1, 6, 3, 5))
def test_gated_linear_attention_wants_g_of_a_channel(shape):
    check_error(GATED[0], {"g": zeros(*shape)}, "g", re.escape(str(list(shape))), r"\[2, 6, 3, 5\]")


def borders(id: str, value: list[int], got: str, wanted: str, dtype: torch.dtype = torch.int64):
    return wrong(id, "cu_seqlens", torch.tensor(value, dtype=dtype), got, wanted)


@errors_of(
    borders("not from 0", [1, 3, 6], r"1, 3, 6|\b1\b", r"\b0\b"),
    borders("short of T", [0, 3, 5], r"\b5\b", r"\b6\b|\bT\b"),
    borders("beyond T", [0, 3, 7], r"\b7\b", r"\b6\b|\bT\b"),
    borders("decreasing", [0, 5, 3, 6], r"0, 5, 3, 6|5.*3", "decreas|increas|ascend|sort|rise|fall"),
    borders("float32", [0, 3, 6], "float32", "int32.*int64", dtype=torch.float32),
    borders("int16", [0, 3, 6], "int16", "int32.*int64", dtype=torch.int16),
    borders("two axes", [[0, 3, 6]], r"\[1, 3\]", r"N ?\+ ?1"),
    borders("no document", [0], r"\[1\]|\[0\]|\b0\b", r"N ?\+ ?1|\b6\b"),
    wrong("cu_seqlens on another device", "cu_seqlens", torch.tensor([0, 3, 6], device="meta"), "meta", "cpu"),
)
@named(FULL_CASES)
def test_cu_seqlens_errors(case, changes, name, got, wanted):
    sampled = case.sample(6, B=1, N=len(changes["cu_seqlens"]) - 1, dtype=torch.float32, K=5, V=4, P=2)
    check_error(case, sampled | changes, name, got, wanted)


@named(FULL_CASES)
def test_cu_seqlens_wants_one_row(case):
    changes = case.sample(6, B=2, N=2, dtype=torch.float32, K=5, V=4, P=2) | {"cu_seqlens": torch.tensor([0, 3, 6])}
    check_error(case, changes, "cu_seqlens", r"\b2\b", r"B ?=+ ?1|one row")


@pytest.mark.parametrize(
    ("case", "shape", "wanted"),
    [
        (LINEAR_ATTENTION[2], (1, 3, 5, 4), STATE),
        (GATED[0], (3, 3, 5, 4), STATE),
        (SHORT_CONV[1], (1, 2, 15), "2, 2, 15"),
        (SELECTIVE_SCAN[1], (1, 15, 4), "2, 15, 4"),
    ],
    ids=lambda x: x.name if isinstance(x, Case) else "",
)
def test_packed_initial_state_is_one_a_document(case, shape, wanted):
    changes = {"cu_seqlens": torch.tensor([0, 3, 6]), "initial_state": zeros(*shape)}
    check_error(case, changes, "initial_state", re.escape(str(list(shape))), wanted)


@errors_of(
    wrong_shape("x of two axes", "x", 6, 15, wanted=r"\[B, T, D\]"),
    wrong("no token", "x", zeros(2, 0, 15), r"\[2, 0, 15\]|T ?=+ ?0", "1"),
    wrong_shape("w of another width", "w", 14, 3, wanted=r"\[15, \w+\]|\[D, W\]"),
    wrong_shape("w of a Conv1d", "w", 15, 1, 3, wanted=r"\[15, W\]|\[D, W\]"),
    wrong("w without a tap", "w", zeros(15, 0), r"\[15, 0\]|W ?=+ ?0", "1"),
    wrong_shape("b of another width", "b", 3, wanted=r"\[15\]"),
    wrong_dtype("x", 2, 6, 15),
    wrong_dtype("w", 15, 3),
    wrong_dtype("b", 15),
    wrong_device("w", 15, 3),
    wrong_device("b", 15),
    wrong_device("initial_state", 2, 2, 15),
    wrong_dtype("initial_state", 2, 2, 15),
    wrong_dtype("initial_state", 2, 2, 15, dtype=torch.bfloat16, wanted=r"\bfloat32\b"),
    wrong_shape("state of another length", "initial_state", 2, 3, 15, wanted=r"\[2, 2, 15\]"),
    wrong_shape("state channel-major", "initial_state", 2, 15, 2, wanted=r"\[2, 2, 15\]"),
    wrong("activation unknown", "activation", "relu", "relu", "None.*silu|silu.*None"),
    wrong_backend("cuda"),
)
def test_short_conv_errors(changes, name, got, wanted):
    check_error(SHORT_CONV[1], changes, name, got, wanted)


CHANNELS = r"\[2, 6, 15\]|\[batch, T, D\]"
NUMBERS = r"\[2, 6, 4\]|\[batch, T, N\]"


@errors_of(
    wrong_shape("x of two axes", "x", 6, 15, wanted=r"\[batch, T, D\]"),
    wrong("no token", "x", zeros(2, 0, 15), r"\[2, 0, 15\]|T ?=+ ?0", "1"),
    wrong_shape("dt of low rank", "dt", 2, 6, 1, wanted=CHANNELS),
    wrong_shape("A of one axis", "A", 15, wanted=r"\[D, N\]"),
    wrong_shape("A of another width", "A", 14, 4, wanted="15"),
    wrong_shape("A without a number", "A", 15, 0, wanted="N >= 1"),
    wrong_shape("B of groups", "B", 2, 6, 3, 4, wanted=NUMBERS),
    wrong_shape("C of another length", "C", 2, 5, 4, wanted=NUMBERS),
    wrong_shape("D of another width", "D", 4, wanted=r"\[15\]"),
    wrong_shape("dt_bias of another width", "dt_bias", 4, wanted=r"\[15\]"),
    wrong_shape("z channel-major", "z", 2, 15, 6, wanted=CHANNELS),
    wrong_dtype("x", 2, 6, 15),
    wrong_dtype("A", 15, 4),
    wrong_dtype("dt_bias", 15),
    wrong_device("B", 2, 6, 4),
    wrong_device("initial_state", 2, 15, 4),
    wrong_shape("state of another batch", "initial_state", 1, 15, 4, wanted=r"\[2, 15, 4\]"),
    wrong_shape("state transposed", "initial_state", 2, 4, 15, wanted=r"\[2, 15, 4\]"),
    wrong_dtype("initial_state", 2, 15, 4, dtype=torch.bfloat16, wanted=r"\bfloat32\b"),
    wrong("A above 0", "A", zeros(15, 4) + 0.25, r"\b0.25\b", "<= 0"),
    wrong("dt below 0", "dt", zeros(2, 6, 15) - 0.25, r"-0.25\b", ">= 0", dt_softplus=False, dt_bias=None),
    wrong_backend("cuda"),
)
def test_selective_scan_errors(changes, name, got, wanted):
    check_error(SELECTIVE_SCAN[1], changes, name, got, wanted)


@named(SELECTIVE_SCAN)
def test_selective_scan_keeps_no_state_of_a_token(case):
    """For the backward pass: inputs and the states that enter chunks, together a fraction of [T, D, N]."""
    inputs = case.sample(512, B=1, H=4, K=8, V=32, dtype=torch.float32)
    kept: dict[int, int] = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        case("chunked", **{name: x.requires_grad_() for name, x in inputs.items()})
    states = 512 * 32 * 32
    assert max(kept.values()) <= states / 32
    assert sum(kept.values()) <= states / 2


GATE = r"\[2, 15, 6\]|\[B, D, T\]"
HISTORY = r"\[2, 15, \w+\]|\[B, D, P\]"
NO_GATE_TOKEN = {"pre_gate": zeros(2, 15, 0), "post_gate": zeros(2, 15, 0)}


@errors_of(
    wrong_shape("u of two axes", "u", 15, 6, wanted=r"\[B, D, T\]"),
    wrong("no token", "u", zeros(2, 15, 0), r"\[2, 15, 0\]|T ?=+ ?0", "1", **NO_GATE_TOKEN),
    wrong_shape("h of another width", "h", 14, 9, wanted=r"\[15, \w+\]|\[D, L\]"),
    wrong_shape("h of one axis", "h", 9, wanted=r"\[15, \w+\]|\[D, L\]"),
    wrong("h shorter than the tokens", "h", zeros(15, 5), r"\b5\b", r"\b6\b", initial_state=None),
    wrong("h shorter than history and tokens", "h", zeros(15, 7), r"\b7\b", r"\b8\b|2 \+ 6"),
    wrong_shape("skip of another width", "skip", 3, wanted=r"\[15\]"),
    wrong_shape("pre_gate of another length", "pre_gate", 2, 15, 1, wanted=GATE),
    wrong_shape("post_gate token-major", "post_gate", 2, 6, 15, wanted=GATE),
    wrong_dtype("u", 2, 15, 6),
    wrong_dtype("h", 15, 9),
    wrong_dtype("skip", 15),
    wrong_dtype("pre_gate", 2, 15, 6),
    wrong_device("h", 15, 11),
    wrong_device("post_gate", 2, 15, 6),
    wrong_dtype("initial_state", 2, 15, 2),
    wrong_dtype("initial_state", 2, 15, 2, dtype=torch.bfloat16, wanted=r"\bfloat32\b"),
    wrong_device("initial_state", 2, 15, 2),
    wrong_shape("state of another width", "initial_state", 2, 3, 2, wanted=HISTORY),
    wrong_shape("state of another batch", "initial_state", 1, 15, 2, wanted=HISTORY),
    wrong_backend("cuda"),
)
def test_long_conv_errors(changes, name, got, wanted):
    check_error(LONG_CONV[1], changes, name, got, wanted)


def test_long_conv_takes_no_state_of_packed_documents():
    changes = {"cu_seqlens": torch.tensor([0, 3, 6]), "initial_state": zeros(1, 15, 2)}
    check_error(LONG_CONV[1], changes, "initial_state", "cu_seqlens", "None|without|no ")


@named(FULL_CASES)
def test_triton_on_a_cpu_says_the_way_out(case, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = case.sample(6, dtype=torch.float32)
    with pytest.raises(ValueError, match="triton") as info:
        case("triton", **inputs)
    assert re.search("chunked|auto", str(info.value)), info.value
