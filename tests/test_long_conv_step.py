"""Relaxed convolution, token by token, against the direct sums of the oracle; the filter that is remembered."""

import copy
from collections import Counter

import pytest
import torch
from families import ids, logits, new_cache, tiny_model

from benchmarks.hyena_decode import token_kinds
from hf_linear import ops
from hf_linear.mixers.hyena import Hyena, HyenaFilter
from hf_linear.ops.long_conv_step import BLOCK


@pytest.mark.parametrize("prefill", [1, 2, 31, 32, 63, 64, 100, 129])
def test_step_is_the_long_convolution(prefill):
    """Past several doublings and tiles of each size; float64 rounds at 1e-16, sums of 400 terms of order 1 at 1e-13."""
    B, D, T = 2, 3, 400
    u, gate = torch.randn(2, B, D, T, dtype=torch.float64)
    h, skip = torch.randn(D, T, dtype=torch.float64), torch.randn(D, dtype=torch.float64)
    exact, _ = ops.long_conv(u, h, skip, pre_gate=gate, backend="reference")
    _, state = ops.long_conv(u[..., :prefill], h, skip, pre_gate=gate[..., :prefill])
    for t in range(prefill, T):
        state = ops.long_conv_ahead(h, state, t)
        assert state.shape[-1] <= 2 * t
        y = ops.long_conv_step(u[..., t], h, skip, gate[..., t], state, t)
        torch.testing.assert_close(y, exact[..., t], rtol=0, atol=1e-11)


@pytest.mark.parametrize(("C", "t"), [(8, 3), (8, 9), (8, 0)])
def test_count_that_does_not_fit_the_state(C, t):
    h, state, one = torch.randn(2, 16), torch.zeros(1, 2, C), torch.ones(1, 2)
    with pytest.raises(ValueError, match=f"t must count .* C = {C}, got {t}: pass"):
        ops.long_conv_ahead(h, state, t)
    with pytest.raises(ValueError, match=f"t must lie .* C = {C} columns, got {t}: call"):
        ops.long_conv_step(one, h, one[0], one, state, t)


def test_step_refuses_gradients():
    h, state, one = torch.randn(2, 16, requires_grad=True), torch.zeros(1, 2, 8), torch.ones(1, 2)
    with pytest.raises(ValueError, match=r"without a gradient.*take long_conv"):
        ops.long_conv_ahead(h, state, 4)
    with pytest.raises(ValueError, match=r"without a gradient.*take long_conv"):
        ops.long_conv_step(one, h, one[0], one, state, 4)


@pytest.mark.parametrize("name", ["hyena", "hyena-order3"])
def test_decoding_is_the_full_forward(name):
    """Prefill, tokens, several tokens, tokens; a snapshot goes on by itself. Sines of filters magnify rounding to 1e-12."""
    model = tiny_model(name).double()
    x, cache, outs = ids(2, 201), new_cache(model), []
    splits = [37, *[1] * 70, 5, *[1] * 89]
    with torch.no_grad():
        exact, t = logits(model, x), 0
        for n in splits:
            if t == 80:
                snapshot = copy.deepcopy(cache)
            outs.append(model(x[:, t : t + n], past_key_values=cache).logits)
            t += n
        torch.testing.assert_close(torch.cat(outs, 1), exact, rtol=0, atol=1e-9)
        for t in range(80, 100):
            again = model(x[:, t : t + 1], past_key_values=snapshot).logits
            torch.testing.assert_close(again, exact[:, t : t + 1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["hyena", "hyena-order3"])
def test_generating_past_doublings_and_tiles(name, beams, monkeypatch):
    """Left-padded rows, their states reordered with the beams: as without a cache, and step by step all the way."""
    model, x, steps = tiny_model(name, num_hidden_layers=1), ids(2, 40), []
    mask = torch.ones_like(x)
    mask[0, :23] = 0
    options = {"num_beams": beams, "max_new_tokens": 90, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    expected = model.generate(x, use_cache=False, **options)
    step = Hyena.step
    monkeypatch.setattr(Hyena, "step", lambda self, *inputs: steps.append(inputs[-1]) or step(self, *inputs))
    assert torch.equal(model.generate(x, **options), expected)
    assert steps == list(range(40, 129))  # doublings at 40 and 80, a tile of 32 tokens at 72 and 112


def test_filter_is_remembered_per_weights():
    model = tiny_model("hyena")
    filter = next(module for module in model.modules() if isinstance(module, HyenaFilter))
    keys = set(model.state_dict())
    with torch.no_grad():
        first, _ = filter(100)
        assert filter(90)[0].data_ptr() == first.data_ptr()
        filter.out.weight.mul_(2)
        torch.testing.assert_close(filter(100)[0], 2 * first)
        model.load_state_dict({name: 0 * x for name, x in model.state_dict().items()})
        assert not filter(100)[0].any()
        assert filter.double()(100)[0].dtype == torch.float64
    assert set(model.state_dict()) == keys
    assert filter(100)[0].requires_grad


def test_filter_is_evaluated_anew_behind_training_and_under_hooks():
    """Changes that no version of a weight shows: of gathered weights between two evaluations, and of what is around one."""
    filter = next(module for module in tiny_model("hyena").modules() if isinstance(module, HyenaFilter))
    with torch.no_grad():
        first, _ = filter(100)
    filter(100)
    filter.out.weight.data.mul_(2)
    with torch.no_grad():
        torch.testing.assert_close(filter(100)[0], 2 * first)
        filter.out.register_forward_hook(lambda module, inputs, output: 3 * output)
        torch.testing.assert_close(filter(100)[0], 6 * first)


@pytest.mark.parametrize("P", [64, 1024])
def test_the_benchmark_counts_every_kind_of_token(P):
    """By the rule of `long_conv_ahead`: the size of token i's tile is its lowest set bit, where BLOCK divides i."""
    kinds = Counter(P if i == 0 else (i & -i) * (i % BLOCK == 0) for i in range(P))
    assert token_kinds(P) == kinds
