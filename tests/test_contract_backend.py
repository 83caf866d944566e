"""The contract, backend: token by token, in chunks and compiled, one function with one gradient."""

import importlib
from collections.abc import Callable

import pytest
import torch
from contract import (
    assert_equal_gradients,
    assert_equal_to_rounding,
    documents,
    every_config,
    gradients,
    in_calls,
    logits_and_gradients,
    one_of_each,
    pad,
)
from families import PRESETS, ids, logits, one_layer_of_each_kind, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from hf_linear.mixers.gla import GatedLinearAttention

OPS = ["linear_attention", "gated_linear_attention", "short_conv", "long_conv", "selective_scan"]


@pytest.fixture
def use_backend(monkeypatch) -> Callable[[str], None]:
    """Let "auto" mean one backend everywhere in the model."""
    modules = [importlib.import_module(f"hf_linear.ops.{op}") for op in OPS]
    originals = [dict(module.IMPLEMENTATIONS) for module in modules]

    def use(backend: str) -> None:
        for module, original in zip(modules, originals, strict=True):
            for name in original:
                monkeypatch.setitem(module.IMPLEMENTATIONS, name, original[backend])

    return use


def assert_backends_agree(model: PreTrainedModel, use_backend, x: Tensor, **kwargs) -> None:
    def run(backend: str) -> tuple[Tensor, dict[str, Tensor]]:
        use_backend(backend)
        return logits_and_gradients(model, lambda: model(x, use_cache=False, **kwargs).logits)

    found, found_gradients = run("chunked")
    expected, expected_gradients = run("reference")
    assert_equal_to_rounding(found, expected)
    assert_equal_gradients(found_gradients, expected_gradients)


@pytest.mark.parametrize("T", [1, 15, 63, 64, 65, 200])
@every_config
def test_backend(name, T, use_backend):
    """Token by token by the recurrences, and in chunks: one function with one gradient."""
    assert_backends_agree(tiny_model(name), use_backend, ids(2, T))


@one_of_each
def test_backend_packed_and_padded(name, use_backend):
    model = tiny_model(name)
    assert_backends_agree(model, use_backend, ids(1, 88), cu_seq_lens_q=torch.tensor([0, 1, 17, 17, 82, 88]))
    x, mask = pad(documents(3, 40, 70), "left", 72)
    assert_backends_agree(model, use_backend, x, attention_mask=mask)


@pytest.mark.parametrize("bias", ["all", "some"])
@pytest.mark.parametrize("T", [1, 15, 63, 64, 65, 200])
@pytest.mark.parametrize("name", ["gla", "gla-no-gate", "hybrid-every-mixer"])
def test_strong_decay(name, T, bias, use_backend):
    """GLA that forgets all at every token, a log-decay of -50: in every channel, or in every other one."""
    model, x = tiny_model(name), ids(2, T)
    for layer in model.model.layers:
        if isinstance(layer.mixer, GatedLinearAttention):
            forget = layer.mixer.gk_proj[1].bias.data
            forget[:: 1 if bias == "all" else 2] = -50.0 * model.config.for_mixer("gla").gate_logit_normalizer
    assert_backends_agree(model, use_backend, x)
    use_backend("chunked")
    if T > 1:
        found, _ = in_calls(model, x, [T // 2, T - T // 2 - 1, 1] if T > 2 else [1, 1])
        assert_equal_to_rounding(found, logits(model, x))
    single = model.float()
    assert all(g.isfinite().all() for g in gradients(single, single(x).logits.sum()).values())


# --- torch.compile ---

COMPILER = "aot_eager"  # the graphs of torch.compile, run as they are: generating code takes a minute each
COMPILED = {
    "gla-conv-kv-phi": {"num_hidden_layers": 1},
    "linear-softmax": {"num_hidden_layers": 1},
    "hyena-order3": {"num_hidden_layers": 1},
    "hybrid-mamba2": {"num_hidden_layers": 1, "pattern": "N"},
    "hybrid-sliding": {},
    "hybrid-rope": {"num_hidden_layers": 2, "pattern": "GA"},
}


@pytest.mark.parametrize("bounds", [None, [0, 5, 5, 69, 70]])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_is_eager(name, bounds, dynamo):
    """One graph without a break, forward and backward, for plain and for packed rows."""
    model, x = tiny_model(name, **COMPILED[name]), ids(1, 70)
    compiled = torch.compile(model, fullgraph=True, backend=COMPILER)
    packed = {} if bounds is None else {"cu_seq_lens_q": torch.tensor(bounds, dtype=torch.int32)}
    expected = logits_and_gradients(model, lambda: model(x, use_cache=False, **packed).logits)
    found = logits_and_gradients(model, lambda: compiled(x, use_cache=False, **packed).logits)
    assert_equal_to_rounding(found[0], expected[0])
    assert_equal_gradients(found[1], expected[1])


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_one_graph(name, dynamo):
    """No mixer, router or shared block breaks the graph. Gradients of graphs are compared above, for each mixer."""
    model, x = tiny_model(name, **one_layer_of_each_kind(name)), ids(1, 9)
    boundaries = torch.tensor([0, 5, 5, 8, 9], dtype=torch.int32)
    found = torch.compile(model, fullgraph=True, backend="eager")(x, cu_seq_lens_q=boundaries, use_cache=False).logits
    assert_equal_to_rounding(found.detach(), logits(model, x, cu_seq_lens_q=boundaries))


def test_compiled_positions_that_restart(dynamo):
    """Boundaries that a graph cannot find are an error, not one document."""
    model = tiny_model("linear-softmax", num_hidden_layers=1)
    compiled = torch.compile(model, backend=COMPILER)
    positions = torch.cat([torch.arange(9), torch.arange(12)])[None]
    with pytest.raises(RuntimeError, match="cu_seq_lens_q"):
        compiled(ids(1, 21), position_ids=positions, use_cache=False)
