"""torchscale's RetNet, run beside ours: the same logits, the same tokens, and checkpoints in both directions."""

import argparse
import json
import re
import sys
import types

import pytest
import torch
from checkpoint_files import far, same, weights_of, write_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion import torchscale as script
from hf_linear import RetNetConfig, RetNetForCausalLM
from hf_linear.checkpoints.layout import save
from hf_linear.checkpoints.torchscale import Torchscale

SMALL = {
    "vocab_size": 97,
    "decoder_embed_dim": 32,
    "decoder_value_embed_dim": 48,
    "decoder_retention_heads": 4,
    "decoder_ffn_embed_dim": 40,
    "decoder_layers": 2,
}
# What torchscale's own config leaves out, and what fairseq's recipes set.
VARIANTS = {
    "plain": SMALL,
    "fairseq": SMALL | {"activation_fn": "swish", "no_scale_embedding": False, "layernorm_embedding": True},
    "tied": SMALL | {"activation_fn": "swish", "share_decoder_input_output_embed": True},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(scope="module")
def torchscale():
    """torchscale's RetNet without fairscale and timm, of which it uses three names that do nothing here."""

    def module(name, **names):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(names)
        return sys.modules[name]

    before = dict(sys.modules)
    nn = module("fairscale.nn", checkpoint_wrapper=lambda m, *a, **k: m, wrap=lambda m, *a, **k: m)
    module("fairscale", nn=nn)
    module("timm")
    module("timm.models")
    module("timm.models.layers", drop_path=lambda x, *a, **k: x)
    from torchscale.architecture import config, retnet

    yield types.SimpleNamespace(config=config, retnet=retnet)
    for name in set(sys.modules) - set(before):
        if name.startswith(("fairscale", "timm")):
            del sys.modules[name]


def decoder(torchscale, fields):
    torch.manual_seed(0)
    width = fields["decoder_embed_dim"]
    std = width**-0.5 / (2 if fields.get("share_decoder_input_output_embed") else 1)  # fairseq's, but for logits of one size
    embed_tokens = torch.nn.Embedding.from_pretrained(torch.randn(fields["vocab_size"], width) * std)
    arguments = torchscale.config.RetNetConfig(**fields)
    return torchscale.retnet.RetNetDecoder(arguments, embed_tokens=embed_tokens).eval()


@torch.no_grad()
def heat(model, names="qk"):
    """Scores far above 1, by what they add up to the parallel form divides a row."""
    for name, p in model.named_parameters():
        if any(f".{letter}_proj." in name for letter in names):
            p.mul_(8)
    return model


def recurrent_logits(original, ids):
    """torchscale's recurrent form, one token a call; it wants the whole prefix each time."""
    state = {}
    return torch.cat([original(ids[:, : t + 1], incremental_state=state)[0] for t in range(ids.shape[1])], 1)


def both(torchscale, variant):
    """The same random RetNet twice, in float64."""
    original = decoder(torchscale, VARIANTS[variant])
    return original.double(), script.convert(original.state_dict(), VARIANTS[variant]).double().eval()


# torchscale keeps its rotary angles and decays, and computes its activations, in float32: 3e-7 at logits of order 1.
TOLERANCE = 1e-6
IDS = torch.arange(140).reshape(2, 70) ** 2 % 97


@every_variant
def test_parallel_form(torchscale, variant):
    original, ours = both(torchscale, variant)
    assert far(ours(IDS).logits, original(IDS)[0]) < TOLERANCE


@every_variant
def test_recurrent_form(torchscale, variant):
    original, _ = both(torchscale, variant)
    ours = script.convert(heat(original).float().state_dict(), VARIANTS[variant]).double().eval()
    ids = IDS[:, :20]
    expected = recurrent_logits(original.double(), ids)
    assert far(ours(ids).logits, expected) < TOLERANCE
    cache, steps = None, []
    for t in range(ids.shape[1]):
        out = ours(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    assert far(torch.cat(steps, 1), expected) < TOLERANCE


# Dividing a row by what its scores add up to is undone by the norm behind it but for eps, which is seen beside values of about
# 1e-3: those of torchscale's initial weights. Once values have grown as queries and keys have, it is not.
@pytest.mark.parametrize("names, tolerance", [("qkv", 1e-4), ("qk", 5e-4)])
@every_variant
def test_parallel_form_of_high_scores(torchscale, variant, names, tolerance):
    original = heat(decoder(torchscale, VARIANTS[variant]), names)
    ours = script.convert(original.state_dict(), VARIANTS[variant]).double().eval()
    assert far(ours(IDS).logits, original.double()(IDS)[0]) < tolerance


@every_variant
def test_greedy_tokens(torchscale, variant):
    original = heat(decoder(torchscale, VARIANTS[variant]))
    ours = script.convert(original.state_dict(), VARIANTS[variant])
    ids, state = IDS[:, :3], {}
    with torch.no_grad():
        for t in range(3, 43):
            past = range(1, t) if t == 3 else ()
            for length in (*past, t):
                logits = original(ids[:, :length], incremental_state=state)[0][:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(ours.generate(IDS[:, :3], max_new_tokens=40, do_sample=False), ids)
    assert len(set(ids.flatten().tolist())) > 5  # no loop of one token


@every_variant
def test_round_trip(torchscale, variant, tmp_path):
    ours = script.convert(decoder(torchscale, VARIANTS[variant]).state_dict(), VARIANTS[variant]).eval()
    save(ours, tmp_path, "torchscale")
    theirs, fields = weights_of(tmp_path), json.loads((tmp_path / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    known = {"architectures": None, "_name_or_path": str(tmp_path)}
    assert again.config.to_dict() == ours.config.to_dict() | known
    assert same(again.state_dict(), ours.state_dict())
    original = decoder(torchscale, fields)
    missing = original.load_state_dict(theirs, strict=False)
    tied = ["output_projection.weight"] if variant == "tied" else []  # it is embed_tokens.weight, which safetensors keeps once
    assert (missing.missing_keys, missing.unexpected_keys) == (tied, [])
    assert far(ours(IDS).logits, original(IDS)[0]) < 1e-5  # float32


# --- The script ------------------------------------------------------------------------------------------------------


class Evil:
    """Runs code when it is unpickled, as anything in a pickle may."""

    def __reduce__(self):
        return print, ("this ran",)


def fairseq_file(path, torchscale, form):
    """A checkpoint as fairseq's trainer writes it, in half precision, with more in it than a model."""
    original = decoder(torchscale, SMALL).half()
    weights = {f"decoder.{key}": x for key, x in original.state_dict().items()}
    arguments = SMALL | {"lr": [6e-4], "arch": "retnet_base", "layernorm_eps": None, "tokens_per_sample": 64, "evil": Evil()}
    arguments.pop("vocab_size")
    if form == "args":
        beside = {"args": argparse.Namespace(**arguments), "cfg": None}
    elif form == "namespace":
        beside = {"args": None, "cfg": {"model": argparse.Namespace(**arguments), "task": {"data": "x"}}}
    else:
        beside = {"args": None, "cfg": {"model": {"_name": "retnet", **arguments}}}
    torch.save({"model": weights, "extra_state": {"epoch": 3}, "optimizer_history": [Evil()], **beside}, path)
    return original


@pytest.mark.parametrize("form", ["args", "namespace", "cfg"])
def test_converts_a_checkpoint_of_fairseq(torchscale, form, tmp_path, capsys):
    original = fairseq_file(tmp_path / "checkpoint_best.pt", torchscale, form).float()
    torch.load(tmp_path / "checkpoint_best.pt", weights_only=False)
    assert "this ran" in capsys.readouterr().out
    script.main(["--checkpoint", str(tmp_path / "checkpoint_best.pt"), "--output", str(tmp_path / "ours"), "--verify"])
    printed = capsys.readouterr().out
    assert "this ran" not in printed and "rotary angles are rounded to torch.float16" in printed
    (difference,) = re.findall(r"torchscale's own logits of 64 random tokens.* differ by (\S+) in float32", printed)
    assert float(difference) < 1e-3  # rotary angles are in half precision too, and torchscale takes them from the file
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert model.config.dtype == torch.float32 and model.config.max_position_embeddings == 64
    assert (model.config.bos_token_id, model.config.pad_token_id, model.config.eos_token_id) == (0, 1, 2)
    original.retnet_rel_pos = decoder(torchscale, SMALL).retnet_rel_pos
    assert far(model(IDS).logits, original(IDS)[0]) < 1e-5
    assert weights_of(tmp_path / "ours")["lm_head.weight"].dtype == torch.float16


def test_converts_a_state_dict_beside_its_arguments(torchscale, tmp_path, monkeypatch, capsys):
    original = decoder(torchscale, VARIANTS["fairseq"])
    torch.save(original.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "args.json").write_text(json.dumps(VARIANTS["fairseq"]))
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    arguments = ["--checkpoint", str(tmp_path / "weights.pt"), "--tokenizer", str(tmp_path / "tokenizer")]
    with pytest.raises(ValueError, match="--config must be given"):
        script.main([*arguments, "--output", str(tmp_path / "ours")])
    monkeypatch.setitem(sys.modules, "torchscale.architecture.retnet", None)
    arguments += ["--config", str(tmp_path / "args.json"), "--output", str(tmp_path / "ours"), "--verify"]
    script.main(arguments)
    printed = capsys.readouterr().out
    assert "not compared with torchscale's own model: import of torchscale" in printed and "tensors as read" in printed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert far(model(IDS).logits, original(IDS)[0]) < 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "ours").get_vocab() == tokenizer.get_vocab()
    with pytest.raises(FileExistsError, match="take another name"):
        script.main(arguments)


def test_converts_back(torchscale, tmp_path, capsys):
    script.convert(decoder(torchscale, SMALL).state_dict(), SMALL).save_pretrained(tmp_path / "ours")
    arguments = ["--checkpoint", str(tmp_path / "ours"), "--output", str(tmp_path / "theirs"), "--to", "torchscale"]
    script.main([*arguments, "--verify"])
    (difference,) = re.findall(r"torchscale's own logits of 256 random tokens.* differ by (\S+)", capsys.readouterr().out)
    assert float(difference) < 1e-5
    original = decoder(torchscale, json.loads((tmp_path / "theirs" / "config.json").read_text()))
    original.load_state_dict(weights_of(tmp_path / "theirs"), strict=True)


KEY = "layers.1.retention.q_proj.weight"


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({KEY: None}, ("missing key", repr(KEY), "[32, 32]")),
        ({"output_projection.weight": None}, ("missing key", "'output_projection.weight'", "[97, 32]")),
        ({KEY: torch.ones(3, 2)}, (repr(KEY), "[32, 32]", "got [3, 2]")),
        ({"layers.0.ffn.fc1.bias": torch.ones(40)}, ("unexpected key", "'layers.0.ffn.fc1.bias'")),
        ({"layers.0.retention.q_proj.A.weight": torch.ones(1)}, ("unexpected key", "'layers.0.retention.q_proj.A.weight'")),
        ({"retnet_rel_pos.decay": torch.zeros(4)}, ("'retnet_rel_pos.decay' must be", "got [4] from 0 to 0")),
        ({"retnet_rel_pos.angle": torch.zeros(6)}, ("'retnet_rel_pos.angle' must be",)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_no_key_is_lost_or_drawn_anew(torchscale, changes, parts):
    weights = {key: x for key, x in (decoder(torchscale, SMALL).state_dict() | changes).items() if x is not None}
    with pytest.raises(ValueError) as error:
        script.convert(weights, SMALL)
    for part in (*parts, "torchscale's RetNet"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "checkpoint, message",
    [
        ({"weights": {"a": 1}}, r"must hold a state dict.*\['weights'\]"),
        ([1, 2], "must hold a state dict"),
        ({"a.weight": torch.ones(1)}, r"must hold torchscale's RetNet.*\['a.weight'\]"),
        ({"model.layers.0.retention.q_proj.weight": torch.ones(1)}, "must hold torchscale's RetNet"),
    ],
)
def test_what_is_no_checkpoint(checkpoint, message, tmp_path):
    torch.save(checkpoint, tmp_path / "weights.pt")
    (tmp_path / "args.json").write_text("{}")
    with pytest.raises(ValueError, match=message):
        script.read(tmp_path / "weights.pt", tmp_path / "args.json")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"deepnorm": True, "subln": False}, "deepnorm of torchscale's RetNet must be False, got True"),
        ({"decoder_normalize_before": False, "subln": False}, "decoder_normalize_before of torchscale's RetNet must be True"),
        ({"moe_freq": 2}, "moe_freq of torchscale's RetNet must be 0, got 2"),
        ({"multiway": True}, "multiway of torchscale's RetNet must be False"),
        ({"no_output_layer": True}, "no_output_layer of torchscale's RetNet must be False"),
        ({"activation_fn": "tanh"}, "activation_fn of torchscale's RetNet must be one of"),
        ({"decoder_layer": 3}, r"must be those of its RetNetConfig, got \['decoder_layer'\]"),
    ],
)
def test_arguments_that_are_not_here(changes, message):
    with pytest.raises(ValueError, match=message):
        Torchscale().read_config(SMALL | changes)


def test_every_argument_of_torchscale_is_known(torchscale):
    """Of its config class itself, whose defaults are ours for what a file leaves out."""
    arguments = vars(torchscale.config.RetNetConfig())
    assert set(arguments) == set(Torchscale().arguments)
    fields = {"vocab_size": 97}
    assert Torchscale().read_config(arguments | fields) == Torchscale().read_config(fields) | {"tie_word_embeddings": False}


@pytest.mark.parametrize(
    "width, value_width, heads",
    [(512, 864, 2), (1024, 1728, 4), (2560, 4280, 10), (5120, 8560, 20), (720, 784, 4)],  # the last: 720 * (784 / 720) < 784
)
def test_widths_of_values(width, value_width, heads):
    fields = {"decoder_embed_dim": width, "decoder_value_embed_dim": value_width, "decoder_retention_heads": heads}
    assert RetNetConfig(**Torchscale().read_config({"vocab_size": 97, **fields})).value_dim == value_width


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rope_style": "half"}, "rope_style of torchscale's RetNet must be 'interleaved', got 'half'"),
        ({"num_kv_heads": 1}, "num_kv_heads of torchscale's RetNet must be 2, got 1"),
        ({"expand_k": 0.5}, "key_dim of torchscale's RetNet must be 16, got 8"),
        ({"embedding_multiplier": 3.0}, "embedding_multiplier of torchscale's RetNet must be 4.0, got 3.0"),
        ({"hidden_act": "tanh"}, "activation_fn of torchscale's RetNet must be one of"),
        ({"layer_types": ["full_attention"]}, "layer_types of torchscale's RetNet"),
        ({"num_experts": 2}, "mlp_layer_types of torchscale's RetNet"),
    ],
)
def test_models_that_torchscale_has_no_words_for(changes, message, tmp_path):
    shape = {"hidden_size": 16, "num_heads": 2, "num_hidden_layers": 1, "vocab_size": 8, "intermediate_size": 16}
    theirs = {
        "elementwise_affine": False,
        "retention_norm": "decay",
        "rope_style": "interleaved",
        "rope_frequencies": "linspace",
    }
    model = RetNetForCausalLM(RetNetConfig(**{**shape, **theirs, **changes}))
    with pytest.raises(ValueError, match=message):
        save(model, tmp_path / "theirs", "torchscale")
    assert not (tmp_path / "theirs").exists()
