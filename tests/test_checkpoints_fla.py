"""Checkpoints of flash-linear-attention (fla): opened as they are, with its own logits and tokens, and written back.

tests/golden holds small random weights as fla 0.6.0 saved them, and what it gave for them: tests/make_golden_fla.py.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from checkpoint_files import GOLDEN, golden, same, weights_of, write_repository
from families import TINY, ids, logits, tiny_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_linear
from conversion import fla as fla_script
from hf_linear import GLAConfig, GLAForCausalLM, LinearHybridConfig, RetNetConfig
from hf_linear.checkpoints import fla
from hf_linear.checkpoints.layout import save

# Logits of size 1 to 2 in float32: either side is up to 1e-5 from what our model gives in float64.
TOLERANCE = 3e-5
every_case = pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("fla-*")))


@every_case
def test_opens_as_it_is(name, tmp_path):
    config, weights, expected = golden(name)
    folder = write_repository(tmp_path / "theirs", config, weights)
    model, problems = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__module__.startswith("hf_linear.") and not any(problems.values())
    ids = expected["ids"]
    torch.testing.assert_close(model(ids).logits, expected["logits"], rtol=0, atol=TOLERANCE)
    tokens = model.generate(ids, max_new_tokens=expected["tokens"].shape[1], do_sample=False, pad_token_id=0)
    assert torch.equal(tokens[:, ids.shape[1] :], expected["tokens"])
    hidden = AutoModel.from_pretrained(folder)(ids).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), expected["logits"], rtol=0, atol=TOLERANCE)
    assert AutoModelForSequenceClassification.from_pretrained(folder, pad_token_id=0)(ids).logits.shape == (2, 2)


@every_case
def test_goes_back_bit_by_bit(name, tmp_path):
    """Theirs to ours to theirs, and again to ours: the same keys and bits, and a config that says the same."""
    config, weights, _ = golden(name)
    model = AutoModelForCausalLM.from_pretrained(write_repository(tmp_path / "theirs", config, weights))
    save(model, tmp_path / "back", "fla")
    back = weights_of(tmp_path / "back")
    # `fuse_norm` names a parameter: what we write names it as fla does by default.
    gate = config["use_output_gate"]
    assert same(back, {key.replace(".g_norm.", ".g_norm_swish_gate.") if gate else key: x for key, x in weights.items()})
    found = json.loads((tmp_path / "back" / "config.json").read_text())
    named = [*fla.DEFAULTS[config["model_type"]], "model_type", "architectures", "dtype"]
    assert {name for name in named if found[name] != config.get(name)} <= {"num_kv_heads"}  # a number for None
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert same(again.state_dict(), model.state_dict())
    a, b = (m.config.to_dict() | {"architectures": None, "_name_or_path": None} for m in (again, model))
    assert a == b


@pytest.mark.parametrize(
    "name, plain",
    [
        ("gla-conv-kv-phi", {"output_gate_bias": False}),
        ("gla-no-gate", {"head_norm": "rms"}),
        ("retnet-kv", {}),
        ("hybrid-rope", {}),
    ],
)
def test_ours_there_and_back(name, plain, tmp_path):
    """Models that fla never wrote, without what it has no word for; of those whose attention has the heads of the rest, too."""
    model = tiny_model(name, **plain)
    save(model, tmp_path / "theirs", "fla")
    assert "attn_norm" in str(list(weights_of(tmp_path / "theirs")))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=model.dtype).eval()
    assert same(again.state_dict(), model.state_dict())
    assert torch.equal(logits(again, ids(2, 20)), logits(model, ids(2, 20)))


@pytest.mark.parametrize("form", ["embeddings", "embed_tokens"])
def test_checkpoints_of_2024(form, tmp_path):
    """The MLP in one gate_proj, and in the first months an embedding and a norm's eps of other names."""
    config, weights, expected = golden("fla-gla")
    for i in range(config["num_hidden_layers"]):
        gate = f"model.layers.{i}.mlp.gate_proj.weight"
        weights[gate] = torch.cat([weights[gate], weights.pop(gate.replace("gate", "up"))])
    if form == "embed_tokens":
        weights["model.embed_tokens.weight"] = weights.pop("model.embeddings.weight")
        config["rms_norm_eps"] = config.pop("norm_eps")
    model = AutoModelForCausalLM.from_pretrained(write_repository(tmp_path / "theirs", config, weights))
    torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"], rtol=0, atol=TOLERANCE)
    model.save_pretrained(tmp_path / "ours")  # the halves of a tensor, each its own
    assert same(weights_of(tmp_path / "ours"), model.state_dict())
    save(model, tmp_path / "back", "fla_2024")
    if form == "embeddings":
        assert same(weights_of(tmp_path / "back"), weights)
    broken = {key: x for key, x in weights.items() if "gate_proj" not in key or "layers.1" not in key}
    with pytest.raises(ValueError, match=r"missing key 'model\.layers\.1\.mlp\.gate_proj\.weight'.*of 2024"):
        AutoModelForCausalLM.from_pretrained(write_repository(tmp_path / "broken", config, broken))


@pytest.mark.parametrize("family", ["gla", "retnet"])
def test_absent_fields_take_the_defaults_of_fla(family, tmp_path):
    config = AutoConfig.for_model(family)
    read = type(config).from_dict({"model_type": family, "fuse_norm": True})
    theirs = {"hidden_act": "silu", "feature_map": "identity", "num_kv_heads": config.num_heads}
    for name, default in fla.DEFAULTS[family].items():
        if name not in ("attn", "intermediate_size"):
            assert getattr(read, name) == theirs.get(name, default), name
    assert read.intermediate_size == {"gla": 5632, "retnet": 2816}[family]


def read(family: str, **fields) -> hf_linear.GLAConfig:
    shape = {name: value for name, value in TINY.items() if name != "num_heads"}
    return {"gla": GLAConfig, "retnet": RetNetConfig}[family].from_dict(
        {"model_type": family, "fuse_norm": True, "num_heads": 2, **shape, **fields}
    )


def test_fields_of_speed_are_left_out():
    """RetNet's short convolution among them: fla's config names it, fla's model has none."""
    names = {"attn_mode": "fused_recurrent", "fuse_norm": False, "fuse_swiglu": False, "use_l2warp": True}
    config = read("retnet", **names, use_short_conv=True, conv_size=4, auto_map={"AutoConfig": "x.y"})
    assert not {*names, "use_short_conv", "auto_map"} & set(config.to_dict())
    assert read("gla", use_short_conv=True, clamp_min=-1).clamp_min == -1.0
    assert read("gla", hidden_ratio=None, id2label={0: "a", 1: "b"}).id2label == {0: "a", 1: "b"}


ENTRY = {"layers": [1], "num_heads": 4}


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("gla", {"hidden_act": "powlu"}, r"hidden_act of fla's gla must be one of \['swish', 'silu'\], got 'powlu'"),
        ("gla", {"use_gk": False}, r"use_gk of fla's gla must be True, got False"),
        ("gla", {"use_gv": True}, r"use_gv of fla's gla must be False, got True"),
        ("retnet", {"attnres_block_size": 4}, r"attnres_block_size of fla's retnet must be None, got 4"),
        ("retnet", {"feature_map": "sqrelu"}, r"feature_map of fla's retnet must be one of .*'relu2'.*, got 'sqrelu'"),
        ("gla", {"attn": {**ENTRY, "qk_norm": True}}, r"attn of fla's gla must have layers below 2, .*'qk_norm': True"),
        ("gla", {"attn": {"layers": [1]}}, r"attn of fla's gla must have layers below 2, num_heads and"),
        ("gla", {"attn": {**ENTRY, "rope_theta": None}}, r"attn of fla's gla must have layers below 2, .*'rope_theta': None"),
        ("gla", {"attn": {**ENTRY, "layers": [2]}}, r"attn of fla's gla must have layers below 2, .*\[2\]"),
        (
            "gla",
            {"attn": [ENTRY, {"layers": [0], "num_heads": 2}]},
            "attn of fla's gla must have the same heads, qkv_bias and rope_theta in every entry",
        ),
    ],
)
def test_what_means_another_model_is_an_error(family, fields, message):
    with pytest.raises(ValueError, match=message):
        read(family, **fields)


def test_hybrids():
    config = read("retnet", attn={**ENTRY, "num_kv_heads": None, "qk_norm": False}, use_output_gate=False)
    assert type(config) is LinearHybridConfig and config.mixers == ["retention", "attention"]
    assert (config.num_heads, config.num_kv_heads, config.attention_bias) == (4, 4, False)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    retention = config.for_mixer("retention")
    assert (retention.num_heads, retention.expand_v, retention.use_output_gate) == (2, 2.0, False)
    assert type(read("gla", attn={"layers": [], "num_heads": 2})) is GLAConfig
    assert read("gla", attn={"layers": [0, 1], "num_heads": 2}).mixers == ["attention"] * 2


def test_a_hybrid_opens_by_the_name_of_its_family(tmp_path):
    config, weights, expected = golden("fla-gla-hybrid")
    model = GLAForCausalLM.from_pretrained(write_repository(tmp_path / "theirs", config, weights))
    torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"], rtol=0, atol=TOLERANCE)


def test_fla_has_no_classifiers(tmp_path):
    with pytest.raises(ValueError, match="a model for fla must be a language model, got GLAForSequenceClassification"):
        save(hf_linear.GLAForSequenceClassification(GLAConfig(**TINY)), tmp_path / "theirs", "fla")


GA = {"pattern": "GA", "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        (
            "RetNet",
            {"rope_style": "interleaved"},
            "rope_style of fla's retnet must be 'half', got 'interleaved': it has no word",
        ),
        ("RetNet", {"rope_frequencies": "linspace"}, "rope_frequencies of fla's retnet must be"),
        ("RetNet", {"retention_norm": "decay"}, "retention_norm of fla's retnet must be"),
        ("GLA", {"gate_low_rank_dim": 8}, r"gate_low_rank_dim of fla's gla must be 16, got 8"),
        ("GLA", {"gate_logit_normalizer": 8}, "gate_logit_normalizer of fla's gla must be"),
        ("GLA", {"feature_map": "elu"}, "feature_map of fla's gla must be one of .*'relu2'.*, got 'elu'"),
        ("GLA", {"hidden_act": "gelu"}, "hidden_act of fla's gla must be"),
        ("GLA", {"num_experts": 4}, "num_experts of fla's gla must be"),
        ("LinearHybrid", {"pattern": "GA"}, "rope_parameters of fla's gla must be .*, got None"),
        ("LinearHybrid", {**GA, "head_dim": 8}, r"head_dim of fla's gla must be 16, got 8"),
        ("LinearHybrid", {"pattern": "GR"}, "mixers of a model for fla must be attention and one of"),
        ("LinearHybrid", {"pattern": "L"}, "mixers of a model for fla must be attention and one of"),
    ],
)
def test_what_fla_cannot_say_is_an_error(family, fields, message, tmp_path):
    model = getattr(hf_linear, f"{family}ForCausalLM")(getattr(hf_linear, f"{family}Config")(**{**TINY, **fields}))
    with pytest.raises(ValueError, match=message):
        save(model, tmp_path / "theirs", "fla")
    assert not (tmp_path / "theirs").exists()


# --- The script ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hybrid(tmp_path) -> Path:
    config, weights, _ = golden("fla-retnet-hybrid")
    folder = write_repository(tmp_path / "theirs", config, weights)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text(f'"{name}"')
    return folder


def test_script_there_and_back(hybrid, tmp_path, capsys):
    for source, target, options in (("theirs", "ours", []), ("ours", "back", ["--to", "fla"])):
        fla_script.main(["--checkpoint", str(tmp_path / source), "--output", str(tmp_path / target), "--verify", *options])
        printed = capsys.readouterr().out
        assert "verified: 38 tensors as read" in printed and f"wrote {tmp_path / target}" in printed
        assert "not compared with fla's own model" in printed or "fla's own logits" in printed
        assert (tmp_path / target / "tokenizer.json").read_text() == '"tokenizer.json"'
    assert AutoConfig.from_pretrained(tmp_path / "ours").model_type == "linear_hybrid"
    assert same(weights_of(tmp_path / "back"), weights_of(hybrid))
    with pytest.raises(FileExistsError, match="--output must not exist yet"):
        fla_script.main(["--checkpoint", str(hybrid), "--output", str(tmp_path / "ours")])


@pytest.mark.parametrize("step", ["transformers.modeling_utils.safe_save_file", "conversion.output.proof"])
def test_script_that_is_interrupted_leaves_nothing(step, hybrid, tmp_path, monkeypatch):
    def interrupt(*_, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        fla_script.main(["--checkpoint", str(hybrid), "--output", str(tmp_path / "ours"), "--verify"])
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def memory(name: str) -> int:
    """A figure of this process that Linux keeps, in bytes."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


@pytest.mark.parametrize(
    "layout, bound",
    # A shard is a fifth. Written fused, all halves of the MLPs, two fifths, are copied at once.
    [("fla", 0.4), ("fla_2024", 0.8)],
)
def test_script_holds_no_whole_model(layout, bound, tmp_path, monkeypatch):
    monkeypatch.setattr("conversion.output.SHARD_SIZE", "30MB")
    shape = {"vocab_size": 20000, "hidden_size": 512, "num_hidden_layers": 4, "intermediate_size": 8192}
    model = GLAForCausalLM(GLAConfig(**shape)).bfloat16()
    save(model, tmp_path / "theirs", layout)
    del model
    size = (tmp_path / "theirs" / "model.safetensors").stat().st_size
    for source, target, to in (("theirs", "ours", "ours"), ("ours", "back", layout)):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = memory("VmRSS")
        fla_script.main(["--checkpoint", str(tmp_path / source), "--output", str(tmp_path / target), "--to", to])
        assert memory("VmHWM") - before < bound * size
    shards = list((tmp_path / "back").glob("model-*.safetensors"))
    assert len(shards) > 4
    assert same({key: x for shard in shards for key, x in load_file(shard).items()}, weights_of(tmp_path / "theirs"))


@pytest.mark.parametrize("form", ["bin", "file"])
def test_script_reads_other_files(form, hybrid, tmp_path):
    expected = AutoModelForCausalLM.from_pretrained(hybrid).state_dict()
    checkpoint = hybrid / "model.safetensors"
    if form == "bin":
        torch.save(weights_of(hybrid), hybrid / "pytorch_model.bin")
        checkpoint.unlink()
        checkpoint = hybrid
    (hybrid / "generation_config.json").write_text('{"max_new_tokens": 7}')
    fla_script.main(["--checkpoint", str(checkpoint), "--output", str(tmp_path / "ours")])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert same(model.state_dict(), expected) and model.generation_config.max_new_tokens == 7


def test_script_wants_weights(hybrid, tmp_path):
    (hybrid / "model.safetensors").rename(hybrid / "weights.safetensors")
    with pytest.raises(FileNotFoundError, match=r"--checkpoint must hold model\.safetensors, .* name the file of weights"):
        fla_script.main(["--checkpoint", str(hybrid), "--output", str(tmp_path / "ours")])
    assert not (tmp_path / "ours").exists()
