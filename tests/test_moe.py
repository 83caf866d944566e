"""Mixture of experts: a plain loop over tokens in float64 as oracle, Transformers' own blocks, and what a model does with it.

The contract, the saving and the adapters of a model with sparse layers are in the tests of those, under "hybrid-sparse".
"""

from collections.abc import Callable

import pytest
import torch
from families import ids, logits, spread_parameters, tiny_config, tiny_model
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, JambaConfig, MixtralConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.jamba.modeling_jamba import JambaSparseMoeBlock
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from hf_linear import LinearHybridForCausalLM
from hf_linear.modules.loss import share_of_labels
from hf_linear.modules.moe import Experts, SparseMLP, TopKRouter, load_balancing_loss

IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def sparse_mlp(implementation: str, dtype: torch.dtype, **options) -> SparseMLP:
    torch.manual_seed(0)
    mlp = SparseMLP(tiny_config("hybrid-sparse", experts_implementation=implementation, **options))
    for p in mlp.parameters():
        nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return mlp.to(dtype)


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def token_by_token(mlp: SparseMLP, x: Tensor, top_k: int, renormalise: bool) -> Tensor:
    """What a sparse layer means, an expert of a token at a time."""
    outputs = []
    for token in x.flatten(0, 1):
        p = torch.softmax(mlp.router.proj.weight @ token, 0)
        chosen = sorted(range(len(p)), key=lambda i: -p[i].item())[:top_k]
        total = sum(p[i] for i in chosen) if renormalise else 1.0
        y = torch.zeros_like(token)
        for i in chosen:
            gate, up = (mlp.experts.gate_up_proj[i] @ token).chunk(2)
            y = y + p[i] / total * (mlp.experts.down_proj[i] @ (F.silu(gate) * up))
        if mlp.shared_experts is not None:
            shared = mlp.shared_experts
            hidden = F.silu(shared.gate_proj.weight @ token) * (shared.up_proj.weight @ token)
            y = y + shared.down_proj.weight @ hidden
        outputs.append(y)
    return torch.stack(outputs).view_as(x)


def value_and_gradients(mlp: SparseMLP, x: Tensor, y: Tensor) -> list[Tensor]:
    dy = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return [y, *torch.autograd.grad(y, [x, *mlp.parameters()], dy)]


# float32 and sums of 32 and 24 products, twice: 1e-6 of the largest. A token with another expert is 1e-1 away.
@pytest.mark.parametrize("dtype, rounding", [(torch.float64, 1e-13), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("top_k, renormalise", [(1, False), (2, True), (2, False), (5, True)])
@every_implementation
def test_is_the_loop_over_tokens(implementation, top_k, renormalise, shared, dtype, rounding):
    options = {"num_experts_per_tok": top_k, "norm_topk_prob": renormalise, "num_shared_experts": shared}
    mlp, x = sparse_mlp(implementation, dtype, **options), inputs(2, 9, 32, dtype=dtype)
    found = value_and_gradients(mlp, x, mlp(x))
    mlp.double()
    exact = x.detach().double().requires_grad_()
    expected = value_and_gradients(mlp, exact, token_by_token(mlp, exact, top_k, renormalise))
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == dtype and got.shape == wanted.shape
        assert (got - wanted).abs().max() <= rounding * wanted.abs().max().clamp(min=1e-3)


@every_implementation
@pytest.mark.parametrize("origin", ["mixtral", "jamba"])
def test_is_the_block_of_transformers(origin, implementation):
    """Mixtral renormalises the chosen probabilities, Jamba does not."""
    mlp = sparse_mlp(implementation, torch.float32, norm_topk_prob=origin == "mixtral", num_shared_experts=0)
    shape = {"hidden_size": 32, "intermediate_size": 24, "num_experts_per_tok": 2, "experts_implementation": implementation}
    if origin == "mixtral":
        block = MixtralSparseMoeBlock(MixtralConfig(**shape, num_local_experts=5))
        router = block.gate
    else:
        block = JambaSparseMoeBlock(JambaConfig(**shape, num_experts=5))
        router = block.router
    router.weight.data.copy_(mlp.router.proj.weight)
    block.experts.load_state_dict(mlp.experts.state_dict())
    x = inputs(2, 9, 32, dtype=torch.float32)
    torch.testing.assert_close(mlp(x), block(x), rtol=1e-5, atol=1e-6)


def test_the_order_of_experts_is_decided_in_float32():
    """In bfloat16 a probability among 64 has 8 bits: many tie, and a tie is an expert chosen by chance."""
    router = TopKRouter(tiny_config("hybrid-sparse", num_experts=64)).bfloat16()
    nn.init.normal_(router.proj.weight, std=0.05)
    scores, weights, index = router(inputs(512, 32, dtype=torch.bfloat16))
    assert scores.dtype == weights.dtype == torch.bfloat16
    p = scores.double().softmax(-1)
    chosen = p.gather(-1, index)
    # The two largest, whichever of two equal scores it is, to the rounding of float32.
    torch.testing.assert_close(chosen, p.topk(2).values, rtol=1e-6, atol=0)
    torch.testing.assert_close(weights.double(), chosen / chosen.sum(-1, keepdim=True), rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_implementation
def test_half_precision(implementation, dtype):
    mlp, x = sparse_mlp(implementation, dtype), inputs(4, 50, 32, dtype=dtype)
    found = value_and_gradients(mlp, x, mlp(x))
    assert all(g.dtype == dtype and g.isfinite().all() for g in found)
    mlp.double()
    exact = mlp(x.detach().double())
    # Scores within a rounding of each other choose otherwise in float64, for a token or two of 200.
    error = (found[0].double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.flatten().quantile(0.95) < 20 * torch.finfo(dtype).eps


# --- The load-balancing loss -----------------------------------------------------------------------------------------


def balance(layers: list[Tensor], top_k: int) -> Tensor:
    """E sum_i f_i P_i, token by token over all layers."""
    tokens = [token for layer in layers for token in layer.softmax(-1)]
    routed, mean = torch.zeros(tokens[0].shape), sum(tokens) / len(tokens)
    for p in tokens:
        for i in p.topk(top_k).indices.tolist():
            routed[i] += 1 / len(tokens)
    return len(routed) * (routed * mean).sum()


def test_load_balancing_loss_is_its_formula():
    layers = [torch.randn(2 * 7, 5, requires_grad=True) for _ in range(3)]
    real = torch.ones(2, 7)
    real[0, :3] = real[1, 5:] = 0
    for mask in (torch.ones(2, 7), real, real.long()):
        found = load_balancing_loss(tuple(layers), 2, mask)
        expected = balance([layer[mask.flatten() > 0] for layer in layers], 2)
        torch.testing.assert_close(found, expected)
        for x, y in zip(torch.autograd.grad(found, layers), torch.autograd.grad(expected, layers), strict=True):
            torch.testing.assert_close(x, y)
    even = load_balancing_loss((torch.eye(5).repeat(2, 1) * 20,), 1, torch.ones(2, 5))
    assert even.item() == pytest.approx(1.0)  # its least: every expert the same share


@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused_loss"])
def test_the_training_loss_has_it(fused):
    """Padding excluded, times its coefficient, and by the config or by the call."""
    config = {"fuse_linear_cross_entropy": fused, "router_aux_loss_coef": 0.25, "mlp_layer_types": ["sparse", "sparse"]}
    model, x = tiny_model("hybrid-sparse", **config).train(), ids(2, 9)
    mask = torch.ones_like(x)
    mask[0, :4] = 0
    batch = {"input_ids": x, "attention_mask": mask, "labels": x.masked_fill(mask == 0, -100)}
    plain, output = model(**batch), model(**batch, output_router_logits=True)
    assert plain.aux_loss is None and plain.router_logits is None
    assert [tuple(scores.shape) for scores in output.router_logits] == [(18, 5)] * 2
    expected = balance([scores.float()[mask.flatten() > 0] for scores in output.router_logits], 2)
    torch.testing.assert_close(output.aux_loss, expected)
    torch.testing.assert_close(output.loss, plain.loss + 0.25 * expected, check_dtype=False)
    model.config.output_router_logits = True
    torch.testing.assert_close(model(**batch).loss, output.loss)
    router = model.model.layers[0].mlp.router.proj.weight
    with_it, without = (torch.autograd.grad(o.loss, router)[0] for o in (output, plain))
    assert (with_it - without).abs().max() > 1e-4


def test_router_logits_of_a_call_with_a_cache():
    model, x = tiny_model("hybrid-sparse"), ids(2, 9)
    mask = torch.ones_like(x)
    mask[0, :6] = 0
    past = model(x[:, :5], attention_mask=mask[:, :5]).past_key_values
    output = model(x[:, 5:], attention_mask=mask, past_key_values=past, output_router_logits=True)
    expected = balance([scores.float()[mask[:, 5:].flatten() > 0] for scores in output.router_logits], 2)
    torch.testing.assert_close(output.aux_loss, expected)


def test_a_dense_model_has_no_routers():
    output = tiny_model("gla", output_router_logits=True)(ids(2, 9), labels=ids(2, 9))
    assert output.aux_loss is None and not output.router_logits


def test_an_accumulated_batch_counts_it_once():
    """Two pieces of a batch weigh the loss by their labels, whose number the caller gives."""
    labels = torch.tensor([[1, 2, 3, 4], [1, 2, -100, -100]])
    shares = [float(share_of_labels(row[None], num_items_in_batch=4)) for row in labels]
    assert shares == [3 / 4, 1 / 4] and share_of_labels(labels) == 1
    assert share_of_labels(labels, torch.tensor(12), shift_labels=labels) == 6 / 12
    model = tiny_model("hybrid-sparse", output_router_logits=True, router_aux_loss_coef=1.0)
    output = model(labels.clamp(min=0), labels=labels, num_items_in_batch=8)
    cross_entropy = model(labels.clamp(min=0), labels=labels, num_items_in_batch=8, output_router_logits=False).loss
    torch.testing.assert_close(output.loss - cross_entropy, output.aux_loss / 2, rtol=1e-4, atol=0)


def test_gradient_checkpointing_keeps_its_gradients():
    """A reentrant checkpoint hands out router logits without gradients: an error, not a loss that teaches nothing."""
    model, x = tiny_model("hybrid-sparse", output_router_logits=True, router_aux_loss_coef=1.0).train(), ids(2, 9)
    router = model.model.layers[0].mlp.router.proj.weight
    (expected,) = torch.autograd.grad(model(x, labels=x).loss, router)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(x, labels=x).loss.backward()
    torch.testing.assert_close(router.grad, expected)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match=r"must carry gradients.*got.*reentrant.*'use_reentrant': False"):
        model(x, labels=x)


# --- In a model ------------------------------------------------------------------------------------------------------


def test_implementations_are_chosen_as_in_transformers(tmp_path):
    model, x = tiny_model("hybrid-sparse", dtype=torch.float32), ids(2, 30)
    expected = logits(model, x)
    model.save_pretrained(tmp_path)
    for implementation in IMPLEMENTATIONS:
        model.set_experts_implementation(implementation)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=implementation)
        made = LinearHybridForCausalLM(tiny_config("hybrid-sparse", experts_implementation=implementation))
        made.load_state_dict(model.state_dict())
        for one in (model, loaded, made.eval()):
            assert {m.config._experts_implementation for m in one.modules() if isinstance(m, Experts)} == {implementation}
            torch.testing.assert_close(logits(one, x), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="fastest"):
        model.set_experts_implementation("fastest")


def test_each_implementation_runs(monkeypatch):
    """The name decides what runs: it does not merely stand in the config."""
    called = []

    def spy(name: str, original: Callable) -> Callable:
        return lambda *args: called.append(name) or original(*args)

    for name in ("batched_mm", "grouped_mm"):
        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, name, spy(name, ALL_EXPERTS_FUNCTIONS[name]))
    for implementation in IMPLEMENTATIONS:
        sparse_mlp(implementation, torch.float32)(inputs(1, 3, 32, dtype=torch.float32))
    assert called == ["batched_mm", "grouped_mm"]


@pytest.mark.parametrize(
    "implementation, dtype", [("batched_mm", torch.float32), ("grouped_mm", torch.bfloat16)], ids=["batched_mm", "grouped_mm"]
)
def test_compiled_is_eager(implementation, dtype):
    """One graph, forward and backward, the load-balancing loss in it.

    Grouped products in float32 are one from Transformers 5.24 on; the loop of "eager" goes by what the router found.
    """
    torch._dynamo.reset()
    model, x = tiny_model("hybrid-sparse", dtype=dtype, experts_implementation=implementation), ids(1, 20)
    call = {"labels": x, "use_cache": False, "output_router_logits": True}
    expected = model(x, **call)  # hangs the recorders of router logits on the model, which a graph cannot
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(x, **call)
    parameters = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad(o.loss, parameters) for o in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(found.logits, expected.logits)
    torch._dynamo.reset()


def test_initialisation():
    config = tiny_config("hybrid-sparse", initializer_range=0.05, hidden_size=64, moe_intermediate_size=64)
    mlp = LinearHybridForCausalLM(config).model.layers[0].mlp
    for weight in (mlp.router.proj.weight, mlp.experts.gate_up_proj, mlp.experts.down_proj):
        assert weight.std().item() == pytest.approx(0.05, rel=0.15) and abs(weight.mean().item()) < 0.01


def test_any_family_has_sparse_layers():
    """One number makes every layer of any family sparse; experts are as wide as its MLP would be."""
    for name in ("gla", "retnet", "linear-elu", "hyena"):
        model = spread_parameters(tiny_model(name, num_experts=4, dtype=torch.float32))
        assert model.config.mlp_layer_types == ["sparse", "sparse"] and model.config.num_local_experts == 4
        assert [tuple(layer.mlp.experts.down_proj.shape) for layer in model.model.layers] == [(4, 32, 48)] * 2
        x = ids(2, 9)
        model(x, labels=x).loss.backward()
        assert all(layer.mlp.router.proj.weight.grad.abs().max() > 0 for layer in model.model.layers)


def test_adapters_on_the_weights_of_experts():
    """peft adapts three-dimensional parameters by name; beside them the router and the shared experts are Linear."""
    model, x = tiny_model("hybrid-sparse", dtype=torch.float32), ids(1, 40)
    plain = logits(model, x)
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=[], target_parameters=parameters))
    assert torch.equal(logits(adapted, x), plain)
    matrices = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(matrices) == 4 and all(".experts." in name for name in matrices)
    for name, p in matrices.items():
        nn.init.normal_(p, std=0.1 if "lora_B" in name else 1.0)
    adapted(input_ids=x, labels=x).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in matrices.values())
    assert (logits(adapted, x) - plain).abs().max() > 1e-3
