"""Layouts of other libraries: read by Transformers' loader, written back on request, and never in part."""

import json
import pickle
import re

import pytest
import torch
from checkpoint_files import change, same, weights_of
from families import TINY
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

from hf_linear import GLAConfig, GLAForCausalLM
from hf_linear.checkpoints.layout import save


@pytest.fixture
def ours():
    return GLAForCausalLM(GLAConfig(**TINY))


@pytest.fixture
def theirs(ours, tmp_path):
    """The model as flash-linear-attention writes it."""
    save(ours, tmp_path / "theirs", "fla")
    return tmp_path / "theirs"


def test_written_back_on_request(ours, theirs):
    keys = weights_of(theirs).keys()
    assert "model.layers.0.attn.g_norm_swish_gate.weight" in keys and "model.embeddings.weight" in keys
    assert not any("mixer" in key for key in keys)
    assert same(AutoModelForCausalLM.from_pretrained(theirs).state_dict(), ours.state_dict())
    with pytest.raises(ValueError, match=r"layout of a gla must be one of \['fla', 'fla_2024', 'gla_original'\], got 'flax'"):
        save(ours, theirs, "flax")


@pytest.mark.parametrize("form", ["shards", "bin", "device_map", "state_dict", "disk"])
def test_every_road_of_the_loader(form, ours, theirs, tmp_path):
    options = {}
    if form == "shards":
        save(ours, theirs, "fla", max_shard_size="50KB")
        assert (theirs / "model.safetensors.index.json").exists()
        (theirs / "model.safetensors").unlink()
    elif form == "bin":
        torch.save(weights_of(theirs), theirs / "pytorch_model.bin")
        (theirs / "model.safetensors").unlink()
    elif form == "device_map":
        options = {"device_map": "cpu", "dtype": torch.bfloat16}
    elif form == "disk":
        options = {"device_map": {"model": "cpu", "lm_head": "disk"}, "offload_folder": tmp_path / "offload"}
    else:
        options = {"config": ours.config, "state_dict": weights_of(theirs)}
    model, problems = GLAForCausalLM.from_pretrained(
        None if form == "state_dict" else theirs, output_loading_info=True, **options
    )
    assert not any(problems.values())
    if form == "disk":
        ids = torch.arange(5)[None]
        assert torch.equal(model(ids).logits, ours.eval()(ids).logits)
        save(model, tmp_path / "back", "fla")
        assert same(weights_of(tmp_path / "back"), weights_of(theirs))
    else:
        assert same(model.state_dict(), ours.to(options.get("dtype", torch.float32)).state_dict())


class Code:
    """A pickle of it calls print."""

    def __reduce__(self):
        return print, ("this ran",)


def test_a_pickle_runs_no_code(theirs, capsys):
    torch.save({**weights_of(theirs), "extra": Code()}, theirs / "pytorch_model.bin")
    (theirs / "model.safetensors").unlink()
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        AutoModelForCausalLM.from_pretrained(theirs)
    assert "this ran" not in capsys.readouterr().out


def test_every_writer_writes_ours(ours, theirs, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(theirs)
    model.save_pretrained(tmp_path / "saved")
    Trainer(model, TrainingArguments(tmp_path / "run", report_to=[], use_cpu=True)).save_model(str(tmp_path / "trained"))
    for folder in ("saved", "trained"):
        assert weights_of(tmp_path / folder).keys() == ours.state_dict().keys()
        assert "fuse_norm" not in json.loads((tmp_path / folder / "config.json").read_text())
        assert same(AutoModelForCausalLM.from_pretrained(tmp_path / folder).state_dict(), ours.state_dict())


def test_heads(ours, theirs):
    assert same(AutoModel.from_pretrained(theirs).state_dict(), ours.model.state_dict())
    _, problems = AutoModelForSequenceClassification.from_pretrained(theirs, num_labels=3, output_loading_info=True)
    assert problems["missing_keys"] == {"score.weight"}


def test_tied_weights_are_saved_once(theirs, tmp_path):
    tied = GLAForCausalLM(GLAConfig(**TINY, tie_word_embeddings=True))
    save(tied, tmp_path / "tied", "fla")
    assert "lm_head.weight" not in weights_of(tmp_path / "tied")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    assert same(again.state_dict(), tied.state_dict()) and again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("key", "x", "message"),
    [
        ("model.layers.1.attn.q_proj.weight", None, "missing key {}, wanted with the shape [16, 32]"),
        ("model.layers.1.attn.g_norm_swish_gate.weight", None, "missing key {}, wanted with the shape [16]"),
        ("lm_head.weight", None, "missing key {}"),
        ("model.layers.1.attn.h_conv1d.weight", torch.ones(1), "unexpected key {}"),
        (
            "model.layers.1.attn.g_norm.weight",
            torch.ones(16),
            "{} and 'model.layers.1.attn.g_norm_swish_gate.weight' are one tensor",
        ),
        ("model.layers.1.attn.q_proj.weight", torch.ones(3, 2), "{} must have the shape [16, 32], got [3, 2]"),
    ],
)
def test_what_does_not_fit_is_an_error(key, x, message, theirs):
    change(theirs, key, x)
    with pytest.raises(ValueError, match=re.escape(message.format(repr(key)))) as error:
        AutoModelForCausalLM.from_pretrained(theirs)
    assert "read as flash-linear-attention's" in str(error.value)


@pytest.mark.parametrize("head", [AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModel])
def test_a_layout_that_nobody_knows(head, ours, tmp_path):
    ours.save_pretrained(tmp_path)
    weights = {f"transformer.{key}": x for key, x in weights_of(tmp_path).items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"known layout, one of hf_linear's own .*; got \['transformer\..*: is it another model's"
    ):
        head.from_pretrained(tmp_path)
