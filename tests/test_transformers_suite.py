"""What Transformers' common tests ask of every model, without a checkout; `transformers_suite` runs those tests themselves."""

import copy
import inspect
import math

import pytest
import torch
from families import TINY, VOCAB, ids, spread_parameters, tiny_config, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Cache,
    PreTrainedModel,
    StaticCache,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.models.auto import modeling_auto
from transformers.trainer_pt_utils import LabelSmoother

from hf_linear.decoder import LinearPreTrainedModel
from hf_linear.mixers.hyena import HyenaFilter

NAMES = ["gla", "gla-conv-kv-phi", "retnet", "linear-elu", "hyena", "hybrid-rope", "hybrid-sliding"]
NAMES += ["hybrid-sparse", "hybrid-shared"]
ATTENTION = ["hybrid-rope", "hybrid-sliding", "hybrid-sparse", "hybrid-shared"]
HEADS = {
    "Model": (AutoModel, "MODEL_MAPPING_NAMES"),
    "ForCausalLM": (AutoModelForCausalLM, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "ForSequenceClassification": (
        AutoModelForSequenceClassification,
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    ),
    "ForTokenClassification": (AutoModelForTokenClassification, "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"),
}
PAD = 0
# Logits are of order 1 in float32. A wrong state, mask or weight moves them by 1e-3 and more in these models.
ROUNDING = {"rtol": 1e-5, "atol": 3e-5}

every_family = pytest.mark.parametrize("name", NAMES)
every_head = pytest.mark.parametrize("head", HEADS)


def model_of(name: str, head: str = "ForCausalLM", **options) -> PreTrainedModel:
    return tiny_model(name, head, dtype=torch.float32, pad_token_id=PAD, **options)


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return ids(*shape, seed=seed).clamp(min=1)  # 0 is padding


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, **ROUNDING)


def tensors_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def filters_of(model: PreTrainedModel) -> tuple[str, ...]:
    """The prefixes of Hyena's filters."""
    return tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, HyenaFilter))


def loaded(cls, path, **options):
    """A model, and what from_pretrained says about its weights, which is nothing when they fit."""
    return cls.from_pretrained(path, output_loading_info=True, **options)


# --- Names and config ------------------------------------------------------------------------------------------------


@every_head
@every_family
def test_auto_classes_and_names(name, head):
    config = tiny_config(name)
    auto, mapping = HEADS[head]
    model = auto.from_config(config)
    assert type(model).__name__.endswith(head)
    # Trainer and pipelines go by these dicts, which AutoModel.register does not fill.
    assert getattr(modeling_auto, mapping)[config.model_type] == type(model).__name__


@every_family
def test_config(name, tmp_path):
    config = tiny_config(name, num_labels=3)
    for field in ("num_attention_heads", "num_key_value_heads", "hidden_size", "num_hidden_layers", "vocab_size"):
        assert isinstance(getattr(config, field), int), field
    assert len(config.layer_types) == config.num_hidden_layers
    assert len(config.id2label) == 3
    renamed = copy.deepcopy(config)
    renamed.num_attention_heads = 7
    assert renamed.num_heads == 7
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()
    assert type(config)(**config.to_dict()).to_diff_dict() == config.to_diff_dict()
    type(config)()  # every field has a default


@every_head
@every_family
def test_structure(name, head):
    model = model_of(name, head)
    assert next(iter(inspect.signature(model.forward).parameters)) == model.main_input_name == "input_ids"
    classes = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) <= classes
    new = torch.nn.Embedding(*model.get_input_embeddings().weight.shape)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is new
    if head == "ForCausalLM":
        assert model.get_output_embeddings() is model.lm_head
        assert model.can_generate()


# --- Initialisation, saving and loading ------------------------------------------------------------------------------


@every_head
@every_family
def test_initialisation_from_meta(name, head, monkeypatch):
    """With one seed a module, a model whose every weight is missing from the checkpoint is one by the constructor."""
    cls, init_weights = type(model_of(name, head)), LinearPreTrainedModel._init_weights

    def seeded(self, module):
        torch.manual_seed(0)
        init_weights(self, module)

    monkeypatch.setattr(LinearPreTrainedModel, "_init_weights", seeded)
    made = tensors_of(cls(tiny_config(name)))
    loaded = tensors_of(cls.from_pretrained(None, config=tiny_config(name), state_dict={}))
    assert loaded.keys() == made.keys()
    assert [key for key, x in made.items() if not torch.equal(x, loaded[key])] == []
    assert all(x.isfinite().all() for x in made.values())


@every_family
def test_initialisation_is_deterministic(name):
    models = []
    for _ in range(2):
        set_seed(0)
        models.append(tensors_of(AutoModelForCausalLM.from_config(tiny_config(name))))
    assert all(torch.equal(x, models[1][key]) for key, x in models[0].items())


@every_family
def test_only_missing_weights_are_initialised(name, tmp_path):
    model = model_of(name, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    saved = load_file(file)
    kept = {key: x for i, (key, x) in enumerate(sorted(saved.items())) if i % 2}
    save_file(kept, file, metadata={"format": "pt"})
    again, info = loaded(type(model), tmp_path)
    found, missing = tensors_of(again), set(info["missing_keys"])
    assert missing == set(saved) - set(kept)
    for key, x in found.items():
        assert x.isfinite().all(), key
        if key in kept or not key.startswith(filters_of(model)):  # some of a filter is not random
            assert torch.equal(x, saved[key]) == (key in kept), key


@every_head
@every_family
def test_save_and_load(name, head, tmp_path):
    model = model_of(name, head)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20kB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert AutoConfig.from_pretrained(tmp_path / "whole").architectures == [type(model).__name__]
    x = tokens(2, 7)
    for folder in ("whole", "shards"):
        again, info = loaded(HEADS[head][0], tmp_path / folder)
        assert not any(info.values()), info
        assert type(again) is type(model)
        assert not again.training
        with torch.no_grad():
            assert torch.equal(again(x)[0], model(x)[0])


@every_family
def test_base_model_and_head_load_each_other(name, tmp_path):
    model = model_of(name)
    model.save_pretrained(tmp_path / "head")
    base, info = loaded(AutoModel, tmp_path / "head")
    assert not info["missing_keys"]
    base.save_pretrained(tmp_path / "base")
    again, info = loaded(type(model), tmp_path / "base")
    tied = model.config.tie_word_embeddings
    assert set(info["missing_keys"]) == (set() if tied else {"lm_head.weight"})
    x = tokens(2, 7)
    with torch.no_grad():
        assert torch.equal(base(x)[0], model.model(x)[0])
        assert torch.equal(again.model(x)[0], model.model(x)[0])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@every_family
def test_tied_weights(name, tied, tmp_path):
    model = model_of(name, tie_word_embeddings=tied)
    embedding = model.get_input_embeddings().weight
    assert (model.lm_head.weight is embedding) == tied
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    shared = {"lm_head.weight", "model.embed_tokens.weight"}
    assert len(stored & shared) == (1 if tied else 2)
    assert stored | shared == set(model.state_dict())
    again, info = loaded(type(model), tmp_path)
    assert not any(info.values()), info
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
    x = tokens(2, 7)
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x).logits)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@every_family
def test_resize_token_embeddings(name, tied):
    model, x = model_of(name, tie_word_embeddings=tied), tokens(2, 7).clamp(max=VOCAB - 20)
    with torch.no_grad():
        before = model(x).logits
        for size, multiple, expected in ((VOCAB + 10, None, VOCAB + 10), (VOCAB - 15, None, VOCAB - 15), (50, 64, 64)):
            model.resize_token_embeddings(size, pad_to_multiple_of=multiple)
            assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == expected
            assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
            logits = model(x, labels=x).logits
            assert logits.shape[-1] == expected
            same = VOCAB - 20
            assert torch.equal(logits[..., :same], before[..., :same])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_family
def test_dtypes(name, dtype, tmp_path):
    """Every weight takes the dtype, the filters of Hyena excepted, whichever way it is asked for."""
    model = model_of(name)
    model.save_pretrained(tmp_path)
    x = tokens(2, 7)
    with torch.no_grad():
        expected = model(x).logits
    by_load = type(model).from_pretrained(tmp_path, dtype=dtype)
    by_load.save_pretrained(tmp_path / "half")
    set_seed(0)
    by_auto = type(model).from_pretrained(tmp_path / "half", dtype="auto")
    by_config = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    for half in (by_load, by_auto, by_config, copy.deepcopy(model).to(dtype)):
        assert half.dtype == dtype
        for key, p in half.named_parameters():
            assert p.dtype == (torch.float32 if key.startswith(filters_of(half)) else dtype), key
        with torch.no_grad():
            logits = half(x).logits
        assert logits.dtype == dtype
        if half is not by_config:  # whose weights are other ones
            assert (logits.float() - expected).abs().mean() < 0.1 * expected.abs().mean()


@pytest.mark.parametrize("device_map", ["cpu", "auto", "meta"])
@every_family
def test_device_map(name, device_map, tmp_path):
    model = model_of(name)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, device_map=device_map)
    if device_map == "meta":
        assert {p.device.type for p in [*again.parameters(), *again.buffers()]} == {"meta"}
        assert again(tokens(2, 7).to("meta")).logits.shape == (2, 7, VOCAB)
        return
    x = tokens(2, 7)
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x).logits)


@every_family
def test_layers_offloaded_to_disk(name, tmp_path):
    model, x = model_of(name), tokens(2, 7)
    model.save_pretrained(tmp_path)
    places = {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(model.config.num_hidden_layers)}
    places.update(dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head"), "cpu"))
    if model.model.shared_block is not None:
        places["model.shared_block"] = "disk"
    again = type(model).from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "disk")
    with torch.no_grad():
        close(again(x).logits, model(x).logits)
    greedy = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(again.generate(x, **greedy), model.generate(x, **greedy))


def test_generation_config_is_saved(tmp_path):
    model = model_of("gla")
    model.generation_config.update(max_new_tokens=7, do_sample=True, top_k=3)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).generation_config
    assert (again.max_new_tokens, again.do_sample, again.top_k) == (7, True, 3)


# --- Outputs ---------------------------------------------------------------------------------------------------------


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
def test_inputs_embeds(name):
    model, x = model_of(name), tokens(2, 7)
    embeds = model.get_input_embeddings()(x).detach()
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embeds).logits, model(x).logits)
    greedy = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(inputs_embeds=embeds, **greedy), model.generate(x, **greedy)[:, 7:])
    for wrong in ({}, {"input_ids": x, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**wrong)


@every_family
def test_logits_to_keep(name):
    model, x = model_of(name), tokens(2, 7)
    with torch.no_grad():
        everything = model(x).logits
        close(model(x, logits_to_keep=3).logits, everything[:, -3:])
        close(model(x, logits_to_keep=torch.tensor([0, 4])).logits, everything[:, [0, 4]])


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


# --- Heads and losses ------------------------------------------------------------------------------------------------


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


# --- Training --------------------------------------------------------------------------------------------------------


def gradients(model: PreTrainedModel, x: Tensor) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    model(x, labels=x).loss.backward()
    return {key: p.grad for key, p in model.named_parameters() if p.requires_grad}


@every_family
def test_every_parameter_learns(name):
    found = gradients(model_of(name), tokens(2, 9))
    assert [key for key, g in found.items() if g is None or not g.isfinite().all() or not g.any()] == []


@pytest.mark.filterwarnings("ignore::FutureWarning")  # its newest name is not in every version supported
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@every_family
def test_gradient_checkpointing_changes_no_gradient(name, use_reentrant):
    model, x = model_of(name), tokens(2, 9)
    expected = gradients(model, x)
    expected = {key: g.clone() for key, g in expected.items()}
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert model.is_gradient_checkpointing
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    hook = model.model.layers[0].mixer.register_forward_pre_hook(count)
    if use_reentrant:
        model.enable_input_require_grads()
    found = gradients(model, x)
    assert calls == 2  # forward, and again in the backward pass
    hook.remove()
    for key, g in expected.items():
        close(found[key], g)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


@every_family
def test_inputs_can_require_gradients(name):
    """As PEFT asks for: frozen weights, and gradients that flow through them."""
    model = model_of(name).train()
    model.requires_grad_(False)
    model.enable_input_require_grads()
    assert model(tokens(2, 7), labels=tokens(2, 7)).loss.requires_grad


class Rows(torch.utils.data.Dataset):
    """Rows of one length whose numbers of labels are unequal."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        x = tokens(8, 16)[i]
        labels = x.clone()
        labels[: 2 * i] = -100
        return {"input_ids": x, "labels": labels}


def trainer(model: PreTrainedModel, folder, **options) -> Trainer:
    arguments = {
        "learning_rate": 0.1,
        "optim": "sgd",
        "max_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        **options,
    }
    return Trainer(model, TrainingArguments(str(folder), **arguments), train_dataset=Rows())


@pytest.mark.parametrize("name", ["gla", "linear-elu", "hyena", "hybrid-sliding"])
def test_accumulated_gradients_are_those_of_a_large_batch(name, tmp_path):
    """With unequal numbers of labels, only a loss divided by `num_items_in_batch` gives the same step."""
    results = []
    for batch, steps in ((8, 1), (2, 4)):
        model = model_of(name)
        run = trainer(model, tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=steps)
        assert run.model_accepts_loss_kwargs
        loss = run.train().training_loss
        results.append((loss, tensors_of(model)))
    (loss, weights), (other_loss, other_weights) = results
    assert math.isclose(loss, other_loss, rel_tol=1e-5)
    start = tensors_of(model_of(name))
    assert any(not torch.equal(weights[key], start[key]) for key in weights)
    for key, x in weights.items():
        close(other_weights[key], x)


@pytest.mark.parametrize("name", ["gla", "hybrid-rope"])
def test_label_smoothing_shifts_labels(name, tmp_path):
    """Trainer shifts them only for the class names that it knows as causal language models."""
    model = model_of(name).eval()
    run = trainer(model, tmp_path, label_smoothing_factor=0.1)
    x = tokens(2, 9)
    with torch.no_grad():
        found = run.compute_loss(model, {"input_ids": x, "labels": x.clone()})
        expected = LabelSmoother(epsilon=0.1)(model(x), x, shift_labels=True)
    close(found, expected)


# --- Generation ------------------------------------------------------------------------------------------------------

GREEDY = {"do_sample": False, "max_new_tokens": 6}


def greedy_by_hand(model: PreTrainedModel, x: Tensor, new: int) -> Tensor:
    for _ in range(new):
        with torch.no_grad():
            x = torch.cat([x, model(x, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return x


@every_family
def test_greedy(name):
    model, x = model_of(name), tokens(3, 7)
    expected = greedy_by_hand(model, x, 6)
    assert torch.equal(model.generate(x, **GREEDY), expected)
    assert torch.equal(model.generate(x, use_cache=False, **GREEDY), expected)


@every_family
def test_batch_of_padded_prompts(name):
    model, x = model_of(name), tokens(2, 9)
    padded, mask = x.clone(), torch.ones_like(x)
    padded[0, :4], mask[0, :4] = PAD, 0
    found = model.generate(padded, attention_mask=mask, **GREEDY)
    assert torch.equal(found[0, 4:], greedy_by_hand(model, x[:1, 4:], 6)[0])
    assert torch.equal(found[1], greedy_by_hand(model, x[1:], 6)[0])


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


@pytest.mark.parametrize("name", [name for name in NAMES if name != "hyena"])
def test_static_cache(name):
    """Hyena's state grows, so that it has none."""
    model, x = model_of(name), tokens(2, 7)
    options = {"cache_implementation": "static", "return_dict_in_generate": True, "disable_compile": True}
    output = model.generate(x, **options, **GREEDY)
    assert isinstance(output.past_key_values, StaticCache)
    assert torch.equal(output.sequences, model.generate(x, **GREEDY))


@every_family
def test_assisted_generation_is_refused(name):
    """A recurrent state cannot go back over rejected tokens."""
    model, x = model_of(name), tokens(1, 7)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(x, assistant_model=copy.deepcopy(model), **GREEDY)


def test_generation_of_a_freshly_made_model():
    """Without any weights of ours: the defaults of a config alone."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gla", **TINY)).eval()
    spread_parameters(model)
    assert model.generate(tokens(1, 3), **GREEDY).shape == (1, 9)


def test_a_filter_hands_out_no_parameter():
    """FSDP2 frees the parameters of a module when its forward ends; what it returned has to outlive them."""
    (hyena_filter,) = (m for m in model_of("hyena", num_hidden_layers=1).modules() if isinstance(m, HyenaFilter))
    parameters = {p.untyped_storage().data_ptr() for p in hyena_filter.parameters()}
    assert all(output.untyped_storage().data_ptr() not in parameters for output in hyena_filter(5))
