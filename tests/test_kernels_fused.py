"""The fused passes between a model's products: the elementwise kernels against PyTorch in float64, and models that use them
against models that do not, adapters included. Without a GPU in Triton's interpreter; bfloat16 on a GPU alone."""

import statistics

import pytest
import torch
from families import CONFIGS, ids, tiny_model
from op_cases import distance
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from hf_linear.modules import fused, loss
from hf_linear.modules.mlp import GatedMLP
from hf_linear.modules.norm import GatedRMSNorm, RMSNorm, add_norm, project_heads
from hf_linear.modules.projections import project
from hf_linear.modules.rotary import rotate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def fuse(monkeypatch):
    """A switch for the fused paths; they are on at first, in the interpreter too."""

    def switch(on: bool) -> None:
        monkeypatch.setattr(fused, "runs_triton", lambda device: on)

    switch(True)
    return switch


def assert_as_exact_as_pytorch(found, plain, exact):
    """An error against float64 at most twice that of PyTorch's own operations in the same dtype.

    The floor of four roundings to float32 is for sums over all rows, which come in another order.
    """
    for i, (x, y, z) in enumerate(zip(found, plain, exact, strict=True)):
        assert x.dtype == y.dtype and x.shape == y.shape
        allowed = 2 * distance(y, z) + 4 * 2**-23
        assert x.isfinite().all() and distance(x, z) <= allowed, f"{i}: {distance(x, z):.2e} > {allowed:.2e}"


def results(function, inputs, dtype=None):
    """The value of a function and its gradients."""
    inputs = [x.to(dtype or x.dtype).detach().requires_grad_() for x in inputs]
    y = function(*inputs)
    dy = torch.linspace(-1, 2, y.numel(), device=DEVICE, dtype=torch.float64).view_as(y)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


def compare(found, expected, inputs):
    plain, exact = results(expected, inputs), results(expected, inputs, torch.float64)
    assert_as_exact_as_pytorch(results(found, inputs), plain, exact)


def randn(*shape, dtype):
    return torch.randn(shape, device=DEVICE).to(dtype)


@dtypes
@pytest.mark.parametrize("width", [16, 100])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_norm(dtype, width, gated, affine):
    from hf_linear.kernels import fused as kernels

    inputs = [randn(3, 41, 2, width, dtype=dtype)]
    inputs += [randn(3, 41, 2 * width, dtype=dtype)] * gated + [randn(width, dtype=dtype)] * affine

    def take(x, *rest):
        rest = list(rest)
        return x, rest.pop(0) if gated else None, rest.pop(0) if affine else None

    def found(*inputs):
        return kernels.norm(*take(*inputs), 1e-6, dtype)

    def expected(*inputs):
        x, gate, weight = take(*inputs)
        y = F.rms_norm(x, (width,), weight, 1e-6)
        return y if gate is None else y * F.silu(gate).view_as(y)

    compare(found, expected, inputs)


@dtypes
def test_more_rows_than_programs_hold(dtype, monkeypatch):
    from hf_linear.kernels import elementwise
    from hf_linear.kernels import fused as kernels

    monkeypatch.setattr(elementwise, "PROGRAMS", 2)
    monkeypatch.setattr(elementwise, "TILE", 64)
    inputs = [randn(13, 16, dtype=dtype), randn(13, 16, dtype=dtype), randn(16, dtype=dtype)]

    def expected(x, gate, weight):
        return F.rms_norm(x, (16,), weight, 1e-6) * F.silu(gate)

    compare(lambda x, gate, weight: kernels.norm(x, gate, weight, 1e-6, dtype), expected, inputs)


@dtypes
@pytest.mark.parametrize("added", [True, False])
def test_norm_of_a_sum(dtype, added):
    """Both results are used, so that two gradients meet."""
    from hf_linear.kernels import fused as kernels

    inputs = [randn(3, 41, 32, dtype=dtype), randn(32, dtype=dtype)] + [randn(3, 41, 32, dtype=dtype)] * added

    def found(x, weight, y=None):
        return torch.cat(kernels.add_norm(x, y, weight, 1e-6, dtype), -1)

    def expected(x, weight, y=None):
        x = x if y is None else x + y
        return torch.cat([x, F.rms_norm(x, (32,), weight, 1e-6)], -1)

    compare(found, expected, inputs)


@dtypes
def test_swiglu(dtype):
    from hf_linear.kernels import fused as kernels

    inputs = [10 * randn(5, 7, 300, dtype=dtype), randn(5, 7, 300, dtype=dtype)]
    compare(kernels.swiglu, lambda a, b: F.silu(a) * b, inputs)


@dtypes
@pytest.mark.parametrize("n", [1, 16])
def test_decay_far_and_near_one(dtype, n):
    """Each entry by itself, relative to its own size: decays of 1e-20 a token and of 90."""
    from hf_linear.kernels import fused as kernels

    x = torch.cat([torch.linspace(-90, 45, 541), torch.linspace(-1e-2, 1e-2, 21)]).to(DEVICE, dtype)
    for found, exact in zip(
        results(lambda x: kernels.decay(x, n), [x]), results(lambda x: F.logsigmoid(x) / n, [x], torch.float64), strict=True
    ):
        rounded = exact.to(found.dtype)
        tiny = torch.finfo(found.dtype).tiny
        torch.testing.assert_close(found, rounded, rtol=4 * torch.finfo(found.dtype).eps + 4e-6 / n, atol=tiny)


@dtypes
@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize(("width", "turned", "rows"), [(16, 16, 1), (20, 12, 3)])
def test_rotary(dtype, style, width, turned, rows, fuse):
    angles = torch.randn(rows, 37, turned // 2, device=DEVICE, dtype=torch.float64)
    inputs = [randn(3, 37, 2, width, dtype=dtype)]

    def turn(x):
        return rotate(x, angles.to(torch.promote_types(x.dtype, torch.float32)), style, scale=1.5)

    found = results(turn, inputs)
    fuse(False)
    assert_as_exact_as_pytorch(found, results(turn, inputs), results(turn, inputs, torch.float64))


def test_every_element_is_written_and_runs_repeat(fuse, poisoned_memory):
    runs = [gradients(tiny_model("gla", dtype=torch.float32).to(DEVICE)) for _ in range(2)]
    for x, y in zip(*runs, strict=True):
        assert x.isfinite().all() and torch.equal(x, y)


def gradients(model, **options):
    """The loss and every gradient."""
    input_ids = ids(2, 17).to(DEVICE)
    value = model(input_ids, labels=input_ids, use_cache=False, **options).loss
    value.backward()
    return [value.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_learns_as_exactly(found, plain, exact):
    """An error against full precision at most twice that of the model without fused passes.

    A single gradient of that one may come out more exact than its others by chance; then twice their median is allowed. The
    floor is sixteen roundings to float32, what some twenty products come to.
    """
    usual = statistics.median(distance(x, z.double()) for x, z in zip(plain, exact, strict=True))
    for x, y, z in zip(found, plain, exact, strict=True):
        assert x.dtype == y.dtype
        assert distance(x, z.double()) <= 2 * max(distance(y, z.double()), usual, 8 * 2**-23)


@pytest.mark.parametrize("name", [name for name in CONFIGS if "hyena" not in name and "every" not in name])
def test_models_fused_and_not(name, fuse):
    """Values, gradients and the names of the parameters; frozen weights learn nothing."""
    results = []
    for on, dtype in ((True, torch.float32), (False, torch.float32), (False, torch.float64)):
        fuse(on)
        model = tiny_model(name, dtype=torch.float32).to(DEVICE, dtype)
        mlp = next(module for module in model.modules() if isinstance(module, GatedMLP))
        mlp.down_proj.weight.requires_grad_(False)
        mlp.up_proj.weight.requires_grad_(False)
        results.append(gradients(model))
        assert len(results[-1]) == 1 + len(list(model.parameters())) - 2
    assert_learns_as_exactly(*results)


@pytest.mark.parametrize("name", ["gla", "gla-conv-kv-phi", "retnet", "linear-relu-kv", "hybrid-rope"])
def test_autocast_models_fused_and_not(name, fuse):
    """Weights in float32, products in half precision."""
    results = []
    for on, autocast in ((True, True), (False, True), (False, False)):
        fuse(on)
        model = tiny_model(name, dtype=torch.float32).to(DEVICE)
        with torch.autocast(DEVICE, torch.float16, enabled=autocast):
            results.append(gradients(model))
    assert_learns_as_exactly(*results)


@pytest.mark.parametrize("name", ["gla", "gla-conv-kv-phi", "retnet", "linear-relu-kv"])
def test_an_adapter_on_every_linear_learns_and_acts_in_the_fused_model(name, fuse):
    model = tiny_model(name, dtype=torch.float32, num_hidden_layers=1, fuse_linear_cross_entropy=True).to(DEVICE)
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=linears)).train()
    layers = {path: module for path, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert len(layers) == len(linears)
    for layer in layers.values():  # B is zero at first, which would hide A's gradient and the adapter's effect
        nn.init.normal_(layer.lora_B.default.weight, std=0.1)
    input_ids = ids(1, 10).to(DEVICE)
    together = adapted(input_ids=input_ids, labels=input_ids).loss
    together.backward()
    for path, layer in layers.items():
        for matrix in (layer.lora_A.default, layer.lora_B.default):
            assert matrix.weight.grad is not None and matrix.weight.grad.abs().max() > 0, path
        scale, layer.scaling["default"] = layer.scaling["default"], 0.0
        with torch.no_grad():
            assert adapted(input_ids=input_ids, labels=input_ids).loss != together, path
        layer.scaling["default"] = scale


@pytest.mark.parametrize("how", ["hook", "pre-hook", "backward hook", "forward", "subclass", "bias"])
def test_a_linear_with_something_on_it_is_called(how, fuse):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    linear = (Doubled if how == "subclass" else nn.Linear)(4, 3, bias=how == "bias").to(DEVICE)
    seen = []
    if how == "hook":
        linear.register_forward_hook(lambda module, inputs, output: 2 * output)
    elif how == "pre-hook":
        linear.register_forward_pre_hook(lambda module, inputs: 2 * inputs[0])
    elif how == "backward hook":
        linear.register_full_backward_hook(lambda *_: seen.append(1))
    elif how == "forward":
        linear.forward = lambda x: 2 * F.linear(x, linear.weight)
    x = torch.randn(2, 4, device=DEVICE, requires_grad=True)
    (y,) = project(x, linear)
    y.sum().backward()
    wanted = F.linear(x, linear.weight, linear.bias)
    assert torch.equal(y, 2 * wanted) if how not in ("backward hook", "bias") else torch.equal(y, wanted)
    assert bool(seen) == (how == "backward hook")


def test_a_norm_with_a_hook_is_called(fuse):
    norm = RMSNorm(4, eps=1e-6).to(DEVICE)
    norm.register_forward_hook(lambda module, inputs, output: 2 * output)
    x = torch.randn(2, 4, device=DEVICE)
    total, y = add_norm(x, x, norm)
    torch.testing.assert_close(y, 2 * F.rms_norm(2 * x, (4,), eps=norm.eps))
    assert torch.equal(total, 2 * x)

    o, head_norm, linear = x[:, None, None], GatedRMSNorm(4, eps=1e-6).to(DEVICE), nn.Linear(4, 3, bias=False).to(DEVICE)
    plain = project_heads(o, None, head_norm, linear)
    head_norm.register_forward_hook(lambda module, inputs, output: 2 * output)
    torch.testing.assert_close(project_heads(o, None, head_norm, linear), 2 * plain)


def test_compiled_fused_model_has_no_break(fuse):
    model = tiny_model("gla", dtype=torch.float32, num_hidden_layers=1, fuse_linear_cross_entropy=True).to(DEVICE).train()
    input_ids = ids(1, 30).to(DEVICE)
    expected = model(input_ids, labels=input_ids, use_cache=False).loss
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input_ids, labels=input_ids, use_cache=False).loss, expected)


# The loss


@pytest.mark.parametrize("items", [None, 50, torch.tensor(50)], ids=["mean", "number", "tensor"])
@pytest.mark.parametrize("shifted", [False, True])
def test_loss_without_logits(items, shifted, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 7)
    input_ids = ids(2, 30)
    labels = input_ids.masked_fill(ids(2, 30, seed=2) < 16, -100)
    options = {"labels": labels, "num_items_in_batch": items, "use_cache": False}
    if shifted:
        options["shift_labels"] = ids(2, 30, seed=3)
    outputs, grads = [], []
    for fuse_linear_cross_entropy in (False, True):
        model = tiny_model(
            "gla", dtype=torch.float32, logits_scaling=3, fuse_linear_cross_entropy=fuse_linear_cross_entropy
        ).train()
        outputs.append(model(input_ids, **options))
        outputs[-1].loss.backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss)
    torch.testing.assert_close(grads[1], grads[0])
    assert outputs[0].logits is not None and outputs[1].logits is None
    assert model.eval()(input_ids, **options).logits.shape == outputs[0].logits.shape


@dtypes
@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_loss_by_liger(dtype, autocast, fuse, monkeypatch):
    pytest.importorskip("liger_kernel")
    head = nn.Linear(64, 1000, bias=False, device=DEVICE, dtype=dtype)
    x, labels = randn(2, 30, 64, dtype=dtype).requires_grad_(), torch.randint(1000, (2, 30), device=DEVICE)
    labels[:, ::3] = -100
    assert loss.HAS_LIGER and fused.available(x)
    results = []
    for liger in (True, False):
        monkeypatch.setattr(loss, "HAS_LIGER", liger)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            value = loss.linear_cross_entropy(x, head, labels, num_items_in_batch=50)
        results.append([value.detach(), *torch.autograd.grad(value, [x, head.weight])])
    tolerance = 1e-4 if dtype == torch.float32 and not autocast else 2e-2
    for found, expected in zip(*results, strict=True):
        assert distance(found, expected.double()) < tolerance
