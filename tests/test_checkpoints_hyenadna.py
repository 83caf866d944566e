"""Checkpoints of HyenaDNA and safari: opened as they are or converted, with the logits of the originals' own code.

tests/golden holds small random weights in each layout and what the originals gave for them: tests/make_golden_hyena.py.
"""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_files import GOLDEN, close, golden, same, weights_of, write_repository
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from conversion import hyenadna as hyenadna_script
from conversion import safari as safari_script
from hf_linear import HyenaConfig, HyenaForCausalLM
from hf_linear.checkpoints import hyenadna
from hf_linear.checkpoints.layout import save


def hyena(name: str) -> tuple[dict, dict[str, Tensor], Tensor, Tensor]:
    """The config, weights, ids and logits of one layout."""
    config, weights, made = golden(f"hyena-{name}")
    return config, weights, made["ids"], made["logits"]


@pytest.mark.parametrize("name", ["hf", "hf-buffer"])
def test_opens_as_it_is(name, tmp_path):
    config, weights, ids, expected = hyena(name)
    repository = write_repository(tmp_path / "theirs", config, weights)
    model, problems = AutoModelForCausalLM.from_pretrained(repository, output_loading_info=True)
    assert type(model) is HyenaForCausalLM and type(model.config) is HyenaConfig
    assert not any(problems.values())
    assert close(model(ids).logits, expected)
    assert torch.equal(HyenaForCausalLM.from_pretrained(repository)(ids).logits, model(ids).logits)
    backbone = AutoModel.from_pretrained(repository)
    assert close(model.lm_head(backbone(ids).last_hidden_state), expected)

    model.save_pretrained(tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert saved["model_type"] == "hyena" and not {"d_model", "auto_map"} & set(saved)
    assert same(weights_of(tmp_path / "ours"), model.state_dict())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert same(again.state_dict(), model.state_dict())


def test_classifier_opens_with_its_head(tmp_path):
    config, weights, ids, expected = hyena("hf-score")
    repository = write_repository(tmp_path, config, weights)
    model, problems = AutoModelForSequenceClassification.from_pretrained(repository, output_loading_info=True)
    assert not any(problems.values())
    assert model.config.id2label == {0: "promoter", 1: "enhancer", 2: "junk"}
    assert close(model(ids).logits, expected)
    for padded in (torch.nn.functional.pad(ids, sides, value=4) for sides in ((3, 0), (0, 3))):
        assert close(model(padded, attention_mask=(padded != 4).long()).logits, expected)


@pytest.mark.parametrize(
    "auto_class, missing",
    [(AutoModelForSequenceClassification, {"score.weight"}), (AutoModelForTokenClassification, {"score.weight", "score.bias"})],
)
def test_a_new_head_on_a_language_model_is_reported(auto_class, missing, tmp_path):
    config, weights, _, _ = hyena("hf")
    repository = write_repository(tmp_path, config, weights)
    _, problems = auto_class.from_pretrained(repository, output_loading_info=True)
    assert problems["missing_keys"] == missing and problems["unexpected_keys"] == {"lm_head.weight"}


def test_filters_keep_their_precision_in_a_narrow_model(tmp_path):
    config, weights, ids, expected = hyena("hf")
    model = AutoModelForCausalLM.from_pretrained(write_repository(tmp_path, config, weights), dtype=torch.bfloat16)
    assert torch.equal(model.get_submodule("model.layers.1.mixer.implicit_filter").z, weights[Z][0])
    # Logits of size 3 through two layers whose every product is rounded to 8 bits.
    assert torch.allclose(model(ids).logits.float(), expected, rtol=0, atol=0.1)


Z = "hyena.backbone.layers.1.mixer.filter_fn.pos_emb.z"
DELTAS = Z.replace("pos_emb.z", "modulation.deltas")
FREQ = "hyena.backbone.layers.1.mixer.filter_fn.implicit_filter.1.freq"


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModelForSequenceClassification])
@pytest.mark.parametrize(
    "changes, parts",
    {
        "missing": ({"hyena.backbone.layers.0.mlp.fc1.bias": None}, ("missing", "backbone.layers.0.mlp.fc1.bias", "[16]")),
        "missing_freq": ({FREQ: None}, ("missing", "layers.1.mixer.filter_fn.implicit_filter.1.freq", "[8]")),
        "unexpected": ({"hyena.backbone.layers.0.mixer.d": torch.ones(1)}, ("unexpected", "layers.0.mixer.d")),
        "deeper": ({"hyena.backbone.layers.2.norm1.bias": torch.ones(8)}, ("unexpected", "layers.2.norm1.bias")),
        "parameter": ({"hyena.backbone.ln_f.scale": torch.ones(8)}, ("unexpected", "backbone.ln_f.scale")),
        "outside": ({"decoder.weight": torch.ones(8)}, ("unexpected", "decoder.weight")),
        "misshapen": ({Z: torch.ones(1, 17, 5)}, ("[18, 5]", "got [17, 5]", Z)),
        "two_sines": ({FREQ.replace(".1.freq", ".3.freq"): torch.zeros(1, 8)}, ("one tensor", "1.freq", "3.freq")),
        "window": (
            {Z.replace("pos_emb.z", "modulation.deltas"): torch.ones(1, 1, 8)},
            ("deltas", "as the config says", "got [1, 1, 8] from 1 to 1"),
        ),
    }.values(),
)
def test_no_key_is_lost_or_drawn_anew(auto_class, changes, parts, tmp_path):
    config, weights, _, _ = hyena("hf")
    changed = {key: x for key, x in (weights | changes).items() if x is not None}
    repository = write_repository(tmp_path, config, changed)
    with pytest.raises(ValueError) as error:
        auto_class.from_pretrained(repository)
    for part in (*parts, *(["an -hf repository"] if DELTAS not in parts else [])):
        assert part in str(error.value)


def test_shards_in_a_narrow_dtype(tmp_path):
    """By Transformers' loader: nothing is read twice, and the filters stay as they are."""
    config, weights, _, _ = hyena("hf")
    model = AutoModelForCausalLM.from_pretrained(write_repository(tmp_path / "theirs", config, weights))
    save(model, tmp_path / "shards", "hyenadna", max_shard_size="2KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path / "shards", dtype=torch.bfloat16, device_map="cpu")
    assert same(narrow.state_dict(), model.to(torch.bfloat16).state_dict())


@pytest.mark.parametrize("name", ["hf", "hf-buffer", "lightning", "infix"])
def test_written_back(name, tmp_path):
    """As an -hf repository, whatever it was read from: the keys and bits of one, and a config that says the same."""
    config, weights, ids, expected = hyena(name)
    if name.startswith("hf"):
        model = AutoModelForCausalLM.from_pretrained(write_repository(tmp_path / "theirs", config, weights))
    else:
        model = hyenadna_script.convert(weights, config, filter_shift=0.05, **hyenadna.DNA_TOKENS)
    save(model, tmp_path / "back", "hyenadna")
    back = weights_of(tmp_path / "back")
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert back.keys() == hyena("hf")[1].keys() - tied
    # The window is computed, to the last digit on this machine or nearly so.
    written = {key: x for key, x in weights.items() if key in back and not key.endswith((".t", ".deltas"))}
    assert same(written, {key: back[key] for key in written})
    fields = json.loads((tmp_path / "back" / "config.json").read_text())
    if name.startswith("hf"):
        assert (fields.pop("vocab_size"), fields.pop("pad_vocab_size_multiple"), fields.pop("dtype")) == (16, 1, "float32")
        assert {field: config[field] for field in fields if field in config}.items() <= fields.items()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert same(again.state_dict(), model.state_dict()) and close(again(ids).logits, expected)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"filter_shift": 0.0}, "filter_shift of HyenaDNA must be 0.05, got 0.0"),
        ({"hyena_order": 3}, "hyena_order of HyenaDNA must be 2, got 3"),
        ({"train_filter_positions": True}, "train_filter_positions of HyenaDNA must be False, got True"),
        ({"num_experts": 2}, "mlp_layer_types of HyenaDNA must be"),
    ],
)
def test_what_hyenadna_cannot_say(fields, message, tmp_path):
    config = HyenaConfig(**hyenadna.repository_fields(hyena("hf")[0]) | fields)
    with pytest.raises(ValueError, match=message):
        save(HyenaForCausalLM(config), tmp_path / "back", "hyenadna")
    assert not (tmp_path / "back").exists()


def test_missing_head_of_a_language_model(tmp_path):
    config, weights, _, _ = hyena("hf")
    weights.pop("lm_head.weight")
    with pytest.raises(ValueError, match=r"missing key 'lm_head.weight'.*\[16, 8\]"):
        AutoModelForCausalLM.from_pretrained(write_repository(tmp_path, config, weights))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hyena_order": 3}, "hyena_order of HyenaDNA must be 2, got 3"),
        ({"d_model": None}, "must have d_model"),
        ({"num_head": 2}, "did you mean 'num_heads'"),
    ],
)
def test_config_that_is_not_here(changes, message, tmp_path):
    config, weights, _, _ = hyena("hf")
    config = {key: value for key, value in (config | changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(write_repository(tmp_path, config, weights))


def test_a_layout_is_no_family():
    with pytest.raises(ValueError, match="take HyenaConfig"):
        AutoConfig.for_model("hyenadna")


def test_tokens_are_the_originals(tmp_path):
    hyenadna.dna_tokenizer(18).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    expected = json.loads((GOLDEN / "dna_tokens.json").read_text())
    assert {text: tokenizer(text)["input_ids"] for text in expected} == expected
    assert tokenizer.is_fast and tokenizer.padding_side == "left" and tokenizer.model_max_length == 18
    assert tokenizer(["ACG", "A"], padding=True)["input_ids"] == [[7, 8, 9, 1], [4, 4, 7, 1]]
    assert tokenizer.decode(tokenizer("ACGTN")["input_ids"], skip_special_tokens=True) == "ACGTN"
    config = HyenaConfig(**hyenadna.repository_fields(hyena("hf")[0]))
    for name in ("pad", "bos", "eos"):
        assert getattr(tokenizer, f"{name}_token_id") == getattr(config, f"{name}_token_id")


# --- conversion/ -----------------------------------------------------------------------------------------------------


def write_original(folder: Path, config: dict, checkpoint: object) -> list[str]:
    """The files of an original, and the arguments that name them."""
    torch.save(checkpoint, folder / "weights.ckpt")
    (folder / "config.json").write_text(json.dumps(config))
    return ["--checkpoint", str(folder / "weights.ckpt"), "--config", str(folder / "config.json")]


@pytest.mark.parametrize("name", ["lightning", "infix"])
def test_converts_hyenadna(name, tmp_path, capsys):
    config, weights, ids, expected = hyena(name)
    arguments = write_original(tmp_path, config, {"epoch": 3, "state_dict": weights})
    hyenadna_script.main([*arguments, "--output", str(tmp_path / "ours"), "--verify"])
    assert "verified: 52 tensors as read" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert close(model(ids).logits, expected)
    assert model.config.tie_word_embeddings and model.config.filter_shift == 0.05 and not model.config.train_filter_positions
    tokens = AutoTokenizer.from_pretrained(tmp_path / "ours")("ACGT", return_tensors="pt")
    assert tokens["input_ids"].tolist() == [[7, 8, 9, 10, 1]]
    assert model.generation_config.eos_token_id == 1


def test_script_there_and_back(tmp_path, capsys):
    config, weights, ids, expected = hyena("hf")
    write_repository(tmp_path / "theirs", config, weights)
    for origin, target, to in (("theirs", "ours", "ours"), ("ours", "back", "hyenadna")):
        arguments = ["--checkpoint", str(tmp_path / origin), "--output", str(tmp_path / target), "--verify", "--to", to]
        hyenadna_script.main(arguments)
        assert "verified: 52 tensors as read" in capsys.readouterr().out
        assert AutoTokenizer.from_pretrained(tmp_path / target)("ACGT")["input_ids"] == [7, 8, 9, 10, 1]
        assert AutoModelForCausalLM.from_pretrained(tmp_path / target).generation_config.eos_token_id == 1
    assert weights_of(tmp_path / "back").keys() == weights.keys()
    assert close(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")(ids).logits, expected)


@pytest.mark.parametrize("name", ["safari", "safari-modulate"])
def test_converts_safari(name, tmp_path):
    config, weights, ids, expected = hyena(name)
    arguments = write_original(tmp_path, config, weights)
    safari_script.main([*arguments, "--output", str(tmp_path / "ours"), "--tokenizer", "none", "--verify"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert close(model(ids).logits, expected)
    assert model.config.filter_modulate == (name == "safari-modulate") and model.config.filter_shift == 0.0
    assert model.config.train_filter_positions and model.config.vocab_size == 16


def test_the_pile_model_is_the_default_config():
    fields = hyenadna.original_fields(safari_script.PILE, filter_shift=0.0)
    default = HyenaConfig().to_dict()
    differing = {name for name, value in fields.items() if default[name] != value}
    assert differing == {"filter_modulate"} and fields["vocab_size"] == 50264


def test_a_head_of_its_own_stays_apart(tmp_path):
    config, weights, ids, expected = hyena("lightning")
    weights["model.lm_head.weight"] = 2 * weights["model.lm_head.weight"]
    model = hyenadna_script.convert(weights, config, filter_shift=0.05)
    assert not model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    # Twice the logits have twice the difference.
    assert close(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits / 2, expected)


class Hyperparameters(dict):
    """Runs code when it is unpickled, as anything in a pickle may."""

    def __reduce__(self):
        return print, ("this ran",)


class Settings:
    def __init__(self):
        self.lr = 6e-4


def test_a_checkpoint_runs_no_code(tmp_path, capsys):
    config, weights, _, _ = hyena("lightning")
    beside = {"hyper_parameters": Hyperparameters(), "settings": Settings(), "state_dict": weights}
    arguments = write_original(tmp_path, config, beside)
    torch.load(tmp_path / "weights.ckpt", weights_only=False)
    assert "this ran" in capsys.readouterr().out
    hyenadna_script.main([*arguments, "--output", str(tmp_path / "ours")])
    assert "this ran" not in capsys.readouterr().out
    assert (tmp_path / "ours" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "checkpoint, message",
    [
        ({"hyper_parameters": {1, 2}, "state_dict": {}}, "must hold a state dict"),
        ({"weights": {"a": 1}}, r"must hold a state dict.*\['weights'\]"),
        ([1, 2], "must hold a state dict.*got list"),
        ({"state_dict": {"model.linear.weight": torch.ones(1)}}, r"must be in a known layout.*got \['model\.linear\.weight'\]"),
    ],
)
def test_what_is_no_checkpoint(checkpoint, message, tmp_path):
    arguments = write_original(tmp_path, hyena("lightning")[0], checkpoint)
    with pytest.raises(ValueError, match=message):
        hyenadna_script.main([*arguments, "--output", str(tmp_path / "ours")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "weights.ckpt"]


def test_a_file_that_needs_more_names_the_remedy(tmp_path):
    arguments = write_original(tmp_path, hyena("lightning")[0], {})
    (tmp_path / "weights.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"torch\.save its state_dict alone"):
        hyenadna_script.main([*arguments, "--output", str(tmp_path / "ours")])


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    config, weights, _, _ = hyena("lightning")
    arguments = [*write_original(tmp_path, config, {"state_dict": weights}), "--output", str(tmp_path / "ours"), "--verify"]
    monkeypatch.setattr("conversion.output.proof", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        hyenadna_script.main(arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "weights.ckpt"]
    monkeypatch.undo()
    hyenadna_script.main(arguments)
    with pytest.raises(FileExistsError, match="take another name"):
        hyenadna_script.main(arguments)


@pytest.mark.parametrize(
    "layer, message",
    [
        ({"num_heads": 4}, "num_heads of HyenaDNA or safari must be 1, got 4"),
        ({"bidirectional": True}, "bidirectional of HyenaDNA or safari must be False, got True"),
        ({"order": 3}, "order of HyenaDNA or safari must be 2, got 3"),
        ({"modulat": False}, r"known fields, got \['modulat'\]"),
    ],
)
def test_variant_of_an_original_that_is_not_here(layer, message):
    config, weights, _, _ = hyena("safari")
    with pytest.raises(ValueError, match=message):
        hyenadna_script.convert(weights, config | {"layer": config["layer"] | layer})
