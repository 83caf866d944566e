"""`generate` with the cache is `generate` without it, in every mode that Transformers has for stateful models.

Models are in float64, so that two ways to the same logits choose the same token.
"""

import copy

import pytest
import torch
from families import (
    CONFIGS,
    FIXED_STATE,
    HYENA,
    LONGEST,
    ONE_OF_EACH,
    SLIDING_WINDOW,
    VOCAB,
    WITHOUT_HYENA,
    ids,
    new_cache,
    tiny_model,
)
from torch import Tensor
from transformers import Cache, CompileConfig, LogitsProcessor, PreTrainedModel, StaticCache

from hf_linear.cache import cache_bytes

every_config = pytest.mark.parametrize("name", CONFIGS)
one_of_each = pytest.mark.parametrize("name", ONE_OF_EACH)

NEW = 12


class NothingTwice(LogitsProcessor):
    """No new token comes a second time: a random model would settle on one, whatever its state, and show little."""

    def __init__(self, prompt_length: int):
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.scatter(1, input_ids[:, self.prompt_length :], -torch.inf)


def generate(model: PreTrainedModel, input_ids: Tensor | None, **options) -> Tensor:
    """Prompt and new tokens, all different; the same draws at every call where `options` ask for sampling."""
    torch.manual_seed(0)
    new_tokens_only = NothingTwice(0 if input_ids is None else input_ids.shape[1])
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "logits_processor": [new_tokens_only], **options}
    if "attention_mask" not in options:
        options["attention_mask"] = torch.ones_like(input_ids)
    return model.generate(input_ids, **options)


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True},
    "sampling_beams": {"do_sample": True, "num_beams": 3},
    "several_samples": {"do_sample": True, "num_return_sequences": 3},
    "several_beams": {"num_beams": 4, "num_return_sequences": 2},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
@every_config
def test_cache_changes_nothing(name, options):
    model, prompt = tiny_model(name), ids(2, 9)
    with_cache = generate(model, prompt, use_cache=True, **options)
    assert with_cache.shape == (2 * options.get("num_return_sequences", 1), 9 + NEW)
    assert torch.equal(with_cache, generate(model, prompt, use_cache=False, **options))


@every_config
def test_greedy_takes_the_likeliest(name):
    """Without any of generate's machinery: the argmax of the logits, over and over."""
    model, x = tiny_model(name), ids(2, 9)
    found = generate(model, x, logits_processor=[])
    with torch.no_grad():
        for _ in range(NEW):
            x = torch.cat([x, model(x, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, x)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@every_config
def test_left_padding(name, options):
    """Two prompts of different lengths in a batch generate what each does alone."""
    model, short, long = tiny_model(name), ids(1, 5, seed=1), ids(1, 12, seed=2)
    x = torch.cat([torch.cat([ids(1, 7, seed=3), short], 1), long])
    mask = torch.ones_like(x)
    mask[0, :7] = 0
    together = generate(model, x, attention_mask=mask, **options)[:, 12:]
    alone = torch.cat([generate(model, short, **options)[:, 5:], generate(model, long, **options)[:, 12:]])
    assert torch.equal(together, alone)


def continue_from(model: PreTrainedModel, x: Tensor, cache: Cache | None, **options) -> tuple[Tensor, Cache]:
    output = generate(model, x, past_key_values=cache, return_dict_in_generate=True, **options)
    return output.sequences, output.past_key_values


@every_config
def test_turns_of_a_conversation(name):
    """Turn after turn with one cache generates what a fresh call on the whole history does."""
    model, x, cache = tiny_model(name), ids(2, 9), None
    for turn in range(3):
        fresh = generate(model, x)
        x, cache = continue_from(model, x, cache)
        assert torch.equal(x, fresh), f"turn {turn}"
        assert int(cache.get_seq_length()) == x.shape[1] - 1
        x = torch.cat([x, ids(2, 4, seed=10 + turn)], 1)


@every_config
def test_continuing_from_a_prefix(name):
    """One cache of a common prefix, copied for every prompt that begins with it."""
    model, prefix = tiny_model(name), ids(1, 11)
    with torch.no_grad():
        cache = model(prefix, past_key_values=new_cache(model)).past_key_values
    for seed in (4, 5):
        x = torch.cat([prefix, ids(1, 3, seed=seed)], 1)
        found, _ = continue_from(model, x, copy.deepcopy(cache))
        assert torch.equal(found, generate(model, x))


@every_config
def test_prefill_in_chunks(name):
    model, prompt = tiny_model(name), ids(2, 23)
    assert torch.equal(generate(model, prompt, prefill_chunk_size=5), generate(model, prompt))


@every_config
def test_embeddings_as_prompt(name):
    model, prompt = tiny_model(name), ids(2, 9)
    embeddings = model.get_input_embeddings()(prompt).detach()
    found = generate(model, None, inputs_embeds=embeddings, attention_mask=torch.ones_like(prompt))
    assert torch.equal(found, generate(model, prompt)[:, 9:])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", WITHOUT_HYENA)
def test_static_cache(name, options):
    model, prompt = tiny_model(name), ids(2, 9)
    found = generate(model, prompt, cache_implementation="static", return_dict_in_generate=True, **options)
    assert isinstance(found.past_key_values, StaticCache)
    assert torch.equal(found.sequences, generate(model, prompt, **options))


@pytest.mark.parametrize("name", WITHOUT_HYENA)
def test_static_cache_left_padded(name):
    model, prompt = tiny_model(name), ids(2, 9)
    mask = torch.ones_like(prompt)
    mask[0, :4] = 0
    found = generate(model, prompt, attention_mask=mask, cache_implementation="static")
    assert torch.equal(found, generate(model, prompt, attention_mask=mask))


@pytest.mark.parametrize("name", [name for name in ONE_OF_EACH if name not in HYENA] + ["hybrid-rope"])
def test_compiled_once_for_all_tokens(name):
    """Masks, states and counters keep their shapes and strides from token to token, left padding included."""
    model, prompt, graphs = tiny_model(name), ids(2, 9), []

    def backend(graph, inputs, mode):
        graphs.append(graph)
        return graph.forward

    compiling = CompileConfig(fullgraph=True, dynamic=False, backend=backend)
    compiling._compile_all_devices = True  # `generate` compiles on accelerators alone, unless told so
    mask = torch.ones_like(prompt)
    mask[0, :4] = 0
    torch.compiler.reset()
    found = generate(model, prompt, attention_mask=mask, cache_implementation="static", compile_config=compiling)
    assert len(graphs) == 1
    assert torch.equal(found, generate(model, prompt, attention_mask=mask))


@pytest.mark.parametrize("name", FIXED_STATE)
def test_state_does_not_grow(name):
    """The bytes of the cache are those of the states [B, H, K, V] and of a few inputs of convolutions, at any length."""
    model, sizes = tiny_model(name, dtype=torch.float32), {}
    for tokens in (5, 50):
        _, cache = continue_from(model, ids(3, 4), None, max_new_tokens=tokens - 3)
        assert int(cache.get_seq_length()) == tokens
        sizes[tokens] = bytes_held(cache)
    config = model.config
    heads, key, value = config.num_heads, config.key_dim, config.value_dim
    normaliser = heads if config.model_type == "linear_attention" and config.feature_map != "identity" else 0
    state = key // heads * (value + normaliser)
    if getattr(config, "use_short_conv", False):
        shared = config.num_kv_heads / heads
        state += (config.conv_size - 1) * int(key + shared * key + shared * value)
    assert sizes[5] == sizes[50] == config.num_hidden_layers * 3 * state * 4  # rows, float32


@pytest.mark.parametrize("name", ["hyena", "hybrid-rope"])
def test_history_is_bounded_by_the_tokens(name):
    """Keys, values and the inputs of long convolutions grow with the tokens; sums ahead of the inputs at most double them."""
    model = tiny_model(name, dtype=torch.float32)
    with torch.no_grad():
        for n in (5, 20, 35):
            _, cache = continue_from(model, ids(3, 4), None, max_new_tokens=n - 3)
            plain = model(ids(3, n), past_key_values=new_cache(model)).past_key_values
            assert cache_bytes(plain) == bytes_held(plain) <= bytes_held(cache) <= 2 * bytes_held(plain)


def bytes_held(cache: Cache) -> int:
    """Bytes of every tensor that the cache's layers hold, however they hold it."""
    held = []
    for layer in cache.layers:
        for value in vars(layer).values():
            values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
            held += [x for x in values if isinstance(x, Tensor) and x.dim() > 0]
    return sum(x.nbytes for x in held)


@one_of_each
def test_assisted_decoding_is_refused(name):
    """A state cannot go back to before the tokens that were refused; Transformers says so for stateful models."""
    model = tiny_model(name)
    for options in ({"assistant_model": tiny_model(name)}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            generate(model, ids(1, 9), **options)


@one_of_each
def test_a_state_cannot_be_cropped(name):
    model = tiny_model(name)
    with torch.no_grad():
        cache = model(ids(1, 9), past_key_values=new_cache(model)).past_key_values
    assert not cache.is_croppable
    with pytest.raises((ValueError, RuntimeError), match="crop"):
        cache.crop(-3)


@every_config
def test_logits_to_keep(name):
    model, x = tiny_model(name), ids(2, 9)
    with torch.no_grad():
        everything = model(x).logits
        for keep in (0, 1, 4, 9):
            found = model(x, logits_to_keep=keep).logits
            assert found.shape == (2, keep or 9, VOCAB)
            assert torch.allclose(found, everything[:, -keep:], rtol=0, atol=1e-12)  # one matrix product, two sizes
        some = torch.tensor([0, 3, 8])
        assert torch.allclose(model(x, logits_to_keep=some).logits, everything[:, some], rtol=0, atol=1e-12)


@every_config
def test_generate_computes_the_last_logits_only(name):
    model, widths = tiny_model(name), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[1]))
    generate(model, ids(2, 9))
    assert widths == [1] * NEW


@every_config
def test_scores_are_the_logits(name):
    """The logits that `generate` reports for every step are those of one call on what it generated."""
    model, prompt = tiny_model(name), ids(2, 9)
    output = generate(model, prompt, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        expected = model(output.sequences, use_cache=False).logits[:, 8:-1]
    # float64: see ROUNDING in contract.py; generate hands its logits over in float32
    torch.testing.assert_close(torch.stack(output.logits, 1).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", HYENA)
def test_hyena_generates_up_to_its_filter(name):
    """The last token that fits is generated; test_errors has the one that does not."""
    model, prompt = tiny_model(name), ids(1, LONGEST - 5)
    found = generate(model, prompt, max_new_tokens=6)  # the sixth is never fed back
    assert found.shape[1] == LONGEST + 1
    assert torch.equal(found, generate(model, prompt, max_new_tokens=6, use_cache=False))


@pytest.mark.parametrize("name", SLIDING_WINDOW)
def test_sliding_window_forgets(name):
    """The cache of a sliding layer holds its window and no more."""
    model = tiny_model(name)
    _, cache = continue_from(model, ids(2, 9), None, max_new_tokens=30)
    for layer, kind in zip(cache.layers, model.config.layer_types, strict=True):
        if kind == "sliding_attention":
            assert layer.keys.shape[-2] == model.config.sliding_window - 1
