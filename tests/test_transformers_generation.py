"""What Transformers' common tests ask of every model, without a checkout: what test_generation has not."""

import pytest
import torch
from families import TINY, VOCAB, spread_parameters
from transformers import AutoConfig, AutoModelForCausalLM, set_seed
from transformers_common import close, every_family, model_of, tokens

GREEDY = {"do_sample": False, "max_new_tokens": 6}


@every_family
def test_sampling(name):
    """Sequences of a group differ from each other, and a seed gives them again without a cache."""
    model, x = model_of(name), tokens(2, 7)
    options = {"do_sample": True, "top_k": 10, "num_return_sequences": 3, "max_new_tokens": 6}
    found = []
    for use_cache in (True, False):
        set_seed(1)
        found.append(model.generate(x, use_cache=use_cache, **options))
    assert torch.equal(*found)
    assert found[0].shape == (6, 13)
    assert torch.equal(found[0][:, :7], x.repeat_interleave(3, 0))
    assert len(found[0].unique(dim=0)) > 2


@pytest.mark.parametrize("do_sample", [False, True], ids=["search", "sample"])
@every_family
def test_beams(name, do_sample):
    """The cache follows the beams: with it and without it they are the same."""
    model, x = model_of(name), tokens(2, 7)
    options = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 6, "do_sample": do_sample}
    found = []
    for use_cache in (True, False):
        set_seed(1)
        output = model.generate(x, use_cache=use_cache, return_dict_in_generate=True, output_scores=True, **options)
        found.append(output)
    assert found[0].sequences.shape == (6, 13)
    assert torch.equal(found[0].sequences, found[1].sequences)
    close(found[0].sequences_scores, found[1].sequences_scores)


@every_family
def test_dict_output(name):
    model, x = model_of(name), tokens(2, 7)
    model.set_attn_implementation("eager")
    options = {"output_scores": True, "output_logits": True, "output_hidden_states": True, "output_attentions": True}
    output = model.generate(x, return_dict_in_generate=True, **options, **GREEDY)
    assert [tuple(s.shape) for s in output.scores] == [(2, VOCAB)] * 6
    layers = model.config.num_hidden_layers
    for step, hidden_states in enumerate(output.hidden_states):
        assert [h.shape[1] for h in hidden_states] == [1 if step else 7] * (layers + 1)
    attention_layers = sum(kind != "linear_attention" for kind in model.config.layer_types)
    assert all(len(weights) == attention_layers for weights in output.attentions)
    assert output.past_key_values.get_seq_length() == 12


@every_family
def test_generation_continues_from_a_cache(name):
    model, x = model_of(name), tokens(2, 7)
    whole = model.generate(x, **GREEDY)
    half = {"do_sample": False, "max_new_tokens": 3}
    first = model.generate(x, return_dict_in_generate=True, **half)
    mask = torch.ones_like(first.sequences)
    second = model.generate(first.sequences, attention_mask=mask, past_key_values=first.past_key_values, **half)
    assert torch.equal(second, whole)


def test_generation_of_a_freshly_made_model():
    """Without any weights of ours: the defaults of a config alone."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gla", **TINY)).eval()
    spread_parameters(model)
    assert model.generate(tokens(1, 3), **GREEDY).shape == (1, 9)
