"""`hf_linear.accelerate` on every model that it takes: the same function, and the contract where the original breaks it."""

import copy
import inspect
import io

import pytest
import torch
import transformers
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from families import ids, spread_parameters
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening, DynamicCache, PreTrainedModel

import hf_linear
from hf_linear import native
from hf_linear.cache import CACHE_NAME

TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "bos_token_id": None, "eos_token_id": None}
TINY["pad_token_id"] = None
ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 48}
LAYERS = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 24}
NATIVE = {
    "Jamba": ATTENTION
    | {"attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 6, "mamba_dt_rank": 5}
    | {"mamba_proj_bias": True},
    "Mamba": {"state_size": 6, "time_step_rank": 5},
    "Mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 6, "n_groups": 2, "use_bias": True},
    "Bamba": ATTENTION | {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_state": 6, "mamba_n_groups": 2},
    "GraniteMoeHybrid": ATTENTION | EXPERTS | LAYERS | {"mamba_n_heads": 4, "mamba_d_state": 6},
    "Zamba2": {"num_attention_heads": 2, "intermediate_size": 48, "n_mamba_heads": 4, "mamba_d_state": 6, "num_mem_blocks": 1}
    | {"layers_block_type": ["linear_attention", "hybrid", "linear_attention"], "use_mem_rope": True},
}
# Logits are of order 3. Their layers compute in float32, and add up a few hundred numbers in another order.
ROUNDING = 1e-4
# What their own code makes of three calls with a cache, at most: more than this is another sequence's answer.
WRONG_IN_CHUNKS = {"Jamba", "Mamba", "Bamba"}

every_model = pytest.mark.parametrize("name", NATIVE)


def tiny(name: str, head: str = "ForCausalLM", **options) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**TINY, **NATIVE[name], **options})
    return spread_parameters(getattr(transformers, f"{name}{head}")(config)).eval()


def logits(model: PreTrainedModel, input_ids: Tensor, **kwargs) -> Tensor:
    with torch.no_grad():
        return model(input_ids, use_cache=False, **kwargs)[0]


def cache_name(model: PreTrainedModel) -> str:
    """What the model calls its cache: before 5.24, Mamba and Mamba-2 had a word of their own."""
    return "cache_params" if CACHE_NAME != "cache" and type(model).__name__.startswith("Mamba") else CACHE_NAME


def in_calls(model: PreTrainedModel, x: Tensor, lengths: list[int]) -> Tensor:
    cache, found = DynamicCache(config=model.config), []
    with torch.no_grad():
        for part in x.split(lengths, dim=1):
            found.append(model(part, use_cache=True, **{cache_name(model): cache})[0])
    return torch.cat(found, 1)


def difference(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def gradients(model: PreTrainedModel, x: Tensor, **kwargs) -> dict[str, Tensor]:
    y = model(x, use_cache=False, **kwargs)[0]
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    (weights * y).sum().backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


@every_model
def test_same_function_and_back(name):
    model, x = tiny(name).train(), ids(2, 70)
    expected, keys, signature = logits(model, x), list(model.state_dict()), inspect.signature(model.forward)
    wanted = gradients(model, x)
    assert hf_linear.accelerate(model) is model
    assert 0 < difference(logits(model, x), expected) < ROUNDING
    found = gradients(model, x)
    for parameter, gradient in wanted.items():
        assert (found[parameter] - gradient).abs().max() <= ROUNDING * max(1, gradient.abs().max()), parameter
    assert list(model.state_dict()) == keys and inspect.signature(model.forward) == signature
    hf_linear.accelerate(model)  # once more changes nothing
    assert hf_linear.restore(model) is model
    assert torch.equal(logits(model, x), expected)
    assert not any("forward" in vars(m) for m in model.modules())


@every_model
def test_calls_with_a_cache(name):
    """Chunked prefill, single tokens, several turns: the logits of one call. Three of the originals start each call anew."""
    model, x, lengths = tiny(name), ids(2, 41), [9, 1, 7, 1, 1, 22]
    expected, own = logits(model, x), in_calls(model, x, lengths)
    assert (difference(own, expected) > 0.05) == (name in WRONG_IN_CHUNKS)
    assert difference(in_calls(hf_linear.accelerate(model), x, lengths), expected) < ROUNDING


@every_model
def test_generate(name):
    """Greedy search token for token, rows of a padded batch as alone, sampling by beams."""
    model, x = tiny(name), ids(2, 9).clamp(min=1)
    options = {"max_new_tokens": 8, "pad_token_id": 0}
    expected = model.generate(x, do_sample=False, **options)
    beams = model.generate(x, num_beams=2, do_sample=False, **options)
    hf_linear.accelerate(model)
    assert torch.equal(model.generate(x, do_sample=False, **options), expected)
    assert torch.equal(model.generate(x, num_beams=2, do_sample=False, **options), beams)
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), x], 1)
    mask = torch.cat([torch.zeros(2, 5, dtype=torch.long), torch.ones_like(x)], 1)
    assert torch.equal(model.generate(padded, attention_mask=mask, do_sample=False, **options)[:, 5:], expected)


def count(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


@every_model
def test_left_padding(name):
    """It changes no logits, though projections with a bias and convolutions see it."""
    model, x = hf_linear.accelerate(tiny(name)), ids(2, 21)
    mask = torch.cat([torch.zeros(2, 6, dtype=torch.long), torch.ones_like(x)], 1)
    found = logits(model, torch.cat([ids(2, 6, seed=3), x], 1), attention_mask=mask, position_ids=count(mask))
    assert difference(found[:, 6:], logits(model, x)) < ROUNDING


@every_model
def test_right_padding_and_on(name):
    """Rows of several lengths, padded on the right, and then continued."""
    model, more = hf_linear.accelerate(tiny(name)), ids(2, 5, seed=4)
    rows, cache = [ids(1, 9, seed=5), ids(1, 14, seed=6)], DynamicCache(config=model.config)
    x = torch.cat([torch.cat([rows[0], torch.zeros(1, 5, dtype=torch.long)], 1), rows[1]])
    mask = torch.ones(2, 19, dtype=torch.long)
    mask[0, 9:14] = 0
    with torch.no_grad():
        model(x, attention_mask=mask[:, :14], position_ids=count(mask[:, :14]), **{cache_name(model): cache})
        told = {"attention_mask": mask, "position_ids": count(mask)[:, 14:], cache_name(model): cache}
        found = model(more, **told)[0]
    for i, row in enumerate(rows):
        expected = logits(model, torch.cat([row, more[i : i + 1]], 1))[:, row.shape[1] :]
        assert difference(found[i : i + 1], expected) < ROUNDING


LENGTHS = [1, 2, 17, 30]


def packed_row(*names: str) -> dict[str, Tensor]:
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    row = collate([{"input_ids": ids(n, seed=n).tolist()} for n in LENGTHS])
    return {name: row[name] for name in names}


FORMS = [["position_ids"], ["seq_idx"], ["cu_seq_lens_q"], ["position_ids", "seq_idx", "cu_seq_lens_q"]]


@pytest.mark.parametrize("names", FORMS, ids="-".join)
@every_model
def test_packed_documents(name, names):
    """The logits of the documents alone, where theirs are others, or from 5.24 on an error."""
    model = tiny(name)
    row = packed_row("input_ids", *names)
    expected = torch.cat([logits(model, ids(n, seed=n)[None]) for n in LENGTHS], 1)
    try:
        assert difference(logits(model, **row), expected) > 0.01
    except ValueError as error:
        assert "can't keep packed sequences apart" in str(error)
    assert difference(logits(hf_linear.accelerate(model), **row), expected) < ROUNDING


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@every_model
def test_gradients_of_packed_documents(name):
    """Those of the documents alone, and the same where layers are computed again."""
    model, row = hf_linear.accelerate(tiny(name).train()), packed_row("input_ids", "position_ids")
    x, told = row.pop("input_ids"), row
    plain = gradients(model, x, **told)
    y = torch.cat([model(ids(n, seed=n)[None], use_cache=False)[0] for n in LENGTHS], 1)
    model.zero_grad()
    (torch.randn(y.shape, generator=torch.Generator().manual_seed(1)) * y).sum().backward()
    for parameter, p in model.named_parameters():
        if p.grad is not None:
            assert (plain[parameter] - p.grad).abs().max() <= ROUNDING * max(1, p.grad.abs().max()), parameter
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for parameter, gradient in gradients(model, x, **told).items():
        assert torch.equal(gradient, plain[parameter]), parameter


def test_packed_row_with_a_cache():
    """A fresh cache is filled with the last document's states; one that holds a sequence cannot go on as several."""
    model = hf_linear.accelerate(tiny("Mamba"))
    row, more, n = packed_row("input_ids", "position_ids"), ids(1, 4, seed=9), LENGTHS[-1]
    expected = logits(model, torch.cat([ids(n, seed=n)[None], more], 1))[:, n:]
    name = cache_name(model)
    with torch.no_grad():
        cache = {name: getattr(model(**row, use_cache=True), name)}
        assert difference(model(more, **cache)[0], expected) < ROUNDING
        with pytest.raises(ValueError, match="got packed documents: continue them one at a time"):
            model(**row, **cache)


def test_copies_and_files(tmp_path):
    model, x = tiny("Jamba"), ids(2, 9)
    expected = logits(model, x)
    hf_linear.accelerate(model)
    found = logits(model, x)
    copied = copy.deepcopy(model)
    pickled = io.BytesIO()
    torch.save(model, pickled)
    pickled.seek(0)
    for other in (copied, torch.load(pickled, weights_only=False)):
        own = [m for m in other.modules() if native.held(m) is not None]
        assert len(own) == 3 and all(native.held(m).args[0] is m for m in own)
        assert torch.equal(logits(other, x), found)
        assert torch.equal(logits(hf_linear.restore(other), x), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path), x), expected)


@pytest.mark.parametrize("name", ["Jamba", "Mamba2"])
def test_bfloat16(name):
    """As close to float32 as the original is: they round at other places, by 2^-9 each time."""
    exact, x = tiny(name), ids(2, 70)
    model = copy.deepcopy(exact).to(torch.bfloat16)
    wanted = logits(exact, x)
    own = (logits(model, x).float() - wanted).square().mean()
    found = logits(hf_linear.accelerate(model), x)
    assert (found.float() - wanted).square().mean() < 2 * own


@pytest.mark.parametrize("before", [True, False], ids=["hook_first", "hook_last"])
def test_hooks_of_the_accelerate_package(before):
    """Its hooks keep working, whether they were there before or come after, and so does restoring beneath them."""
    model, x, calls = tiny("Jamba"), ids(2, 9), []
    expected, mixer = logits(model, x), model.model.layers[0].mamba

    class Counting(AlignDevicesHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return super().pre_forward(module, *args, **kwargs)

    if before:
        add_hook_to_module(mixer, Counting())
    hf_linear.accelerate(model)
    if not before:
        add_hook_to_module(mixer, Counting())
    calls.clear()
    assert 0 < difference(logits(model, x), expected) < ROUNDING
    assert calls == [mixer]
    assert torch.equal(logits(hf_linear.restore(model), x), expected)


def test_offloaded_weights():
    model, x = tiny("Jamba"), ids(2, 9)
    expected = logits(model, x)
    cpu_offload(model, execution_device="cpu")
    assert model.model.layers[0].mamba.A_log.is_meta
    assert 0 < difference(logits(hf_linear.accelerate(model), x), expected) < ROUNDING


def test_layer_of_zeros():
    """An output of zeros is its original's too."""
    model = tiny("Jamba")
    nn.init.zeros_(model.model.layers[0].mamba.out_proj.weight)
    nn.init.zeros_(model.model.layers[0].mamba.out_proj.bias)
    assert native.held(hf_linear.accelerate(model).model.layers[0].mamba) is not None


# --- Errors ----------------------------------------------------------------------------------------------------------


def no_mamba_layer() -> nn.Module:
    return hf_linear.GLAForCausalLM(hf_linear.GLAConfig(vocab_size=8, hidden_size=32, num_hidden_layers=1, num_heads=2))


def changed_forward() -> nn.Module:
    model = tiny("Jamba")
    model.model.layers[2].mamba.forward = lambda *args, **kwargs: None
    return model


def layer_with_a_drift() -> nn.Module:
    """A layer that does something else at every call."""
    model, drift = tiny("Jamba"), iter(range(99))
    model.model.layers[2].mamba.dt_layernorm.register_forward_hook(lambda module, args, y: y + next(drift))
    return model


@pytest.mark.parametrize(
    "build, message",
    [
        (no_mamba_layer, r"layers of \['BambaMixer',.*got GLAForCausalLM without"),
        (changed_forward, r"model\.layers\.2\.mamba must have the forward of its class"),
        (lambda: tiny("Jamba", hidden_act="gelu"), r"model\.layers\.0\.mamba must have the activation silu, got gelu"),
        (lambda: tiny("Jamba").to("meta"), r"model\.layers\.0\.mamba must have its weights, got the meta device"),
        (layer_with_a_drift, r"model\.layers\.2\.mamba must agree with its original, got a difference of \d\.\de"),
    ],
)
def test_errors(build, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        hf_linear.accelerate(model)
    assert all(native.held(m) is None for m in model.modules())
