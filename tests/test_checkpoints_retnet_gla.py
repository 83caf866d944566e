"""RetNet as syncdoth's port writes it and GLA as its paper's repository does: opened as they are, with the originals' logits.

tests/golden holds small random weights in each layout and what the originals made of them: tests/make_golden_retnet_gla.py.
"""

import json

import pytest
import torch
from checkpoint_files import change, far, golden, same, weights_of, write_repository, write_tokenizer
from families import TINY
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from conversion import gla_original as gla_script
from conversion import syncdoth as syncdoth_script
from hf_linear import GLAConfig, GLAForCausalLM, RetNetForCausalLM
from hf_linear.checkpoints.layout import save

# Logits of size 3 after two layers in float32: either side is up to 3e-6 from our float64.
TOLERANCE = 1e-5
LAYOUTS = {"retnet-syncdoth": "syncdoth", "retnet-syncdoth-plain": "syncdoth", "gla-original": "gla_original"}
every_file = pytest.mark.parametrize("name", LAYOUTS)


@every_file
def test_opens_as_it_is(name, tmp_path):
    config, weights, original = golden(name)
    model, problems = AutoModelForCausalLM.from_pretrained(
        write_repository(tmp_path / "theirs", config, weights), output_loading_info=True
    )
    assert type(model) is (GLAForCausalLM if name == "gla-original" else RetNetForCausalLM) and not any(problems.values())
    assert far(model(original["ids"]).logits, original["recurrent"]) < TOLERANCE
    hidden = AutoModel.from_pretrained(tmp_path / "theirs")(original["ids"]).last_hidden_state
    assert far(model.lm_head(hidden), original["recurrent"]) < TOLERANCE

    model.save_pretrained(tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert not {"d_model", "decoder_embed_dim", "load_from_llama", "use_glu"} & set(saved)
    assert {"mixers", "hidden_size"} < set(saved)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert same(again.state_dict(), model.state_dict())
    assert json.loads((tmp_path / "ours" / "config.json").read_text()) == json.loads(again.config.to_json_string())


@pytest.mark.parametrize("name", ["retnet-syncdoth", "retnet-syncdoth-plain"])
def test_generates_the_same(name, tmp_path):
    config, weights, original = golden(name)
    model = AutoModelForCausalLM.from_pretrained(write_repository(tmp_path, config, weights))
    ids, tokens = original["ids"][:, :5], original["generated"]
    assert torch.equal(model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=-1), tokens)
    # The form that trains divides a row by what its scores add up to: see test_checkpoints_torchscale.py.
    assert far(model(original["ids"]).logits, original["parallel"]) < 1e-4


@every_file
def test_round_trip(name, tmp_path):
    config, weights, original = golden(name)
    model = AutoModelForCausalLM.from_pretrained(write_repository(tmp_path / "theirs", config, weights))
    save(model, tmp_path / "back", LAYOUTS[name])
    back = weights_of(tmp_path / "back")
    computed = {"model.retnet_rel_pos.angle", "model.retnet_rel_pos.decay"}  # to the last digit on this machine or nearly so
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], x) for key, x in weights.items() if key not in computed)
    fields = json.loads((tmp_path / "back" / "config.json").read_text())
    assert fields.pop("dtype") == config["torch_dtype"]
    assert fields == {"bos_token_id": None} | {field: config[field] for field in fields if field in config}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert same(again.state_dict(), model.state_dict())
    assert torch.equal(again(original["ids"]).logits, model(original["ids"]).logits)


@pytest.mark.parametrize(
    "name, key, wanted",
    [
        ("retnet-syncdoth", "model.layers.1.retention.out_proj.weight", "[16, 28]"),
        ("retnet-syncdoth", "model.layernorm_embedding.weight", "[16]"),
        ("retnet-syncdoth", "lm_head.weight", "[31, 16]"),
        ("gla-original", "transformer.h.1.attn.k_gate.1.bias", "[8]"),
        ("gla-original", "transformer.h.1.attn.g_proj.bias", "[16]"),
        ("gla-original", "lm_head.weight", "[31, 16]"),
    ],
)
@pytest.mark.parametrize("problem", ["missing", "misshapen", "unexpected"])
def test_no_key_is_lost_or_drawn_anew(name, key, wanted, problem, tmp_path):
    config, weights, _ = golden(name)
    if problem == "missing":
        weights.pop(key)
        parts = ("missing key", repr(key), wanted)
    elif problem == "misshapen":
        weights[key] = torch.ones(2, 3)
        parts = (repr(key), f"must have the shape {wanted}, got [2, 3]")
    else:
        weights[f"{key}.A"] = torch.ones(1)
        parts = ("unexpected key", repr(f"{key}.A"))
    with pytest.raises(ValueError) as error:
        AutoModelForCausalLM.from_pretrained(write_repository(tmp_path, config, weights))
    layout = "the GLA of its paper's repository" if name == "gla-original" else "the RetNet of syncdoth"
    for part in (*parts, layout):
        assert part in str(error.value)


def test_other_decays_are_an_error(tmp_path):
    """What `use_lm_decay` computes, should a config not say so."""
    config, weights, _ = golden("retnet-syncdoth")
    weights["model.retnet_rel_pos.decay"] = torch.log(1 - torch.logspace(-5, -9, 2, base=2))
    folder = write_repository(tmp_path, config, weights)
    with pytest.raises(ValueError, match=r"'model.retnet_rel_pos.decay' must be .* as the config says"):
        AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"'model.retnet_rel_pos.decay' must be"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("retnet-syncdoth", {"use_lm_decay": True}, "use_lm_decay of syncdoth's RetNet must be False, got True"),
        ("retnet-syncdoth", {"use_glu": False}, "use_glu of syncdoth's RetNet must be True, got False"),
        ("retnet-syncdoth", {"deepnorm": True}, "deepnorm of syncdoth's RetNet must be False"),
        ("gla-original", {"use_gv": True}, "use_gv of the original GLA must be False, got True"),
        ("gla-original", {"n_head": 3}, "num_heads must divide"),
    ],
)
def test_config_that_is_not_here(name, changes, message, tmp_path):
    config, weights, _ = golden(name)
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(write_repository(tmp_path, config | changes, weights))


def test_a_gla_that_the_original_has_no_words_for(tmp_path):
    config, weights, _ = golden("gla-original")
    model = AutoModelForCausalLM.from_pretrained(write_repository(tmp_path / "theirs", config, weights))
    model.config.head_norm_eps = 1e-5
    with pytest.raises(ValueError, match=r"head_norm_eps of the original GLA must be 8.*e-05, got 1e-05"):
        save(model, tmp_path / "back", "gla_original")


@every_file
@pytest.mark.parametrize("form", ["folder", "bin", "file"])
def test_script(name, form, tmp_path, capsys):
    config, weights, original = golden(name)
    folder = write_repository(tmp_path / "theirs", config, weights)
    tokenizer = write_tokenizer(folder)
    arguments = ["--checkpoint", str(folder)]
    if form == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    elif form == "file":
        arguments = ["--checkpoint", str(folder / "model.safetensors"), "--config", str(folder / "config.json")]
        arguments += ["--tokenizer", str(folder)]
    script = gla_script if name == "gla-original" else syncdoth_script
    script.main([*arguments, "--output", str(tmp_path / "ours"), "--verify"])
    assert "verified: " in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert far(model(original["ids"]).logits, original["recurrent"]) < TOLERANCE
    assert AutoTokenizer.from_pretrained(tmp_path / "ours").get_vocab() == tokenizer.get_vocab()

    back = ["--checkpoint", str(tmp_path / "ours"), "--output", str(tmp_path / "back"), "--to", LAYOUTS[name], "--verify"]
    script.main(back)
    assert weights_of(tmp_path / "back").keys() == weights.keys()
    assert (tmp_path / "back" / "tokenizer.json").is_file()


def test_what_is_no_checkpoint_of_the_layout(tmp_path):
    config, weights, _ = golden("gla-original")
    folder = write_repository(tmp_path / "theirs", config, weights)
    arguments = ["--checkpoint", str(folder), "--output", str(tmp_path / "ours")]
    with pytest.raises(ValueError, match="config must be that of the RetNet of syncdoth"):
        syncdoth_script.main(arguments)
    save_file({"a.weight": torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"must be in a known layout.*got \['a\.weight'\]"):
        gla_script.main(arguments)
    GLAForCausalLM(GLAConfig(**TINY)).save_pretrained(tmp_path / "hidden")
    change(tmp_path / "hidden", "lm_head.weight", None)
    with pytest.raises(ValueError, match=r"weights of a model of ours, got none for \['lm_head.weight'"):
        gla_script.main(["--checkpoint", str(tmp_path / "hidden"), "--to", "gla_original", *arguments[2:]])
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="name the config by --config"):
        gla_script.main(arguments)
    with pytest.raises(FileNotFoundError, match=r"--checkpoint must be a file, a folder or a name on the Hub, got .*absent"):
        gla_script.main(["--checkpoint", str(tmp_path / "absent"), *arguments[2:]])
    assert not (tmp_path / "ours").exists()
