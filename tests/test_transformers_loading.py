"""What Transformers' common tests ask of every model, without a checkout: its names, and its weights made, saved and loaded."""

import copy
import inspect

import pytest
import torch
from families import VOCAB, tiny_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, set_seed
from transformers.models.auto import modeling_auto
from transformers_common import HEADS, close, every_family, every_head, filters_of, model_of, tensors_of, tokens

from hf_linear.decoder import LinearPreTrainedModel


def loaded(cls, path, **options):
    """A model, and what from_pretrained says about its weights, which is nothing when they fit."""
    return cls.from_pretrained(path, output_loading_info=True, **options)


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
