"""One token in place: the kernel against the oracle (in Triton's interpreter where there is no GPU), and what holds a state."""

import copy

import pytest
import torch
from families import FIXED_STATE, ids, logits, new_cache, tiny_model
from op_cases import distance
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, StaticCache

import hf_linear
from hf_linear import ops
from hf_linear.ops import gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NONE, PER_HEAD, PER_TOKEN, PER_CHANNEL = "none", "per head", "per token", "per channel"

on_gpu = pytest.mark.gpu
kinds = pytest.mark.parametrize("kind", [NONE, PER_HEAD, PER_TOKEN, PER_CHANNEL])
backends = pytest.mark.parametrize("backend", ["reference", "triton"])
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make_inputs(B, H, K, V, kind, dtype=torch.float32, decay="mild") -> list[Tensor | None]:
    """q, k, v, g and the state."""
    q, k, v = (torch.randn(B, 1, H, d, device=DEVICE).to(dtype) for d in (K, K, V))
    state = torch.randn(B, H, K, V, device=DEVICE)
    if kind == NONE:
        return [q, k, v, None, state]
    g = torch.randn({PER_HEAD: (H,), PER_TOKEN: (B, 1, H), PER_CHANNEL: (B, 1, H, K)}[kind], device=DEVICE)
    decays = {
        "mild": lambda: F.logsigmoid(g) / 16,
        "strong": lambda: torch.full_like(g, -50.0),
        "mixed": lambda: -torch.exp(torch.rand_like(g) * 13.1 - 9.2),  # 1e-4 to 50, evenly in the logarithm
        "reset": lambda: torch.full_like(g, -torch.inf),
    }
    return [q, k, v, decays[decay](), state]


def op_of(g: Tensor | None):
    return ops.gated_linear_attention if g is not None and g.dim() == 4 else ops.linear_attention


def oracle(q, k, v, g, state, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    q, k, v, g, state = (None if x is None else x.to(dtype) for x in (q, k, v, g, state))
    return op_of(g)(q, k, v, g, scale=0.3, initial_state=state, backend="reference")


def assert_as_exact_as_oracle(inputs, backend) -> None:
    """An error against float64 at most twice that of the oracle in float32, rounded to v's dtype; the floor is float32's own
    rounding, for results that come out exact there."""
    exact, single, v = oracle(*inputs), oracle(*inputs, dtype=torch.float32), inputs[2]
    state = inputs[-1]
    o, found = ops.recurrent_step(*inputs, scale=0.3, backend=backend)
    assert found is state
    for name, x, y, z in zip(("o", "state"), (o, state), single, exact, strict=True):
        assert x.isfinite().all(), name
        allowed = 2 * (distance(y.to(x.dtype), z) + 2**-23)
        assert distance(x, z) <= allowed, f"{name}: {distance(x, z):.2e} > {allowed:.2e}"
    assert o.dtype == v.dtype


# --- The op ---


@backends
@kinds
@pytest.mark.parametrize(("K", "V"), [(16, 32), (1, 1), (60, 100), (200, 17), (256, 40)])
def test_odd_widths(K, V, kind, backend):
    assert_as_exact_as_oracle(make_inputs(3, 2, K, V, kind), backend)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    # Triton's interpreter cuts off what does not fit into bfloat16, where a GPU rounds: test_gpu_accuracy
    [*(("reference", dtype) for dtype in DTYPES), ("triton", torch.float32), ("triton", torch.float16)],
    ids=str,
)
@kinds
def test_dtypes(backend, dtype, kind):
    assert_as_exact_as_oracle(make_inputs(2, 3, 32, 48, kind, dtype), backend)


@backends
@pytest.mark.parametrize("kind", [PER_HEAD, PER_TOKEN, PER_CHANNEL])
@pytest.mark.parametrize("decay", ["strong", "mixed", "reset"])
def test_strong_decays(decay, kind, backend):
    assert_as_exact_as_oracle(make_inputs(2, 3, 32, 48, kind, decay=decay), backend)


def test_inputs_of_several_dtypes():
    """Under autocast q and k come in float32 from the rotation, v in half precision from its projection."""
    q, k, v, g, state = make_inputs(2, 3, 32, 48, PER_HEAD)
    assert_as_exact_as_oracle([q, k, v.half(), g, state], "triton")
    q, k, v, g, state = make_inputs(2, 3, 32, 48, PER_CHANNEL)
    assert_as_exact_as_oracle([q, k.bfloat16(), v, g.half(), state], "triton")


@backends
@kinds
def test_any_memory_layout(kind, backend):
    """Transposed, expanded and sliced inputs, a transposed state among them."""
    q, k, v, g, state = make_inputs(2, 3, 16, 24, kind)
    odd = [torch.stack([x, x], -1)[..., 0] for x in (q, k, v)]
    odd_g = g
    if kind == PER_TOKEN:
        g = odd_g = g[:1].expand(2, 1, 3)
    elif kind != NONE:
        odd_g = torch.stack([g, g], -1)[..., 0]
    odd_state = state.clone().transpose(2, 3).contiguous().transpose(2, 3)
    found, _ = ops.recurrent_step(*odd, odd_g, odd_state, backend=backend)
    expected, _ = ops.recurrent_step(q, k, v, g, state, backend=backend)
    assert not odd_state.is_contiguous()
    # one product of matrices in another memory layout
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(odd_state, state)


@backends
def test_every_element_is_written(backend, poisoned_memory):
    o, state = ops.recurrent_step(*make_inputs(2, 3, 20, 23, PER_CHANNEL), backend=backend)
    assert o.isfinite().all() and state.isfinite().all()


@backends
def test_in_place(backend):
    q, k, v, g, state = make_inputs(2, 3, 16, 24, PER_CHANNEL)
    before, address = state.clone(), state.data_ptr()
    _, returned = ops.recurrent_step(q, k, v, g, state, backend=backend)
    assert returned is state and state.data_ptr() == address
    assert not torch.equal(state, before)


@backends
def test_a_graph_that_kept_the_state_says_so(backend):
    q, k, v, g, state = make_inputs(2, 3, 16, 24, PER_CHANNEL)
    product = torch.ones_like(state).requires_grad_() * state
    ops.recurrent_step(q, k, v, g, state, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@kinds
@pytest.mark.parametrize("initial", [True, False], ids=["initial_state", "no_initial_state"])
def test_ops_take_the_kernel_and_leave_their_state_alone(initial, kind, monkeypatch):
    """The functional form of one token without a gradient, by the same launch."""
    q, k, v, g, state = make_inputs(2, 3, 16, 24, kind)
    if not initial:
        state = torch.zeros_like(state)
    expected = ops.recurrent_step(q, k, v, g, state.clone(), backend="triton")
    monkeypatch.setattr(gpu, "attend", None)  # the kernels for chunks
    before = state.clone()
    found = op_of(g)(q, k, v, g, initial_state=state if initial else None, backend="triton")
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)
    assert torch.equal(state, before)


@pytest.mark.parametrize("wants", ["q", "state"])
def test_ops_with_a_gradient_take_the_chunk_kernels(wants):
    q, k, v, g, state = make_inputs(2, 3, 16, 24, PER_CHANNEL)
    leaf = {"q": q, "state": state}[wants].requires_grad_()
    found, expected = (
        torch.autograd.grad(sum(x.sum() for x in op_of(g)(q, k, v, g, initial_state=state, backend=backend)), leaf)[0]
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_packed_documents_of_one_token_take_the_chunk_kernels():
    """An empty document and one token: two states."""
    q, k, v, g, _ = make_inputs(1, 3, 16, 24, PER_CHANNEL)
    states, bounds = torch.randn(2, 3, 16, 24, device=DEVICE), torch.tensor([0, 0, 1], device=DEVICE)
    found, expected = (
        ops.gated_linear_attention(q, k, v, g, initial_state=states, cu_seqlens=bounds, backend=backend)
        for backend in ("triton", "reference")
    )
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"T": 2}, r"must get one token, got T = 2: .*linear_attention"),
        ({"g": (2, 1, 3, 5)}, r"g must be \[H\], \[B, 1, H\] or \[B, 1, H, K\] = \[2, 1, 3, 16\], got \[2, 1, 3, 5\]"),
        ({"state": torch.float64}, r"initial_state must be .* in torch.float32, got .* torch.float64"),
        ({"gradient": True}, r"must run without a gradient, got .*: call it under torch.no_grad"),
        ({"backend": "chunked"}, r'backend must be "auto" or one of .*reference.*, got \'chunked\''),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_errors(change, message):
    q, k, v, g, state = make_inputs(2, 3, 16, 24, PER_CHANNEL)
    if "T" in change:
        q, k, v, g = (x.repeat(1, 2, *[1] * (x.dim() - 2)) for x in (q, k, v, g))
    if "g" in change:
        g = g.new_zeros(change["g"])
    state = state.to(change.get("state", torch.float32)).requires_grad_("gradient" in change)
    before = state.detach().clone()
    with pytest.raises(ValueError, match=message):
        ops.recurrent_step(q, k, v, g, state, backend=change.get("backend", "auto"))
    assert torch.equal(state, before)


@backends
def test_compiled_equals_eager(backend):
    """Also a step of whose results nothing but the state is used."""
    q, k, v, g, state = make_inputs(2, 3, 16, 24, PER_CHANNEL)
    other, address = state.clone(), state.data_ptr()

    def two_steps(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> Tensor:
        ops.recurrent_step(q, k, v, g, state, backend=backend)
        return ops.recurrent_step(k, q, v, g, state, backend=backend)[0]

    expected = two_steps(q, k, v, g, other)
    compiled = torch.compile(two_steps, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, g, state), expected)
    assert torch.equal(state, other) and state.data_ptr() == address


# --- Models: the state in the cache ---


@pytest.fixture(params=["torch", "triton"])
def decode(request, monkeypatch) -> torch.dtype:
    """ "auto" means PyTorch or the kernels; the dtype to compute in, which is not float64 for them."""
    if request.param == "torch":
        return torch.float64
    monkeypatch.setattr(gpu, "chosen", lambda backend, q, v: True)
    return torch.float32


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Logits are of order 1: float64 shows the algorithm, float32 rounds at 6e-8 and a few layers amplify it."""
    return {"rtol": 0, "atol": 1e-10 if dtype == torch.float64 else 2e-4}


def state_addresses(cache) -> list[int]:
    return [layer.states["recurrent"].data_ptr() for layer in cache.layers]


def model_of(name: str, dtype: torch.dtype, **overrides) -> PreTrainedModel:
    return tiny_model(name, dtype=dtype, **overrides).to(DEVICE)


@pytest.mark.parametrize("name", FIXED_STATE)
@torch.no_grad()
def test_token_by_token_at_one_address(name, decode, monkeypatch):
    """Prefill, then one token at a time: the logits of one call, the state written where it lies, by the step alone."""
    model, x = model_of(name, decode), ids(2, 15).to(DEVICE)
    expected = logits(model, x)
    cache = new_cache(model)
    found = [model(x[:, :9], past_key_values=cache).logits]
    addresses = state_addresses(cache)
    for op in ("linear_attention", "gated_linear_attention"):  # as the mixers know them
        for module in ("linear_attention", "retention", "gla"):
            monkeypatch.setattr(f"hf_linear.mixers.{module}.{op}", None, raising=False)
    for token in x[:, 9:].split(1, dim=1):
        found.append(model(token, past_key_values=cache).logits)
        assert state_addresses(cache) == addresses
    torch.testing.assert_close(torch.cat(found, 1), expected, **tolerance(decode))


class Touching(TorchDispatchMode):
    """The names of the operators that are given one of `tensors`, or a view of it."""

    def __init__(self, tensors: list[Tensor]):
        super().__init__()
        self.addresses, self.names = {x.data_ptr() for x in tensors}, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [*args, *(kwargs or {}).values()]
        if any(isinstance(x, Tensor) and x.data_ptr() in self.addresses for x in given):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["gla-conv-kv-phi", "retnet", "linear-relu-kv"])
@torch.no_grad()
def test_one_operator_a_layer_touches_a_state(name, monkeypatch):
    """Nothing copies, clears or converts it before or after."""
    monkeypatch.setattr(gpu, "chosen", lambda backend, q, v: True)
    model, x = model_of(name, torch.float32), ids(2, 3).to(DEVICE)
    cache = new_cache(model)
    model(x, past_key_values=cache)
    with Touching([layer.states["recurrent"] for layer in cache.layers]) as touching:
        model(x[:, :1], past_key_values=cache)
    assert touching.names == ["hf_linear.step.default"] * model.config.num_hidden_layers


@pytest.mark.parametrize("name", ["gla-conv-kv-phi", "retnet", "linear-relu-kv"])
@torch.no_grad()
def test_a_copy_goes_its_own_way(name, decode):
    """A snapshot taken between two tokens is not written through."""
    model, x = model_of(name, decode), ids(2, 12).to(DEVICE)
    cache = new_cache(model)
    model(x[:, :8], past_key_values=cache)
    model(x[:, 8:9], past_key_values=cache)
    snapshot = copy.deepcopy(cache)
    for token in ids(2, 3, seed=5).to(DEVICE).split(1, dim=1):
        model(token, past_key_values=cache)
    found = torch.cat([model(token, past_key_values=snapshot).logits for token in x[:, 9:].split(1, dim=1)], 1)
    torch.testing.assert_close(found, logits(model, x)[:, 9:], **tolerance(decode))


@pytest.mark.parametrize("prefix", [0, 4], ids=["from_the_start", "after_a_prefix_without"])
@pytest.mark.parametrize("name", ["gla-conv-kv-phi", "retnet", "linear-relu-kv"])
def test_gradients_flow_through_the_cache(name, prefix):
    """Token by token with a gradient: nothing is written over what backward needs."""
    model, x = model_of(name, torch.float64), ids(2, 9).to(DEVICE)
    cache = new_cache(model)
    if prefix:
        with torch.no_grad():
            model(x[:, :prefix], past_key_values=cache)
    at_once, x = copy.deepcopy(cache), x[:, prefix:]
    weights = torch.randn(2, x.shape[1], model.config.vocab_size, device=DEVICE, dtype=torch.float64)
    parameters = list(model.parameters())
    expected = torch.autograd.grad((weights * model(x, past_key_values=at_once).logits).sum(), parameters)
    found = [model(token, past_key_values=cache).logits for token in x.split(1, dim=1)]
    with torch.no_grad():  # a state that belongs to a graph is left as it is, also by those who want none
        model(x[:, :1], past_key_values=cache)
    gradients = torch.autograd.grad((weights * torch.cat(found, 1)).sum(), parameters)
    for a, b in zip(gradients, expected, strict=True):
        scale = b.abs().max()
        torch.testing.assert_close(a / scale, b / scale, **tolerance(torch.float64))


@pytest.mark.parametrize("name", ["gla-conv-kv-phi", "retnet-torchscale", "linear-relu-kv"])
@torch.no_grad()
def test_static_cache_compiles_once(name, decode, dynamo):
    """One graph for every token, without a break, on states whose addresses stay."""
    model, x = model_of(name, decode, num_hidden_layers=1), ids(2, 13).to(DEVICE)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    cache = StaticCache(config=model.config, max_cache_len=16)
    found = [model(x[:, :9], past_key_values=cache).logits]
    addresses = state_addresses(cache)
    for token in x[:, 9:].split(1, dim=1):
        found.append(compiled(token, past_key_values=cache).logits)
    assert state_addresses(cache) == addresses
    assert len(graphs) == 1
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum(target in ("addcmul_", "hf_linear.step") for target in targets) == 1
    torch.testing.assert_close(torch.cat(found, 1), logits(model, x), **tolerance(decode))


# --- On a GPU ---


@on_gpu
@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 4, 128, 256), (32, 4, 256, 512), (3, 5, 60, 257)], ids=str)
def test_gpu_accuracy(shape, dtype, kind):
    assert_as_exact_as_oracle(make_inputs(*shape, kind, dtype), "triton")


@on_gpu
@kinds
def test_gpu_one_launch(kind):
    inputs = make_inputs(2, 4, 128, 256, kind, torch.bfloat16)
    ops.recurrent_step(*inputs, backend="triton")
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ops.recurrent_step(*inputs, backend="triton")
        torch.cuda.synchronize()
    launched = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(launched) == 1 and "step_kernel" in launched[0], launched


@on_gpu
def test_gpu_a_new_batch_compiles_nothing():
    from hf_linear.kernels.step import step_kernel

    def compiled() -> int:
        return sum(len(cache[0]) for cache in step_kernel.device_caches.values())

    for kind in (PER_HEAD, PER_TOKEN, PER_CHANNEL):
        ops.recurrent_step(*make_inputs(2, 4, 64, 64, kind, torch.bfloat16), backend="triton")
    before = compiled()
    for B, H in ((1, 1), (1, 4), (3, 5), (32, 16)):
        for kind in (PER_HEAD, PER_TOKEN, PER_CHANNEL):
            ops.recurrent_step(*make_inputs(B, H, 64, 64, kind, torch.bfloat16), backend="triton")
    assert compiled() == before


@on_gpu
def test_gpu_cuda_graph():
    q, k, v, g, state = make_inputs(2, 4, 64, 64, PER_CHANNEL, torch.bfloat16)
    start = state.clone()
    expected = [ops.recurrent_step(q, k, v, g, state, backend="triton")[0] for _ in range(3)]
    expected_state = state.clone()
    state.copy_(start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = ops.recurrent_step(q, k, v, g, state, backend="triton")
    for x in expected:
        graph.replay()
        assert torch.equal(o, x)
    assert torch.equal(state, expected_state)


@on_gpu
@pytest.mark.parametrize("name", ["GLA", "RetNet"])
@torch.no_grad()
def test_gpu_decoding_by_cuda_graphs(name, monkeypatch, dynamo):
    """The model under `mode="reduce-overhead"` with a static cache: the logits of one call, the states where they were."""
    monkeypatch.setattr(gpu, "chosen", lambda backend, q, v: True)
    config = getattr(hf_linear, f"{name}Config")(hidden_size=128, num_hidden_layers=2, num_heads=2, vocab_size=256)
    model = getattr(hf_linear, f"{name}ForCausalLM")(config).to("cuda", torch.float32).eval()
    x = torch.randint(256, (2, 40), device="cuda")
    expected = model(x, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    cache = StaticCache(config=config, max_cache_len=40)
    found = [model(x[:, :30], past_key_values=cache).logits]
    addresses = state_addresses(cache)
    for token in x[:, 30:].split(1, dim=1):
        torch.compiler.cudagraph_mark_step_begin()
        found.append(compiled(token, past_key_values=cache).logits.clone())
    assert state_addresses(cache) == addresses
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-3, atol=1e-3)  # prefill in tf32 products, steps not
