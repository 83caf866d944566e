"""The Triton kernels against the oracle: in Triton's interpreter where there is no GPU, in float32 and float16 (its bfloat16
products are wrong); on a GPU in every dtype, at larger shapes, compiled and captured (`make gpu-test`)."""

import pytest
import torch
from op_cases import distance
from torch import Tensor
from torch.nn import functional as F

import hf_linear
from hf_linear import ops
from hf_linear.ops import gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_gpu = pytest.mark.gpu
NAMES = ("o", "final state", "dq", "dk", "dv", "dg", "d initial state")
PER_HEAD, PER_TOKEN, PER_CHANNEL = "per head", "per token", "per channel"


def make_inputs(B, T, H, K, V, kind, dtype=torch.float32, documents=None, decay="mild"):
    """q, k, v, g, the initial state, and the gradients of o and of the final state."""
    torch.manual_seed(0)
    shapes = {PER_HEAD: (H,), PER_TOKEN: (B, T, H), PER_CHANNEL: (B, T, H, K)}
    q, k, v, do = (torch.randn(B, T, H, d, device=DEVICE).to(dtype) for d in (K, K, V, V))
    g = torch.randn(shapes[kind], device=DEVICE)
    decays = {
        "mild": lambda: F.logsigmoid(g) / 16,
        "strong": lambda: torch.full_like(g, -50.0),
        "mixed": lambda: -torch.exp(torch.rand_like(g) * 13.1 - 9.2),  # 1e-4 to 50, evenly in the logarithm
    }
    rows = documents or B
    state, d_final = (torch.randn(rows, H, K, V, device=DEVICE) for _ in range(2))
    return [q, k, v, decays[decay](), state], [do, d_final]


def run(inputs, d_outputs, backend, dtype=None, cu_seqlens=None) -> list[Tensor]:
    """o, the final state, and every gradient; that of the initial state, if there is one, is the last."""
    leaves = [x.to(dtype or x.dtype).detach().requires_grad_() for x in inputs if x is not None]
    q, k, v, g, *state = leaves
    op = ops.gated_linear_attention if g.dim() == 4 else ops.linear_attention
    o, final = op(q, k, v, g, scale=0.3, initial_state=state[0] if state else None, cu_seqlens=cu_seqlens, backend=backend)
    gradients = torch.autograd.grad([o, final], leaves, [d.to(x.dtype) for d, x in zip(d_outputs, (o, final), strict=True)])
    return [o, final, *gradients]


def assert_as_exact_as_chunked(inputs, d_outputs, cu_seqlens=None) -> None:
    """An error against float64 at most twice that of chunked PyTorch.

    That one computes in float32 whatever the inputs' dtype; what it returns is rounded to theirs, which is the least error that
    an operator on such inputs can have. The floor is the rounding of float32 itself, for results that come out exact there.

    A decay a head has one number a head for its gradient, the sum over all tokens: what little is left of summands that the
    products round in half precision, where chunked PyTorch sums without rounding. It is held to 16 times.
    """
    dtype = inputs[0].dtype
    exact = run(inputs, d_outputs, "chunked", torch.float64, cu_seqlens)
    chunked = run(inputs, d_outputs, "chunked", torch.float32, cu_seqlens)
    found = run(inputs, d_outputs, "triton", cu_seqlens=cu_seqlens)
    for name, x, y, z in zip(NAMES[: len(found)], found, chunked, exact, strict=True):
        assert x.isfinite().all(), name
        times = 16 if name == "dg" and x.dim() == 1 and dtype != torch.float32 else 2
        allowed = times * (distance(y.to(dtype), z) + 2**-23)
        assert distance(x.to(dtype), z) <= allowed, f"{name}: {distance(x.to(dtype), z):.2e} > {allowed:.2e}"


kinds = pytest.mark.parametrize("kind", [PER_HEAD, PER_TOKEN, PER_CHANNEL])


@kinds
@pytest.mark.parametrize("T", [1, 15, 63, 64, 65, 200])
def test_odd_lengths(T, kind):
    assert_as_exact_as_chunked(*make_inputs(2, T, 2, 16, 32, kind))


@kinds
@pytest.mark.parametrize(("K", "V"), [(60, 100), (96, 20), (200, 48)])
def test_odd_widths(K, V, kind):
    assert_as_exact_as_chunked(*make_inputs(1, 70, 2, K, V, kind))


@kinds
@pytest.mark.parametrize("decay", ["strong", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strong_decays(dtype, decay, kind):
    assert_as_exact_as_chunked(*make_inputs(1, 150, 2, 32, 16, kind, dtype, decay=decay))


@pytest.mark.parametrize("chunk", [0, 1])
def test_a_strong_chunk_and_a_mild_one_in_a_block(chunk):
    """Each form of the gradients makes states of what the other form's chunk left."""
    inputs, d_outputs = make_inputs(1, 120, 1, 32, 16, PER_CHANNEL, torch.float16)
    inputs[3][:, 64 * chunk : 64 * (chunk + 1)] -= 0.3
    assert_as_exact_as_chunked(inputs, d_outputs)


@kinds
def test_half_precision(kind):
    assert_as_exact_as_chunked(*make_inputs(1, 200, 2, 32, 48, kind, torch.float16))


@pytest.mark.parametrize("kind", [PER_HEAD, PER_TOKEN])
@pytest.mark.parametrize("bounds", [None, [0, 5, 5, 140, 200]])
def test_many_channels(bounds, kind):
    """One program serves all of a block's output channels where there are many; half precision alone."""
    cu_seqlens = None if bounds is None else torch.tensor(bounds, device=DEVICE)
    inputs, d_outputs = make_inputs(1, 200, 1, 72, 200, kind, torch.float16, documents=None if bounds is None else 4)
    assert_as_exact_as_chunked(inputs, d_outputs, cu_seqlens)


@kinds
@pytest.mark.parametrize("bounds", [[0, 5, 5, 140, 300], [0, 0, 0, 300], [0, *range(1, 20), 300], [0, 128, 300]])
def test_documents(bounds, kind):
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    assert_as_exact_as_chunked(*make_inputs(1, 300, 2, 16, 16, kind, documents=len(bounds) - 1), cu_seqlens)


@kinds
@pytest.mark.parametrize("bounds", [None, [0, 700, 900, 1100]])
def test_a_row_in_segments(bounds, kind):
    """Long rows with few heads are cut into segments; documents may begin inside one and go on in the next."""
    from hf_linear.kernels.layout import make_layout, row_segments

    cu_seqlens = None if bounds is None else torch.tensor(bounds, device=DEVICE)
    inputs, d_outputs = make_inputs(1, 1100, 1, 16, 16, kind, documents=None if bounds is None else 3)
    assert row_segments(make_layout(1, 1100, cu_seqlens), 1, inputs[0].device)[0] > 1
    assert_as_exact_as_chunked(inputs, d_outputs, cu_seqlens)


@pytest.mark.parametrize("kind", [PER_HEAD, PER_TOKEN])
@pytest.mark.parametrize(
    ("B", "T", "K", "bounds"),
    [
        (2, 70, 72, None),
        (1, 1100, 72, None),
        (2, 150, 136, None),
        (1, 300, 72, [0, 5, 5, 140, 300]),
        (1, 1100, 72, [0, 9, 1100]),
    ],
)
def test_a_state_kept_in_registers(B, T, K, bounds, kind):
    """Large states of a decay a head are not written; long rows are cut into segments there, too."""
    from hf_linear.kernels.scalar import Blocks

    cu_seqlens = None if bounds is None else torch.tensor(bounds, device=DEVICE)
    documents = None if bounds is None else len(bounds) - 1
    (q, k, v, g, initial), d_outputs = make_inputs(B, T, 1, K, 256, kind, torch.float16, documents)
    initial = initial if bounds is None else None
    assert Blocks(q, k, v, g.expand(B, T, 1), 1.0, cu_seqlens).keeps_state(initial)
    assert_as_exact_as_chunked((q, k, v, g, initial), d_outputs, cu_seqlens)


def test_a_document_beside_infinities():
    """A walk reads the next document's tokens with a chunk that a document ends in, and makes nothing of them."""
    (q, k, v, g, _), _ = make_inputs(1, 90, 1, 72, 256, PER_HEAD, torch.float16)
    v[:, 70:] = torch.inf
    bounds = torch.tensor([0, 70, 90], device=DEVICE)
    packed, finals = ops.linear_attention(q, k, v, g, cu_seqlens=bounds, backend="triton")
    assert packed[:, :70].isfinite().all() and finals[0].isfinite().all()


def test_the_table_of_many_documents():
    from hf_linear.kernels.layout import make_layout

    lengths = torch.randint(0, 400, (300,), generator=torch.Generator().manual_seed(0))
    lengths[7] = 128 * 200  # more blocks than are written at a time
    bounds = F.pad(lengths.cumsum(0), (1, 0))
    rows = [
        [start + i, min(128, length - i), n, (i == 0) + 2 * (i + 128 >= length)]
        for n, (start, length) in enumerate(zip(bounds.tolist(), lengths.tolist(), strict=False))
        for i in range(0, length, 128)
    ]
    layout = make_layout(1, int(bounds[-1]), bounds.to(DEVICE))
    table = layout.table.tolist()
    assert table[: len(rows)] == rows
    assert table[len(rows) :] == [[0] * 4] * (layout.row_blocks - len(rows))


@kinds
def test_any_memory_layout(kind):
    """Transposed, expanded and sliced inputs, as projections and views hand them over."""
    (q, k, v, g, state), d_outputs = make_inputs(2, 70, 2, 16, 16, kind)
    odd = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    if g.dim() > 1:
        g = torch.stack([g, g], -1)[..., 0]
    found = run([*odd, g, state.transpose(2, 3).contiguous().transpose(2, 3)], d_outputs, "triton")
    for x, y in zip(found, run([q, k, v, g.contiguous(), state], d_outputs, "triton"), strict=True):
        assert torch.equal(x, y)


@kinds
def test_every_element_is_written_and_runs_repeat(kind, request):
    inputs, d_outputs = make_inputs(1, 200, 2, 20, 24, kind)
    expected = run(inputs, d_outputs, "triton")
    request.getfixturevalue("poisoned_memory")
    found = run(inputs, d_outputs, "triton")
    for name, x, y in zip(NAMES, found, expected, strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("used", ["o", "final"])
def test_one_output_alone_has_gradients(used):
    (q, k, v, g, _), (do, d_final) = make_inputs(1, 70, 2, 16, 16, PER_CHANNEL)
    results = []
    for backend in ("triton", "chunked"):
        leaves = [x.detach().requires_grad_() for x in (q, k, v, g)]
        o, final = ops.gated_linear_attention(*leaves, backend=backend)
        loss = (o * do).sum() if used == "o" else (final * d_final).sum()
        results.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
    for x, y in zip(*results, strict=True):
        assert distance(x, y.double()) < 1e-5 or x.norm() == y.norm() == 0


def test_compiled_equals_eager():
    (q, k, v, g, state), _ = make_inputs(1, 70, 2, 16, 16, PER_CHANNEL)

    def call(q: Tensor) -> Tensor:
        o, final = ops.gated_linear_attention(q, k, v, g, initial_state=state, backend="triton")
        return o.sum() + final.sum()

    leaf = q.requires_grad_()
    (expected,) = torch.autograd.grad(call(leaf), leaf)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    (found,) = torch.autograd.grad(compiled(leaf), leaf)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["GLA", "RetNet"])
def test_models_compile_without_a_break(name, monkeypatch):
    """Forward and backward in one graph each, the recurrences as operators in it."""
    monkeypatch.setattr(gpu, "chosen", lambda backend, q, v: True)
    config = getattr(hf_linear, f"{name}Config")(hidden_size=64, num_hidden_layers=1, num_heads=2, vocab_size=64)
    model = getattr(hf_linear, f"{name}ForCausalLM")(config).to(DEVICE)
    ids = torch.randint(64, (2, 70), device=DEVICE)
    results = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        loss = call(ids, labels=ids, use_cache=False).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)  # sums may be taken in another order


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, r"v must be bfloat16, float16 or float32, got torch.float64: .*chunked"),
        ({"K": 257}, r"K must be at most 256, got 257: use more heads"),
    ],
)
def test_the_named_backend_serves_or_says_why_not(change, message):
    options = {"K": 16, "dtype": torch.float32} | change
    q = torch.randn(1, 70, 1, options["K"], dtype=options["dtype"], device=DEVICE)
    with pytest.raises(ValueError, match=message):
        ops.linear_attention(q, q, q, backend="triton")
    ops.linear_attention(q, q, q)


@on_gpu
@kinds
@pytest.mark.parametrize("decay", ["mild", "mixed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2, 1000, 4, 128, 256), (1, 300, 2, 256, 512), (1, 200, 3, 60, 100)], ids=str)
def test_gpu_accuracy(shape, dtype, decay, kind):
    assert_as_exact_as_chunked(*make_inputs(*shape, kind, dtype, decay=decay))


@on_gpu
@kinds
def test_gpu_documents(kind):
    bounds = torch.tensor([0, 1, 1, 700, 1500, 4000], device=DEVICE)
    assert_as_exact_as_chunked(*make_inputs(1, 4000, 2, 64, 64, kind, torch.bfloat16, documents=5), bounds)


@on_gpu
@pytest.mark.parametrize("name", ["GLA", "RetNet"])
def test_gpu_models_compile_without_a_break(name):
    config = getattr(hf_linear, f"{name}Config")(hidden_size=128, num_hidden_layers=2, num_heads=2, vocab_size=256)
    model = getattr(hf_linear, f"{name}ForCausalLM")(config).to("cuda", torch.bfloat16)
    ids = torch.randint(256, (2, 200), device="cuda")
    expected = model(ids, labels=ids, use_cache=False).loss
    found = torch.compile(model, fullgraph=True)(ids, labels=ids, use_cache=False).loss
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=0)  # fused bfloat16 arithmetic rounds less often
    found.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@on_gpu
def test_gpu_checkpointed_and_autocast_training():
    config = hf_linear.GLAConfig(hidden_size=128, num_hidden_layers=2, num_heads=2, vocab_size=256)
    model = hf_linear.GLAForCausalLM(config).cuda().train()
    ids = torch.randint(256, (2, 200), device="cuda")
    losses = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append((loss.detach(), model.model.embed_tokens.weight.grad.clone()))
    assert torch.equal(losses[0][0], losses[1][0])
    assert torch.equal(losses[0][1], losses[1][1])


@on_gpu
def test_gpu_cuda_graph():
    (q, k, v, g, _), _ = make_inputs(1, 500, 2, 64, 64, PER_CHANNEL, torch.bfloat16)
    expected, _ = ops.gated_linear_attention(q, k, v, g, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = ops.gated_linear_attention(q, k, v, g, backend="triton")
    o.zero_()
    graph.replay()
    assert torch.equal(o, expected)


@on_gpu
@kinds
def test_gpu_a_new_length_compiles_nothing(kind):
    from hf_linear.kernels.launch import compiled

    for B, T, H in ((1, 200, 2), (1, 4096, 2)):  # in one piece and cut into segments
        run(*make_inputs(B, T, H, 64, 64, kind, torch.bfloat16), "triton")
    before = len(compiled)
    for B, T, H in ((3, 2000, 4), (1, 5000, 1), (1, 77, 16)):
        run(*make_inputs(B, T, H, 64, 64, kind, torch.bfloat16), "triton")
    assert len(compiled) == before
