"""The Triton kernels of the selective scan and the short convolution against the oracle: in Triton's interpreter where there is
no GPU, in float32 and float16; on a GPU in every dtype, at larger shapes (`make gpu-test`)."""

import copy
from functools import partial

import pytest
import torch
from families import ids, tiny_model
from op_cases import SELECTIVE_SCAN, SHORT_CONV, Case, cotangents, distance, outputs_and_gradients, to

from hf_linear import ops
from hf_linear.ops import gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN, FULL = SELECTIVE_SCAN
CASES = [*SELECTIVE_SCAN, *SHORT_CONV[:2]]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
on_gpu = pytest.mark.gpu
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
# H * K channels of x, V states of the scan, W taps of the convolutions in `op_cases`.
SMALL = {"B": 1, "H": 3, "K": 5, "V": 3}


def sample(case: Case, T: int, dtype: torch.dtype = torch.float32, **options):
    return {name: x.to(DEVICE) for name, x in case.sample(T, dtype=dtype, **(SMALL | options)).items()}


def run(case: Case, backend: str, inputs, bounds=None, **options):
    """o, the state and every gradient."""
    packed = {} if bounds is None else {"cu_seqlens": torch.tensor(bounds, device=DEVICE)}

    def call(**x):
        return case(backend, **x, **packed, **options)

    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    outputs = call(**leaves)
    ends = [dx.to(DEVICE) for dx in cotangents(*(x.cpu() for x in outputs))]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), ends)
    found = {"o": outputs[0].detach(), "state": outputs[1].detach()}
    return found | {f"d{name}": dx for name, dx in zip(leaves, gradients, strict=True)}


def assert_as_exact_as_chunked(case: Case, inputs, bounds=None) -> None:
    """An error against float64 at most twice that of chunked PyTorch, which computes in float32 and rounds to x's dtype.

    The floor is the rounding of float32 itself, for results that come out exact there.
    """
    dtype = inputs["x"].dtype
    exact = run(case, "chunked", to(inputs, torch.float64), bounds)
    chunked = run(case, "chunked", to(inputs, torch.float32), bounds)
    for name, x in run(case, "triton", inputs, bounds).items():
        assert x.isfinite().all(), name
        allowed = 2 * (distance(chunked[name].to(dtype), exact[name]) + 2**-23)
        assert distance(x.to(dtype), exact[name]) <= allowed, (
            f"{name}: {distance(x.to(dtype), exact[name]):.2e} > {allowed:.2e}"
        )


# --- Against the oracle ---


@pytest.mark.parametrize("T", [1, 16, 33])
@cases
def test_odd_lengths(case, T):
    assert_as_exact_as_chunked(case, sample(case, T, B=2 if T == 1 else 1))


@pytest.mark.parametrize(("channels", "states"), [(1, 1), (130, 2), (7, 8), (3, 64)])
def test_odd_widths(channels, states):
    """More channels than a program has, and states for several rounds of the gradients."""
    case, T = (PLAIN, 2) if states == 64 else (FULL, 5)
    assert_as_exact_as_chunked(case, sample(case, T, H=1, K=channels, V=states))


@pytest.mark.parametrize("decay", ["1e-4", "50", "spread", "reset1e4"])
def test_decays(decay):
    assert_as_exact_as_chunked(PLAIN, sample(PLAIN, 20, decay=decay, V=2))


@cases
def test_half_precision(case):
    assert_as_exact_as_chunked(case, sample(case, 20, torch.float16, V=2))


@pytest.mark.parametrize(
    "without",
    [{"D"}, {"z"}, {"dt_bias"}, {"initial_state"}, {"D", "z", "dt_bias", "initial_state"}],
    ids=lambda x: " ".join(sorted(x)),
)
def test_optional_inputs(without):
    inputs = sample(FULL, 9, V=2)
    assert_as_exact_as_chunked(FULL, {name: x for name, x in inputs.items() if name not in without})


def test_several_dtypes():
    """A float32 step size beside half precision, and weights of half precision."""
    inputs = sample(FULL, 9, torch.float16, V=2)
    assert_as_exact_as_chunked(FULL, inputs | {"dt": inputs["dt"].float()})
    inputs = sample(SHORT_CONV[1], 9, torch.float16)
    assert_as_exact_as_chunked(SHORT_CONV[1], inputs | {"w": inputs["w"].float()})


@cases
def test_documents(case):
    """Of no token, of fewer than taps, of a block's 128 tokens, and one that goes on for a token in the next block."""
    bounds = [0, 0, 2, 2, 131] if case in SHORT_CONV else [0, 0, 1, 129, 130]
    assert_as_exact_as_chunked(case, sample(case, bounds[-1], N=4, state=case in (FULL, SHORT_CONV[1]), V=2), bounds)


@pytest.mark.parametrize("bounds", [None, [0, 20, 150], [0, 130, 150]], ids=["whole", "long last", "long first"])
def test_a_row_in_segments(bounds, monkeypatch):
    """Long rows with few channels are cut into segments. Nothing passes the border of two documents in either direction,
    to where the longer of them goes on in another segment."""
    from hf_linear.kernels import layout

    monkeypatch.setattr(layout, "BLOCKS_A_SEGMENT", 1)
    T, cu_seqlens = 150, None if bounds is None else torch.tensor(bounds, device=DEVICE)
    inputs = sample(FULL, T, V=1, H=1, K=9, N=None if bounds is None else 2)
    inputs["dt_bias"] = inputs["dt_bias"] - 4  # so that a segment feels the one before
    assert layout.row_segments(layout.make_layout(1, T, cu_seqlens), 1, inputs["x"].device)[0] > 1
    assert_as_exact_as_chunked(FULL, inputs, bounds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_padding_leaves_the_state_alone(dtype):
    """A step size of softplus(-inf) = 0, and no gradient through it."""
    inputs = sample(FULL, 9, dtype, V=2)
    inputs["dt"][:, :5] = -torch.inf
    found = run(FULL, "triton", inputs)
    assert all(x.isfinite().all() for x in found.values())
    assert (found["ddt"][:, :5] == 0).all() and (found["dB"][:, :5] == 0).all()
    cut = {name: x[:, 5:] if name in FULL.time else x for name, x in inputs.items()}
    torch.testing.assert_close(found["state"], run(FULL, "triton", cut)["state"])


# --- What a caller relies on ---


@cases
def test_every_element_is_written_and_runs_repeat(case, request):
    inputs = sample(case, 20, V=2)
    expected = run(case, "triton", inputs)
    request.getfixturevalue("poisoned_memory")
    for name, x in run(case, "triton", inputs).items():
        assert torch.equal(x, expected[name]), name


@cases
def test_any_memory_layout(case):
    """Every second channel, halves of a projection as they are, transposed states."""
    inputs = sample(case, 9, B=2, V=2)
    odd = {name: torch.stack([x, x], -1)[..., 0] for name, x in inputs.items()}
    odd |= {name: torch.cat([x, x], -1).chunk(2, -1)[1] for name, x in inputs.items() if name in ("x", "z")}
    odd["initial_state"] = inputs["initial_state"].mT.contiguous().mT
    expected = run(case, "triton", inputs)
    for name, x in run(case, "triton", odd).items():
        assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("through", ["o", "state"])
@pytest.mark.parametrize("case", [PLAIN, SHORT_CONV[1]], ids=lambda case: case.name)
def test_one_output_alone_has_gradients(case, through):
    inputs = case.sample(5, dtype=torch.float32, **SMALL)
    expected = outputs_and_gradients(partial(case, "chunked"), inputs, through=through)
    inputs = {name: x.to(DEVICE) for name, x in inputs.items()}
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    outputs = dict(zip(("o", "state"), case("triton", **leaves), strict=True))
    end = dict(zip(("o", "state"), cotangents(*(x.cpu() for x in outputs.values())), strict=True))[through].to(DEVICE)
    found = torch.autograd.grad(outputs[through], list(leaves.values()), end, allow_unused=True, materialize_grads=True)
    for name, dx in zip(leaves, found, strict=True):
        torch.testing.assert_close(dx.cpu(), expected[f"d{name}"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", [FULL, SHORT_CONV[1]], ids=lambda case: case.name)
def test_compiled_equals_eager(case, packed):
    bounds = {"cu_seqlens": torch.tensor([0, 3, 7], device=DEVICE)} if packed else {}
    inputs = sample(case, 7, V=2, N=2 if packed else None)

    def call(x, others):
        o, state = case("triton", **others, **bounds, x=x)
        return o.square().sum() + state.sum()

    leaf = inputs.pop("x").requires_grad_()
    (expected,) = torch.autograd.grad(call(leaf, inputs), leaf)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    (found,) = torch.autograd.grad(compiled(leaf, inputs), leaf)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        (FULL, {"dtype": torch.float64}, r"x must be bfloat16, float16 or float32, got torch.float64: .*chunked"),
        (FULL, {"V": 65}, r"N must be at most 64, got 65: .*chunked"),
        (SHORT_CONV[0], {"dtype": torch.float64}, r"x must be bfloat16, float16 or float32, got torch.float64: .*chunked"),
    ],
)
def test_the_named_backend_serves_or_says_why_not(case, options, message):
    inputs = sample(case, 4, **options)
    with pytest.raises(ValueError, match=message):
        case("triton", **inputs)
    case(**inputs)


def test_too_many_taps():
    x, w = torch.randn(1, 3, 4, device=DEVICE), torch.randn(4, 9, device=DEVICE)
    with pytest.raises(ValueError, match=r"W must be at most 8, got 9: .*chunked"):
        ops.short_conv(x, w, backend="triton")


def test_values_are_checked_where_they_can_be_read():
    inputs = {name: x.cpu() for name, x in sample(PLAIN, 4).items()}
    for name, sign in (("A", -1), ("dt", -1)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            PLAIN("triton", **(inputs | {name: sign * inputs[name]}))


SMALL_MAMBA = {"pattern": "MA", "num_hidden_layers": 2, "mixer_options": {"mamba": {"state_size": 2}}}


# --- One token in place ---

STEPS = [(PLAIN, ops.selective_scan_step), (FULL, ops.selective_scan_step)]
STEPS += [(case, ops.short_conv_step) for case in SHORT_CONV]
steps = pytest.mark.parametrize(("case", "step"), STEPS, ids=[case.name for case, _ in STEPS])
backends = pytest.mark.parametrize("backend", ["reference", "triton"])


def take_step(case, step, inputs, backend):
    """o, and the state, which is written."""
    inputs = dict(inputs)
    return step(state=inputs.pop("initial_state"), **inputs, **case.options, backend=backend)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@steps
def test_step(case, step, dtype, backend):
    inputs = sample(case, 1, dtype, B=3, V=16)
    exact = case("reference", **to(inputs, torch.float64))
    single = case("reference", **to(inputs, torch.float32))
    state, address, before = inputs["initial_state"], inputs["initial_state"].data_ptr(), inputs["initial_state"].clone()
    o, found = take_step(case, step, inputs, backend)
    assert found is state and state.data_ptr() == address and (state.numel() == 0 or not torch.equal(state, before))
    for x, y, z in zip((o, state), single, exact, strict=True):
        assert distance(x, z) <= 2 * (distance(y.to(x.dtype), z) + 2**-23)
    assert o.dtype == dtype


@backends
@steps
def test_step_in_any_memory_layout(case, step, backend):
    inputs = sample(case, 1, B=3, V=5)
    odd = {name: torch.stack([x, x], -1)[..., 0] for name, x in inputs.items()}
    o, state = take_step(case, step, odd, backend)
    expected = take_step(case, step, inputs, backend)
    torch.testing.assert_close(o, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, expected[1], rtol=1e-5, atol=1e-6)


@backends
@pytest.mark.parametrize(("case", "step"), [STEPS[1], STEPS[3]], ids=["selective_scan", "short_conv"])
def test_step_compiled(case, step, backend):
    """On a part of a larger state, as GLA's convolutions hold theirs; the graph keeps the mutation."""
    inputs = sample(case, 1, B=2)
    state = inputs.pop("initial_state")
    held = torch.cat([state, state], -1)

    def call(inputs, held):
        return take_step(case, step, inputs | {"initial_state": held.chunk(2, -1)[1]}, backend)[0]

    found_state = held.clone()
    found = torch.compile(call, fullgraph=True, backend="aot_eager")(inputs, found_state)
    assert torch.equal(found, call(inputs, held))
    assert torch.equal(found_state, held) and not torch.equal(held.chunk(2, -1)[1], state)


@pytest.mark.parametrize("initial", [True, False], ids=["initial_state", "no_initial_state"])
@pytest.mark.parametrize(("case", "step"), [STEPS[1], STEPS[3]], ids=["selective_scan", "short_conv"])
def test_ops_take_the_step_and_leave_their_state_alone(case, step, initial, monkeypatch):
    inputs = sample(case, 1, B=2)
    before = inputs["initial_state"].clone()
    if not initial:
        before.zero_()
    expected = take_step(case, step, inputs | {"initial_state": before.clone()}, "triton")
    monkeypatch.setattr(gpu, "selective_scan", None)
    monkeypatch.setattr(gpu, "short_conv", None)
    state = inputs.pop("initial_state").copy_(before)
    found = case("triton", **inputs, initial_state=state if initial else None)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)
    assert torch.equal(state, before)


@backends
@pytest.mark.parametrize(("case", "step"), [STEPS[1], STEPS[3]], ids=["selective_scan", "short_conv"])
def test_step_errors(case, step, backend):
    inputs = sample(case, 1)
    with pytest.raises(ValueError, match=r"must run without a gradient, got .*: call it under torch.no_grad"):
        take_step(case, step, inputs | {"x": inputs["x"].requires_grad_()}, backend)
    with pytest.raises(ValueError, match=r"must get one token, got T = 2: for more take"):
        take_step(case, step, sample(case, 2), backend)
    with pytest.raises(ValueError, match=r"initial_state must be"):
        take_step(case, step, inputs | {"initial_state": inputs["initial_state"][:, :1]}, backend)
    if backend == "reference":
        with pytest.raises(ValueError, match=r'backend must be "auto" or one of'):
            take_step(case, step, sample(case, 1), "chunked")
    kept = inputs["initial_state"]
    product = torch.ones_like(kept).requires_grad_() * kept
    take_step(case, step, sample(case, 1) | {"initial_state": kept}, backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("kernels", [False, True])
def test_decoding_writes_where_the_states_lie(kernels, monkeypatch):
    """Prefill, then token by token as in one call, the cache's tensors at their addresses."""
    if kernels:
        monkeypatch.setattr(gpu, "scan_chosen", lambda backend, x, A: True)
        monkeypatch.setattr(gpu, "short_conv_chosen", lambda backend, x, w: True)
    model = tiny_model("hybrid-mamba", dtype=torch.float32, **SMALL_MAMBA).to(DEVICE).eval()
    x = ids(2, 9).to(DEVICE)
    with torch.no_grad():
        whole = model(x).logits
        cache = model(x[:, :6]).past_key_values
        layer = cache.layers[0]
        addresses = {name: state.data_ptr() for name, state in layer.states.items()}
        for t in range(6, 9):
            o = model(x[:, t : t + 1], past_key_values=cache).logits
            torch.testing.assert_close(o[:, 0], whole[:, t], rtol=1e-4, atol=1e-4)
            before = {name: state.clone() for name, state in layer.states.items()}
        assert {name: state.data_ptr() for name, state in layer.states.items()} == addresses
    snapshot = copy.deepcopy(cache)
    with torch.no_grad():
        model(x[:, :1], past_key_values=cache)
    for name, state in snapshot.layers[0].states.items():
        assert torch.equal(state, before[name])


def test_models_train_by_the_kernels(monkeypatch):
    """Packed documents and padding, compiled and eager, against chunked PyTorch."""
    model = tiny_model("hybrid-mamba", dtype=torch.float32, **SMALL_MAMBA).to(DEVICE).train()
    x = ids(1, 12).to(DEVICE)

    def gradients(call):
        model.zero_grad()
        loss = call(x, labels=x, use_cache=False, cu_seq_lens_q=torch.tensor([0, 5, 12], device=DEVICE)).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    for chosen in ("scan_chosen", "short_conv_chosen"):
        monkeypatch.setattr(gpu, chosen, lambda backend, x, y: False)
    expected = gradients(model)
    for chosen in ("scan_chosen", "short_conv_chosen"):
        monkeypatch.setattr(gpu, chosen, lambda backend, x, y: True)
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        for found, wanted in zip(gradients(call), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


# --- On a GPU ---


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 1000, 300, 16), (1, 5000, 100, 16), (1, 200, 60, 5), (2, 100, 130, 64)], ids=str)
@cases
def test_gpu_accuracy(case, shape, dtype):
    B, T, D, N = shape
    assert_as_exact_as_chunked(case, sample(case, T, dtype, B=B, H=1, K=D, V=N))


# In float16 a step of 1e4 makes gradients of 4e6, more than it holds.
DECAYS = [(d, decay) for d in DTYPES for decay in PLAIN.decays if (d, decay) != (torch.float16, "reset1e4")]


@on_gpu
@pytest.mark.parametrize(("dtype", "decay"), DECAYS, ids=str)
def test_gpu_decays(dtype, decay):
    assert_as_exact_as_chunked(PLAIN, sample(PLAIN, 300, dtype, B=2, H=1, K=200, V=16, decay=decay))


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases
def test_gpu_documents(case, dtype):
    bounds = [0, 1, 1, 700, 1500, 4000]
    assert_as_exact_as_chunked(case, sample(case, 4000, dtype, N=5, H=1, K=200, V=16), bounds)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@steps
def test_gpu_step(case, step, dtype):
    test_step(case, step, dtype, "triton")


@on_gpu
@cases
def test_gpu_cuda_graph(case):
    inputs = sample(case, 500, torch.bfloat16, H=1, K=200, V=16)
    expected, _ = case("triton", **inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = case("triton", **inputs)
    o.zero_()
    graph.replay()
    assert torch.equal(o, expected)


@on_gpu
@cases
def test_gpu_a_new_length_compiles_nothing(case):
    from hf_linear.kernels.launch import compiled

    def call(B, T, bounds=None):
        run(case, "triton", sample(case, T, torch.bfloat16, B=B, H=1, K=200, V=16, N=bounds and len(bounds) - 1), bounds)

    for T in (200, 4096):  # in one piece and cut into segments
        call(1, T)
        call(1, T, [0, 30, T])
    before = len(compiled)
    for B, T in ((3, 2000), (1, 5000), (1, 77)):
        call(B, T)
    call(1, 6000, [0, 1, 60, 5000, 6000])
    assert len(compiled) == before


@on_gpu
@pytest.mark.parametrize("name", ["hybrid-mamba", "hybrid-jamba"])
def test_gpu_models_compile_without_a_break(name):
    model = tiny_model(name, dtype=torch.bfloat16).to("cuda")
    x = ids(2, 200).to("cuda")
    expected = model(x, labels=x, use_cache=False).loss
    found = torch.compile(model, fullgraph=True)(x, labels=x, use_cache=False).loss
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=0)  # fused bfloat16 arithmetic rounds less often
    found.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
