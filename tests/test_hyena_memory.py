"""What a Hyena layer keeps for its backward pass, and that computing the rest again changes no gradient."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from families import tiny_model
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_linear.mixers.hyena import HyenaFilter

LENGTH = 200
FILTERS = ["hyena", "hyena-order3", "hyena-plain-filter"]  # each a window of its own; the last one is normalised


@contextmanager
def kept() -> Iterator[dict[int, int]]:
    """The bytes of every piece of memory that autograd holds on to, by its address."""
    found: dict[int, int] = {}
    alive = []  # or the next piece of memory may come at the address of one that is gone

    def pack(x: Tensor) -> Tensor:
        alive.append(x)
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield found


def new_filter(name: str, **options) -> HyenaFilter:
    return next(module for module in tiny_model(name, **options).modules() if isinstance(module, HyenaFilter))


def plain(filter: HyenaFilter, length: int) -> Tensor:
    """Equation by equation, every activation kept."""
    x = filter.z[:length]
    for layer in filter.layers:
        x = torch.sin(filter.freq * layer(x))
    h = filter.out(x)
    if filter.config.filter_modulate:
        delta = torch.linspace(math.log(0.01) / 1.5, math.log(0.01) / 0.3, filter.channels, dtype=h.dtype)
        t = torch.linspace(0, 1, filter.length, dtype=h.dtype)[:length, None]
        h = h * (torch.exp(-t * delta.abs()) + filter.config.filter_shift)
    if filter.config.filter_normalize:
        h = h / h.abs().sum(-1, keepdim=True)
    return h.T


def gradients(filter: HyenaFilter, h: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(h.shape, dtype=h.dtype, generator=torch.Generator().manual_seed(0))
    trained = {name: p for name, p in filter.named_parameters() if p.requires_grad and name != "skip"}
    return dict(zip(trained, torch.autograd.grad((h * weights).sum(), list(trained.values())), strict=True))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Sums of float64 in another order, beside the largest."""
    for parameter, gradient in expected.items():
        tolerance = 1e-10 * gradient.abs().max().item()
        torch.testing.assert_close(found[parameter], gradient, rtol=0, atol=tolerance, msg=lambda m, p=parameter: f"{p}: {m}")


@pytest.mark.parametrize("blocks", [1, 7])
@pytest.mark.parametrize("name", FILTERS)
def test_filter_in_blocks_is_the_plain_one(name, blocks, monkeypatch):
    """In float64; sines of frequency 14 magnify rounding at each of three layers."""
    filter = new_filter(name, train_filter_positions=True, train_freq=True)
    monkeypatch.setattr(HyenaFilter, "NUMBERS", -(-LENGTH // blocks) * filter.channels)
    expected, (found, _) = plain(filter, LENGTH), filter(LENGTH)
    torch.testing.assert_close(found.flatten(0, 1), expected, rtol=0, atol=1e-11)
    expected, found = gradients(filter, expected), gradients(filter, found.flatten(0, 1))
    assert {"z", "freq"} <= found.keys()
    assert_same(found, expected)


@pytest.mark.parametrize("name", FILTERS)
def test_nothing_of_a_filter_is_kept_but_itself(name, monkeypatch):
    """Its MLP alone would keep 6 * 64 numbers a position, for 32 or 64 of the filter."""
    filter = new_filter(name, filter_order=64).float()
    monkeypatch.setattr(HyenaFilter, "NUMBERS", 64 * filter.channels)
    with kept() as found:
        h, _ = filter(LENGTH)
        (h * torch.randn_like(h)).sum()
    ours = {p.untyped_storage().data_ptr() for p in filter.parameters()}
    assert sum(n for address, n in found.items() if address not in ours) <= 2 * h.nbytes  # the filter, and what it met here


def test_work_space_of_a_filter_is_that_of_a_block(monkeypatch):
    """Twice the positions, the same largest activation, with and without a gradient."""
    filter, sizes = new_filter("hyena", filter_order=64).float(), []
    monkeypatch.setattr(HyenaFilter, "NUMBERS", 32 * filter.channels)
    filter.out.register_forward_hook(lambda module, inputs, output: sizes.append(inputs[0].numel()))
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            h, _ = filter(LENGTH)
        if enabled:
            h.sum().backward()
    assert max(sizes) == 32 * 64
    assert len(sizes) == 3 * 7  # every block once, again in the backward pass, and once without


def test_adapter_on_a_filter_drops_the_same_numbers_again():
    """Dropout of LoRA: the second evaluation must meet the first one's."""
    model = tiny_model("hyena", num_hidden_layers=1)
    paths = [path for path, m in model.named_modules() if isinstance(m, nn.Linear) and "implicit_filter" in path]
    adapted = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.5, target_modules=paths)).train()
    filter = next(module for module in adapted.modules() if isinstance(module, HyenaFilter))
    for layer in (*filter.layers, filter.out):
        nn.init.normal_(layer.lora_B.default.weight)
    torch.manual_seed(1)
    expected = gradients(filter, plain(filter, LENGTH))
    torch.manual_seed(1)
    found = filter(LENGTH)[0].flatten(0, 1)
    torch.rand(1)  # anyone may draw in between
    assert_same(gradients(filter, found), expected)


def test_filter_of_several_blocks_compiles_in_one_graph(monkeypatch):
    filter = new_filter("hyena")
    monkeypatch.setattr(HyenaFilter, "NUMBERS", 64 * filter.channels)
    torch._dynamo.reset()
    compiled = torch.compile(filter, fullgraph=True, backend="aot_eager")
    for length in (LENGTH, 150):
        expected, found = filter(length)[0].flatten(0, 1), compiled(length)[0].flatten(0, 1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
        assert_same(gradients(filter, found), gradients(filter, expected))
        with torch.no_grad():
            torch.testing.assert_close(compiled(length)[0], filter(length)[0], rtol=0, atol=1e-11)
    torch._dynamo.reset()


def test_training_mode_keeps_no_filter():
    """A checkpointed layer runs without a gradient first: the filters of all layers would stay until it runs again."""
    filter = new_filter("hyena").train()
    with torch.no_grad():
        filter(LENGTH)
        assert filter.evaluated is None
        filter.eval()(LENGTH)
        assert filter.evaluated is not None
