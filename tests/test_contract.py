"""The five invariances of docs/design.md, section 3, over every tiny config: split, packing, padding, backend and batch.

Everything runs in float64, so that an error of the algorithm cannot hide behind rounding.
"""

import copy
import importlib
import re
from collections.abc import Callable, Iterator
from itertools import pairwise, product

import pytest
import torch
from families import (
    CONFIGS,
    ONE_OF_EACH,
    PRESETS,
    SLIDING_WINDOW,
    WITHOUT_HYENA,
    ids,
    logits,
    new_cache,
    one_layer_of_each_kind,
    tiny_config,
    tiny_model,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, DataCollatorWithFlattening, PreTrainedModel, StaticCache

from hf_linear.mixers.gla import GatedLinearAttention
from hf_linear.mixers.hyena import HyenaFilter

# Logits are of order 1, float64 rounds at 1e-16 and the filters of Hyena magnify that by their sines to 1e-12. One token
# misplaced, forgotten or counted twice moves some logit by 1e-3 or more in every one of these models.
ROUNDING = 1e-10

every_config = pytest.mark.parametrize("name", CONFIGS)
every_model = pytest.mark.parametrize("name", [*CONFIGS, *PRESETS])
# The state of a Hyena layer grows, so a static cache cannot hold it: generate says so, see test_errors.
STATIC = [(name, "static") for name in WITHOUT_HYENA]
one_of_each = pytest.mark.parametrize("name", ONE_OF_EACH)


def assert_equal_to_rounding(actual: Tensor, expected: Tensor, what: str = "logits") -> None:
    assert actual.shape == expected.shape, what
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error <= ROUNDING, f"{what} differ by {error:.1e} of their largest"  # NaN fails too


def gradients(model: PreTrainedModel, objective: Tensor) -> dict[str, Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(objective, list(trained.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(trained.items(), found, strict=True)}


def assert_equal_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, gradient in expected.items():
        assert_equal_to_rounding(actual[name], gradient, f"gradients of {name}")


def weights_like(x: Tensor, seed: int = 5) -> Tensor:
    """Random weights of a sum of logits: an objective in which every logit counts."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


# --- Split -----------------------------------------------------------------------------------------------------------


def in_calls(
    model: PreTrainedModel, x: Tensor, lengths: list[int], cache: Cache | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Cache]:
    """Logits of `x` given in calls of these lengths, and the cache. Without a cache the first call makes one.

    `mask` is the one of the last call; the others get its beginning.
    """
    assert sum(lengths) == x.shape[1]
    ends = torch.tensor(lengths).cumsum(0) - x.shape[1]
    found, seen = [], []
    for part, end in zip(x.split(lengths, dim=1), ends.tolist(), strict=True):
        now = None if mask is None else mask[:, : mask.shape[1] + end]
        with torch.no_grad():
            output = model(part, attention_mask=now, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
        seen.append(int(cache.get_seq_length()))
    assert [b - a for a, b in pairwise(seen)] == lengths[1:]
    return torch.cat(found, 1), cache


SPLITS = {
    "one_call": [21],
    "token_by_token": [1] * 21,
    "13_1_7": [13, 1, 7],
    "1_20": [1, 20],
    "turns": [5, 1, 1, 6, 1, 1, 6],
    "over_chunks": [70, 1, 65],
}


@pytest.mark.parametrize("lengths", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("name, cache_of", [*product(CONFIGS, ["user", "model"]), *product(PRESETS, ["user"]), *STATIC])
def test_split(name, cache_of, lengths):
    """Any split into calls with a cache gives the logits of one call without."""
    model, x = tiny_model(name), ids(2, sum(lengths))
    if cache_of == "static":
        cache = StaticCache(config=model.config, max_cache_len=x.shape[1])
    else:
        cache = new_cache(model) if cache_of == "user" else None
    found, returned = in_calls(model, x, lengths, cache)
    assert cache is None or returned is cache
    assert_equal_to_rounding(found, logits(model, x))


BATCH_CHANGES: dict[str, tuple[Callable[[Cache], None], list[int]]] = {
    "reordered": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "repeated": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "one_selected": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "two_selected": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
}


@pytest.mark.parametrize("change, rows", BATCH_CHANGES.values(), ids=BATCH_CHANGES)
@every_config
def test_cache_of_a_changed_batch(name, change, rows):
    model, prompt, more = tiny_model(name), ids(3, 13), ids(len(rows), 8, seed=2)
    _, cache = in_calls(model, prompt, [9, 4], new_cache(model))
    change(cache)
    found, _ = in_calls(model, more, [1, 6, 1], cache)
    assert_equal_to_rounding(found, logits(model, torch.cat([prompt[rows], more], 1))[:, 13:])


@pytest.mark.parametrize("name", WITHOUT_HYENA)
def test_static_cache_reordered_and_reset(name):
    model, prompt, more = tiny_model(name), ids(3, 13), ids(3, 8, seed=2)
    cache = StaticCache(config=model.config, max_cache_len=24)
    in_calls(model, prompt, [9, 4], cache)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    found, _ = in_calls(model, more, [1, 6, 1], cache)
    assert_equal_to_rounding(found, logits(model, torch.cat([prompt[[2, 0, 0]], more], 1))[:, 13:])
    cache.reset()
    found, _ = in_calls(model, more, [5, 1, 2], cache)
    assert_equal_to_rounding(found, logits(model, more))


@every_config
def test_snapshot_and_restore(name):
    """A copy of the cache keeps the past it was taken at; the cache and its copy go separate ways."""
    model, prompt, first, second = tiny_model(name), ids(2, 13), ids(2, 8, seed=2), ids(2, 8, seed=3)
    _, cache = in_calls(model, prompt, [13], new_cache(model))
    snapshot = copy.deepcopy(cache)
    one, _ = in_calls(model, first, [1, 6, 1], cache)
    other, _ = in_calls(model, second, [6, 1, 1], copy.deepcopy(snapshot))
    again, _ = in_calls(model, first, [8], snapshot)
    assert_equal_to_rounding(one, logits(model, torch.cat([prompt, first], 1))[:, 13:])
    assert_equal_to_rounding(other, logits(model, torch.cat([prompt, second], 1))[:, 13:])
    assert_equal_to_rounding(again, one)


@every_config
def test_split_of_embeddings(name):
    """`inputs_embeds` in place of `input_ids`, in one call and in several."""
    model, x = tiny_model(name), ids(2, 21)
    embeddings = model.get_input_embeddings()(x).detach()
    with torch.no_grad():
        first = model(inputs_embeds=embeddings[:, :13])
        rest = model(inputs_embeds=embeddings[:, 13:], past_key_values=first.past_key_values)
    assert_equal_to_rounding(torch.cat([first.logits, rest.logits], 1), logits(model, x))


# --- Packing ---------------------------------------------------------------------------------------------------------

LENGTHS = [1, 2, 5, 17, 64, 65, 70]  # shorter than any convolution, shorter and longer than a chunk
PACKED_FORMS = {
    "position_ids": {"position_ids"},
    "cu_seq_lens_q": {"cu_seq_lens_q"},
    "all_the_collator_has": {
        *("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    },
}


@pytest.mark.parametrize("name, form", [*product(CONFIGS, PACKED_FORMS), *product(PRESETS, ["position_ids"])])
def test_packing(name, form):
    """Documents in one row have the logits, the loss and the gradients that they have alone.

    The row is longer than the filters of Hyena, as rows of documents are: 224 tokens to 128.
    """
    model, names = tiny_model(name, max_position_embeddings=128), PACKED_FORMS[form]
    documents = [ids(n, seed=n).tolist() for n in LENGTHS]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    row = collate([{"input_ids": document} for document in documents])
    assert row["input_ids"].shape == (1, sum(LENGTHS)) and names <= set(row)
    row = {key: value for key, value in row.items() if key in names | {"input_ids", "labels"}}
    labels = int((row["labels"][:, 1:] != -100).sum())
    assert labels == sum(LENGTHS) - len(LENGTHS)

    packed = model(**row)
    weights = weights_like(packed.logits).split(LENGTHS, dim=1)
    objective, loss, alone = 0.0, 0.0, []
    for document, w in zip(documents, weights, strict=True):
        x = torch.tensor([document])
        output = model(x, labels=x, num_items_in_batch=labels)
        alone.append(output.logits)
        loss = loss + output.loss
        objective = objective + (w * output.logits).sum()
    assert_equal_to_rounding(packed.logits, torch.cat(alone, 1))
    assert_equal_gradients(gradients(model, (torch.cat(weights, 1) * packed.logits).sum()), gradients(model, objective))
    # Transformers takes its losses in float32: 200 tokens of which each rounds at 6e-8.
    torch.testing.assert_close(packed.loss, loss, rtol=1e-5, atol=0)


@every_config
def test_packed_documents_of_one_token(name):
    model, x = tiny_model(name), ids(1, 9)
    alone = torch.cat([logits(model, token) for token in x.split(1, dim=1)], 1)
    assert_equal_to_rounding(logits(model, x, position_ids=torch.zeros(1, 9, dtype=torch.long)), alone)
    assert_equal_to_rounding(logits(model, x, cu_seq_lens_q=torch.arange(10)), alone)


@every_config
def test_one_document_is_not_packed(name):
    """Positions that only count, from whatever number, are one document, also in a batch and with a cache."""
    model, x = tiny_model(name), ids(2, 21)
    expected, positions = logits(model, x), torch.arange(21).expand(2, -1)
    assert_equal_to_rounding(logits(model, x, position_ids=positions), expected)
    assert_equal_to_rounding(logits(model, x, position_ids=positions[:1]), expected)
    assert_equal_to_rounding(logits(model, x[:1], cu_seq_lens_q=torch.tensor([0, 21])), expected[:1])
    _, cache = in_calls(model, x[:, :13], [13])
    with torch.no_grad():
        rest = model(x[:, 13:], position_ids=positions[:, 13:], past_key_values=cache).logits
    assert_equal_to_rounding(rest, expected[:, 13:])


# --- Padding ---------------------------------------------------------------------------------------------------------

SIDES = ["left", "right", "both"]


def pad(rows: list[Tensor], side: str, width: int) -> tuple[Tensor, Tensor]:
    """Rows [T] in a batch [B, width] and its mask. Padding holds random tokens, so that none of them passes unnoticed."""
    x, mask = ids(len(rows), width, seed=9), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        free = width - len(row)
        start = {"left": free, "right": 0, "both": (free + 1) // 2}[side]
        x[i, start : start + len(row)] = row
        mask[i, start : start + len(row)] = 1
    return x, mask


def documents(*lengths: int) -> list[Tensor]:
    return [ids(n, seed=n) for n in lengths]


@pytest.mark.parametrize("side", SIDES)
@every_model
def test_padding(name, side):
    """Real tokens have the logits and pass on the gradients that they have without padding."""
    model, rows = tiny_model(name), documents(1, 9, 17, 30)
    x, mask = pad(rows, side, 33)
    padded = model(x, attention_mask=mask, use_cache=False).logits
    assert padded.isfinite().all()
    objective = actual = 0.0
    for i, row in enumerate(rows):
        alone, real = model(row[None], use_cache=False).logits[0], padded[i][mask[i].bool()]
        assert_equal_to_rounding(real, alone, f"logits of row {i}")
        objective, actual = objective + (weights_like(alone) * alone).sum(), actual + (weights_like(alone) * real).sum()
    assert_equal_gradients(gradients(model, actual), gradients(model, objective))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float64], ids=str)
@one_of_each
def test_padding_mask_of_any_dtype(name, dtype):
    model = tiny_model(name)
    x, mask = pad(documents(4, 9), "left", 12)
    assert_equal_to_rounding(
        logits(model, x, attention_mask=mask.to(dtype))[mask.bool()], logits(model, x, attention_mask=mask)[mask.bool()]
    )


@every_config
def test_a_mask_that_hides_nothing_changes_nothing(name):
    model, x = tiny_model(name), ids(2, 21)
    assert_equal_to_rounding(logits(model, x, attention_mask=torch.ones_like(x)), logits(model, x))
    found, _ = in_calls(model, x, [9, 1, 11], mask=torch.ones_like(x))
    assert_equal_to_rounding(found, logits(model, x))


def expect_continuations(model: PreTrainedModel, rows: list[Tensor], more: Tensor, found: Tensor) -> None:
    for i, row in enumerate(rows):
        alone = logits(model, torch.cat([row, more[i]])[None])[:, len(row) :]
        assert_equal_to_rounding(found[i : i + 1], alone, f"logits after row {i}")


@pytest.mark.parametrize("lengths", [[8], [1] * 8, [3, 1, 4]], ids=["at_once", "token_by_token", "3_1_4"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name, cache_of", [*product(CONFIGS, ["user"]), *STATIC])
def test_cache_after_padding(name, side, lengths, cache_of):
    """The cache after a padded prompt leads on as that of the bare prompt does, whatever side the padding is on."""
    # A sliding window counts places in the cache, as Transformers makes it: it must reach past the padding inside it.
    window = {"sliding_window": 32} if name in SLIDING_WINDOW and side != "left" else {}
    model, rows, more = tiny_model(name, **window), documents(1, 9, 17), ids(3, 8, seed=2)
    x, mask = pad(rows, side, 19)
    mask = torch.cat([mask, torch.ones_like(more)], 1)
    cache = new_cache(model) if cache_of == "user" else StaticCache(config=model.config, max_cache_len=27)
    in_calls(model, x, [19], cache, mask[:, :19])
    found, _ = in_calls(model, more, lengths, cache, mask)
    expect_continuations(model, rows, more, found)


@pytest.mark.parametrize("side", SIDES)
@every_config
def test_padded_prompt_token_by_token(name, side):
    """A padded prompt fed token by token, with the mask that grows: rows start, and end, at different calls."""
    model, rows = tiny_model(name), documents(1, 9, 17)
    x, mask = pad(rows, side, 19)
    for lengths in ([1] * 19, [6, 1, 1, 11]):
        found, _ = in_calls(model, x, lengths, mask=mask)
        assert found.isfinite().all()
        for i, row in enumerate(rows):
            assert_equal_to_rounding(found[i][mask[i].bool()], logits(model, row[None])[0], f"logits of row {i}")


# --- Backend ---------------------------------------------------------------------------------------------------------

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


def logits_and_gradients(model: PreTrainedModel, call: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    found = call()
    return found.detach(), gradients(model, (weights_like(found) * found).sum())


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


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILER = "aot_eager"  # the graphs of torch.compile, run as they are: generating code takes a minute each
COMPILED = {
    "gla-conv-kv-phi": {"num_hidden_layers": 1},
    "linear-softmax": {"num_hidden_layers": 1},
    "hyena-order3": {"num_hidden_layers": 1},
    "hybrid-mamba2": {"num_hidden_layers": 1, "pattern": "N"},
    "hybrid-sliding": {},
    "hybrid-rope": {"num_hidden_layers": 2, "pattern": "GA"},
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_is_eager(name, dynamo):
    """One graph without a break, forward and backward, for plain and for packed rows."""
    model, x = tiny_model(name, **COMPILED[name]), ids(1, 70)
    compiled = torch.compile(model, fullgraph=True, backend=COMPILER)
    for kwargs in ({}, {"cu_seq_lens_q": torch.tensor([0, 5, 5, 69, 70], dtype=torch.int32)}):
        expected = logits_and_gradients(model, lambda: model(x, use_cache=False, **kwargs).logits)  # noqa: B023
        found = logits_and_gradients(model, lambda: compiled(x, use_cache=False, **kwargs).logits)  # noqa: B023
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


# --- Batch -----------------------------------------------------------------------------------------------------------


@every_model
def test_batch(name):
    """A row's logits do not depend on its neighbours."""
    model, x = tiny_model(name), ids(4, 70)
    together = logits(model, x)
    for i in range(4):
        assert_equal_to_rounding(together[i : i + 1], logits(model, x[i : i + 1]), f"logits of row {i}")


# --- Training and dtypes ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # 5.17 knows no other name
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not_reentrant", "reentrant"])
@every_model
def test_gradient_checkpointing(name, use_reentrant):
    """Computing the layers again changes no gradient: plain, packed and padded."""
    depth = one_layer_of_each_kind(name) if name in PRESETS else {}
    model = tiny_model(name, **depth).train()
    x, mask = pad(documents(9, 17), "left", 20)
    row = ids(1, 40)
    forms = {
        "plain": lambda: model(x).logits,
        "padded": lambda: model(x, attention_mask=mask).logits,
        "packed": lambda: model(row, cu_seq_lens_q=torch.tensor([0, 7, 40])).logits,
    }
    expected = {form: logits_and_gradients(model, call) for form, call in forms.items()}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert model.is_gradient_checkpointing
    for form, call in forms.items():
        model.zero_grad()
        found = call()
        (weights_like(found) * found).sum().backward()  # the reentrant kind knows backward() only
        assert_equal_to_rounding(found, expected[form][0])
        actual = {n: p.grad for n, p in model.named_parameters()}
        for parameter, gradient in expected[form][1].items():
            zero = torch.zeros_like(gradient)
            found_gradient = zero if actual[parameter] is None else actual[parameter]
            assert_equal_to_rounding(found_gradient, gradient, f"gradients of {parameter}")


def filter_dtypes(model: PreTrainedModel) -> set[torch.dtype]:
    filters = [module for module in model.modules() if isinstance(module, HyenaFilter)]
    return {p.dtype for module in filters for p in module.parameters()}


@pytest.mark.parametrize("origin", ["to", "from_pretrained", "from_config"])
@every_config
def test_bfloat16(name, origin, tmp_path):
    """Finite logits and gradients, close to float64's; filters of Hyena, decays and recurrent states stay in float32."""
    if origin == "to":
        model = tiny_model(name).to(torch.bfloat16)
    elif origin == "from_pretrained":
        tiny_model(name, dtype=torch.float32).save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    else:
        model = AutoModelForCausalLM.from_config(tiny_config(name), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    wide = re.compile(r"\.implicit_filter\.|\.mixer\.(A_log|D|dt_bias)$")
    assert {p.dtype for n, p in model.named_parameters() if not wide.search(n)} == {torch.bfloat16}
    assert filter_dtypes(model) <= {torch.float32}
    x = ids(2, 70)
    output = model(x, use_cache=True)
    assert output.logits.dtype == torch.bfloat16
    for layer, kind in zip(output.past_key_values.layers, model.config.layer_types, strict=True):
        if kind == "linear_attention":
            assert layer.states["recurrent"].dtype == torch.float32
    found_gradients = gradients(model, output.logits.float().square().mean())
    assert all(g.isfinite().all() for g in found_gradients.values())
    exact = copy.deepcopy(model).double()
    error = (output.logits - logits(exact, x)).square().mean().sqrt() / logits(exact, x).square().mean().sqrt()
    # Each of about ten roundings a layer costs 2^-9 of the activations, and a layer or two amplify it a few times.
    assert error < 0.1, f"bfloat16 is {error:.3f} away from float64"
