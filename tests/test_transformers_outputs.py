"""What Transformers' common tests ask of every model, without a checkout: what it returns, and the losses of its heads."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache
from transformers_common import PAD, close, every_family, every_head, model_of, tokens


@every_head
@every_family
def test_hidden_states_and_attentions(name, head):
    model, x = model_of(name, head), tokens(2, 7)
    model.set_attn_implementation("eager")
    config = model.config
    with torch.no_grad():
        outputs = model(x, output_hidden_states=True, output_attentions=True)
        plain = model(x)
    assert [tuple(h.shape) for h in outputs.hidden_states] == [(2, 7, config.hidden_size)] * (len(config.mixers) + 1)
    assert plain.hidden_states is None
    assert plain.attentions is None
    if head == "Model":
        assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    attention_layers = [kind for kind in config.layer_types if kind != "linear_attention"]
    assert [tuple(a.shape) for a in outputs.attentions] == [(2, config.num_heads, 7, 7)] * len(attention_layers)
    for weights in outputs.attentions:
        close(weights.sum(-1), torch.ones(2, config.num_heads, 7))
        assert not weights.triu(1).any()


@every_family
def test_gradients_reach_hidden_states(name):
    model = model_of(name)
    outputs = model(tokens(2, 7), output_hidden_states=True)
    for h in outputs.hidden_states:
        h.retain_grad()
    outputs.logits.square().sum().backward()
    assert all(h.grad is not None and h.grad.any() for h in outputs.hidden_states)


ATTENTION = ["hybrid-rope", "hybrid-sliding", "hybrid-sparse", "hybrid-shared"]


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_implementations_agree(name):
    model, x = model_of(name), tokens(2, 12)
    mask = torch.ones_like(x)
    mask[0, :5] = 0
    found = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            found.append(model(x, attention_mask=mask).logits[mask.bool()])
    close(*found)


def flat(output) -> list[Tensor]:
    """The tensors of an output, those of its cache among them."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Cache):
        return [x for layer in output.layers for x in states(layer)]
    return [x for part in output for x in flat(part)]


def states(layer) -> list[Tensor]:
    return list(layer.states.values()) if hasattr(layer, "states") else [layer.keys, layer.values]


@every_head
@every_family
def test_tuple_and_dict_outputs_agree(name, head):
    model, x = model_of(name, head), tokens(2, 7)
    options = {"output_hidden_states": True} if head == "Model" else {"labels": x if head == "ForCausalLM" else x * 0}
    if head == "ForSequenceClassification":
        options["labels"] = torch.tensor([0, 1])
    with torch.no_grad():
        as_dict, as_tuple = model(x, **options), model(x, return_dict=False, **options)
    assert type(as_tuple) is tuple
    if head != "Model":
        assert as_tuple[0] is not None
        assert torch.equal(as_tuple[0], as_dict.loss)
    for a, b in zip(flat(as_tuple), flat(as_dict.to_tuple()), strict=True):
        assert torch.equal(a, b)


@every_family
def test_cache_holds_the_states_of_every_layer(name):
    model, x = model_of(name), tokens(2, 7)
    with torch.no_grad():
        cache = model(x, use_cache=True).past_key_values
        assert model(x, use_cache=False).past_key_values is None
    assert len(cache) == model.config.num_hidden_layers
    for layer, decoder_layer in zip(cache.layers, model.model.layers, strict=True):
        has_convolution = any(isinstance(module, torch.nn.Conv1d) for module in decoder_layer.mixer.modules())
        if decoder_layer.mixer.cache_layer is None:
            assert layer.keys.shape[:2] == (2, model.config.num_key_value_heads)
            continue
        assert set(layer.states) == ({"recurrent", "conv"} if has_convolution else {"recurrent"})
        assert all(x.shape[0] == 2 and x.isfinite().all() for x in layer.states.values())
        assert (layer.conv_states[0] is not None) == layer.is_conv_states_initialized[0] == has_convolution


@every_family
def test_left_padding(name):
    """A padded row has the logits of the row alone, with position_ids given or not."""
    model, x = model_of(name), tokens(2, 7)
    padded = torch.cat([torch.full((2, 5), PAD), x], 1)
    mask = (padded != PAD).long()
    with torch.no_grad():
        expected = model(x).logits
        close(model(padded, attention_mask=mask).logits[:, 5:], expected)
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        close(model(padded, attention_mask=mask, position_ids=position_ids).logits[:, 5:], expected)


# --- Heads and losses ---


@every_family
def test_causal_lm_loss(name):
    model, x = model_of(name), tokens(2, 9)
    labels = x.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        assert model(x).loss is None
        output = model(x, labels=labels)
        logits = output.logits[:, :-1].flatten(0, 1)
        total = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        close(output.loss, total / (labels[:, 1:] != -100).sum())
        close(model(x, labels=labels, num_items_in_batch=torch.tensor(40)).loss, total / 40)
        close(model(x, labels=labels, num_items_in_batch=40).loss, total / 40)
        shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
        close(model(x, labels=labels, shift_labels=shifted).loss, output.loss)


@pytest.mark.parametrize("side", ["left", "right"])
@every_family
def test_sequence_classification(name, side):
    """The score is that of the last real token, on whichever side the padding is."""
    model, x = model_of(name, "ForSequenceClassification", num_labels=3), tokens(2, 7)
    pad = torch.full((2, 4), PAD)
    padded = torch.cat([pad, x] if side == "left" else [x, pad], 1)
    labels = torch.tensor([2, 0])
    with torch.no_grad():
        expected = model(x, labels=labels)
        found = model(padded, attention_mask=(padded != PAD).long(), labels=labels)
    assert expected.logits.shape == (2, 3)
    close(found.logits, expected.logits)
    close(found.loss, F.cross_entropy(expected.logits, labels))


@pytest.mark.parametrize(
    "problem, labels",
    [
        ("single_label_classification", torch.tensor([2, 0])),
        ("multi_label_classification", torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])),
        ("regression", torch.tensor([[0.3, 1.0, -1.0], [1.0, 0.2, 0.0]])),
    ],
)
@every_family
def test_problem_types(name, problem, labels):
    model = model_of(name, "ForSequenceClassification", num_labels=3, problem_type=problem)
    loss = model(tokens(2, 7), labels=labels).loss
    loss.backward()
    assert loss.isfinite()
    assert model.get_input_embeddings().weight.grad.any()


@every_family
def test_token_classification(name):
    model, x = model_of(name, "ForTokenClassification", num_labels=3), tokens(2, 7)
    labels = x % 3
    labels[0, :2] = -100
    with torch.no_grad():
        output = model(x, labels=labels)
    assert output.logits.shape == (2, 7, 3)
    close(output.loss, F.cross_entropy(output.logits.flatten(0, 1), labels.flatten()))
