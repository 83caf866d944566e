"""The long convolution's kernels against float64: in Triton's interpreter where there is no GPU, on a GPU at length.

The plain cases are rows that one program holds; PLANS make the passes over columns run at lengths that a CPU can wait for.
"""

import pytest
import torch
from op_cases import distance
from torch import Tensor

import hf_linear
from hf_linear import ops
from hf_linear.ops import gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INPUTS = ("u", "h", "skip", "pre_gate", "post_gate")
# N1 columns of N2 = 256: both paddings of N1, N1 no power of two, T odd, prime, and a multiple of 16
PLANS = [(3, 701), (2, 512), (17, 4301)]
on_gpu = pytest.mark.gpu


def make_inputs(B, D, T, L=None, dtype=torch.float32, absent=()):
    """The inputs, a filter that decays to 5 % over the sequence among them, and the gradients of y and of the state."""
    new = {"device": DEVICE}
    u, pre, post, dy = (torch.randn(B, D, T, **new).to(dtype) for _ in range(4))
    L = L or T
    h = torch.randn(D, L, **new) * torch.exp(-3 * torch.arange(L, **new) / T)
    inputs = dict(zip(INPUTS, (u, h, torch.randn(D, **new), pre, post), strict=True))
    return {name: x for name, x in inputs.items() if name not in absent}, [dy, torch.randn(B, D, T, **new)]


def run(inputs, d_outputs, backend, dtype=None) -> dict[str, Tensor]:
    """y, the state, and the gradient of every input."""
    leaves = {name: x.to(dtype or x.dtype).detach().requires_grad_() for name, x in inputs.items()}
    outputs = ops.long_conv(**leaves, backend=backend)
    d_outputs = [d.to(x.dtype) for d, x in zip(d_outputs, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), d_outputs)
    found = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"y": outputs[0].detach(), "state": outputs[1].detach(), **found}


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As the kernels round a result; the interpreter cuts bfloat16 off."""
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        return (x.float().view(torch.int32) & -65536).view(torch.float32)
    return x.to(dtype)


def assert_accurate(inputs, d_outputs) -> None:
    """float32: a few times its rounding, as three tf32 products for one allow. Else 1e-3, which is twice what products of
    float16 cost; what is returned in bfloat16 1.5 times the error of rounding it."""
    dtype = inputs["u"].dtype
    exact = run(inputs, d_outputs, "chunked", torch.float64)
    for name, x in run(inputs, d_outputs, "triton").items():
        assert x.isfinite().all(), name
        allowed = 5e-6 if dtype == torch.float32 else 1e-3
        if x.dtype == torch.bfloat16:
            allowed = 1.5 * distance(rounded(exact[name], x.dtype), exact[name])
        assert distance(x, exact[name]) <= allowed, f"{name}: {distance(x, exact[name]):.2e} > {allowed:.2e}"


@pytest.fixture
def columns(monkeypatch):
    """Makes the passes over columns run: `columns(N1)`."""
    from hf_linear.kernels import long_conv

    def use(N1: int) -> None:
        monkeypatch.setattr(long_conv, "make_plan", lambda T, half: long_conv.Plan(N1, 256))

    return use


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 2, 15, 97, 256, 400])
def test_rows(T, dtype):
    assert_accurate(*make_inputs(3, 2, T, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N1", "T"), PLANS)
def test_columns(N1, T, dtype, columns):
    columns(N1)
    assert_accurate(*make_inputs(2, 1, T, dtype=dtype))


@pytest.mark.parametrize("absent", [("pre_gate",), ("post_gate",), ("skip",), ("pre_gate", "post_gate", "skip")], ids=str)
@pytest.mark.parametrize("N1", [1, 3])
def test_absent_inputs(N1, absent, columns):
    if N1 > 1:
        columns(N1)
    assert_accurate(*make_inputs(2, 2, 240 * N1, absent=absent))


@pytest.mark.parametrize("N1", [1, 3])
def test_a_filter_longer_than_the_sequence(N1, columns):
    if N1 > 1:
        columns(N1)
    inputs, d_outputs = make_inputs(2, 2, 200 * N1, L=231 * N1)
    assert_accurate(inputs, d_outputs)
    assert run(inputs, d_outputs, "triton")["dh"][:, 200 * N1 :].count_nonzero() == 0


@pytest.mark.parametrize("N1", [1, 3])
def test_any_scale(N1, columns):
    """float16 products do not see the size of the inputs nor the filter's; a row of zeros has no size to divide by."""
    if N1 > 1:
        columns(N1)
    inputs, d_outputs = make_inputs(2, 2, 200 * N1, dtype=torch.bfloat16)
    inputs["u"] *= 1e-12
    inputs["h"] *= 1e9
    inputs["u"][0, 1] = 0
    d_outputs[0] *= 1e8
    assert_accurate(inputs, d_outputs)
    assert run(inputs, d_outputs, "triton")["y"][0, 1].count_nonzero() == 0


@pytest.mark.parametrize("scratch", [1, 2**25])
def test_channels_share_scratch(scratch, columns, monkeypatch):
    """One channel at a time, and the last group smaller."""
    from hf_linear.kernels import long_conv

    columns(3)
    monkeypatch.setattr(long_conv, "SCRATCH", scratch)
    assert_accurate(*make_inputs(2, 3, 700))


@pytest.mark.parametrize("most", [1, 2])
def test_parts_of_a_batch(most, monkeypatch):
    from hf_linear.kernels import long_conv

    monkeypatch.setattr(long_conv.Convolution, "parts", lambda self, _: (-(-self.B // most), most))
    assert_accurate(*make_inputs(5, 2, 100))


@pytest.mark.parametrize("N1", [1, 3])
def test_any_memory_layout(N1, columns):
    """Transposed and expanded inputs, as projections and Hyena's filters hand them over."""
    if N1 > 1:
        columns(N1)
    inputs, d_outputs = make_inputs(2, 2, 200 * N1)
    odd = {name: x.mT.contiguous().mT if x.dim() > 1 else x for name, x in inputs.items()}
    d_odd = [d.mT.contiguous().mT for d in d_outputs]
    expected = run(inputs, d_outputs, "triton")
    for name, x in run(odd, d_odd, "triton").items():
        assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("N1", [1, 3])
def test_every_element_is_written_and_runs_repeat(N1, columns, request):
    if N1 > 1:
        columns(N1)
    inputs, d_outputs = make_inputs(2, 2, 230 * N1 + 1, L=250 * N1)
    expected = run(inputs, d_outputs, "triton")
    request.getfixturevalue("poisoned_memory")
    for name, x in run(inputs, d_outputs, "triton").items():
        assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("used", ["y", "state"])
def test_one_output_alone_has_gradients(used):
    inputs, (dy, d_state) = make_inputs(2, 2, 70)
    results = []
    for backend in ("triton", "chunked"):
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        y, state = ops.long_conv(**leaves, backend=backend)
        loss = (y * dy).sum() if used == "y" else (state * d_state).sum()
        results.append(torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True))
    for x, z in zip(*results, strict=True):
        assert distance(x, z) < 5e-6 or x.norm() == z.norm() == 0


def test_gates_of_another_dtype_have_gradients_of_their_own():
    inputs, d_outputs = make_inputs(2, 2, 70, dtype=torch.float16)
    inputs["post_gate"] = inputs["post_gate"].float()
    assert run(inputs, d_outputs, "triton")["dpost_gate"].dtype == torch.float32
    assert_accurate(inputs, d_outputs)


@pytest.mark.parametrize("N1", [1, 3])
def test_compiled_equals_eager(N1, columns):
    if N1 > 1:
        columns(N1)
    inputs, (dy, _) = make_inputs(2, 2, 170 * N1)
    names = list(inputs)

    def call(*leaves: Tensor) -> Tensor:
        y, state = ops.long_conv(**dict(zip(names, leaves, strict=True)), backend="triton")
        return (y * dy).sum() + state.sum()

    leaves = [x.requires_grad_() for x in inputs.values()]
    expected = torch.autograd.grad(call(*leaves), leaves)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for x, z in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        assert torch.equal(x, z)


def test_hyena_runs_on_them(monkeypatch):
    config = hf_linear.HyenaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=32, max_position_embeddings=128)
    model = hf_linear.HyenaForCausalLM(config).to(DEVICE)
    ids = torch.randint(32, (2, 70), device=DEVICE)
    results = []
    for kernels in (True, False):
        monkeypatch.setattr(gpu, "long_conv_chosen", lambda *_, kernels=kernels: kernels)
        model.zero_grad()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for x, z in zip(*results, strict=True):
        assert distance(x, z) < 1e-4


def test_plans():
    from hf_linear.kernels import long_conv

    for dtype, longest in gpu.MAX_CONV.items():
        half = dtype != torch.float32
        assert longest == long_conv.MAX_COLUMN * long_conv.LONGEST_ROW[half]
        for T in (1, 256, 257, 2048, 2049, 8192, 8193, 32768, 131072, 160002, longest - 1, longest):
            plan = long_conv.make_plan(T, half)
            assert plan.N1 * plan.N2 >= T, T
            assert plan.N1 <= plan.P1 <= long_conv.MAX_COLUMN, T
    plan = long_conv.make_plan(160002, True)
    assert plan.N1 * plan.N2 < 1.05 * 160002  # and not the next power of two


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(1, 2, 6, dtype=torch.float64)}, r"bfloat16, float16 or float32, got torch.float64: .*chunked"),
        ({"pre_gate": torch.zeros(1, 2, 6, dtype=torch.float64)}, r"got torch.float64: .*chunked"),
        ({"initial_state": torch.zeros(1, 2, 3)}, r"initial_state must be None, got 3 tokens: .*chunked"),
        ({"cu_seqlens": torch.tensor([0, 2, 6])}, r"cu_seqlens must be None, got 3 boundaries: .*chunked"),
        (
            {"u": torch.zeros(1, 2, 2**18 + 1), "h": torch.zeros(2, 2**18 + 1)},
            r"T must be at most 262144 .*got 262145: .*chunked",
        ),
    ],
    ids=["float64", "gate in float64", "history", "documents", "too long"],
)
def test_the_named_backend_serves_or_says_why_not(change, message):
    inputs = {"u": torch.randn(1, 2, 6), "h": torch.randn(2, 9)} | change
    with pytest.raises(ValueError, match=message):
        ops.long_conv(**{name: x.to(DEVICE) for name, x in inputs.items()}, backend="triton")


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (3, 5, 777),
        (3, 5, 2048),
        (3, 5, 4001),
        (2, 5, 8192),
        (2, 5, 10007),
        (2, 3, 32768),
        (1, 2, 131072),
        (1, 3, 160002),
        (1, 2, 262144),
    ],
    ids=str,
)
def test_gpu_accuracy(shape, dtype):
    assert_accurate(*make_inputs(*shape, dtype=dtype))


@on_gpu
@pytest.mark.parametrize("T", [1000002, 1048576])
def test_gpu_a_million_tokens(T):
    assert_accurate(*make_inputs(1, 2, T, dtype=torch.bfloat16))


@on_gpu
@pytest.mark.parametrize("T", [2000, 20000])
def test_gpu_cuda_graph(T):
    inputs, _ = make_inputs(2, 8, T, dtype=torch.bfloat16)
    expected, _ = ops.long_conv(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = ops.long_conv(**inputs)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


@on_gpu
def test_gpu_a_new_length_compiles_nothing():
    from hf_linear.kernels.launch import compiled

    for T in (2000, 2001, 9600, 9601):
        run(*make_inputs(2, 4, T, dtype=torch.bfloat16), "triton")
    before = len(compiled)
    for B, D, T in ((3, 8, 1600), (1, 5, 1999), (4, 3, 8208), (1, 4, 8999)):
        run(*make_inputs(B, D, T, dtype=torch.bfloat16), "triton")
    assert len(compiled) == before
