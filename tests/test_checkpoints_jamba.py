"""Jamba's checkpoints: small random ones that Transformers' own class makes, opened as hybrids and written back."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_files import change, close, same, weights_of
from families import ids, logits, tiny_config
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, JambaConfig, JambaForCausalLM, PreTrainedTokenizerFast

from conversion import jamba as script
from hf_linear import LinearHybridConfig, LinearHybridForCausalLM, LinearHybridForSequenceClassification, LinearHybridModel
from hf_linear.checkpoints.hyenadna import dna_tokenizer
from hf_linear.checkpoints.jamba import Jamba
from hf_linear.checkpoints.layout import save

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "mamba_d_state": 8,
    "max_position_embeddings": 256,
    "eos_token_id": 63,
    "initializer_range": 0.1,  # weights that matter: with 0.02 the layers add next to nothing
}
THEIRS = {
    "v0.1": {},
    "tiny": {"attn_layer_period": 4, "attn_layer_offset": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
    "dense": {
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "num_key_value_heads": 1,
        "attn_layer_period": 4,
        "attn_layer_offset": 3,
    },
    "variant": {
        "expert_layer_period": 3,
        "expert_layer_offset": 2,
        "mamba_dt_rank": 5,
        "mamba_conv_bias": False,
        "mamba_proj_bias": True,
        "tie_word_embeddings": True,
    },
}
every_config = pytest.mark.parametrize("name", THEIRS)


def jamba(name: str) -> JambaForCausalLM:
    torch.manual_seed(0)
    model = JambaForCausalLM(JambaConfig(**{**TINY, **THEIRS[name]})).eval()
    for key, p in model.named_parameters():
        if p.dim() == 1:  # norms, biases and D, which are ones and zeros at first
            nn.init.normal_(p, mean=1.0 if "norm" in key or key.endswith(".D") else 0.0, std=0.2)
    return model


def write(model: JambaForCausalLM, folder: Path, merged: bool = False, **fields) -> Path:
    """A checkpoint with a key for every expert, as on disk, or with all experts in one, as in Transformers' memory."""
    model.save_pretrained(folder)
    if merged:
        tied = model.config.tie_word_embeddings
        weights = {key: x for key, x in model.state_dict().items() if not (tied and key == "lm_head.weight")}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


@pytest.mark.parametrize("merged", [False, True], ids=["expert_by_expert", "merged"])
@every_config
def test_opens_as_it_is(name, merged, tmp_path, caplog):
    theirs, x = jamba(name), ids(2, 40)
    ours, problems = LinearHybridForCausalLM.from_pretrained(write(theirs, tmp_path, merged), output_loading_info=True)
    assert not any(problems.values()) and "type `jamba`" not in caplog.text
    assert ours.config.mixers == [kind.replace("mamba_", "") for kind in theirs.config.layers_block_type]
    assert ours.config.mlp_layer_types == ["sparse" if n > 1 else "dense" for n in theirs.config.layers_num_experts]
    expected = logits(theirs, x)
    assert expected.abs().max() > 0.5 and close(logits(ours, x), expected)
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(ours.generate(x[:, :9], **greedy), theirs.generate(x[:, :9], **greedy))
    # What theirs gets wrong: a prompt in two calls.
    with torch.no_grad():
        first = ours(x[:, :23])
        rest = ours(x[:, 23:], past_key_values=first.past_key_values)
    assert close(torch.cat([first.logits, rest.logits], 1), expected)


@every_config
def test_and_back_again(name, tmp_path):
    """Bit for bit: theirs, ours, theirs; and what is written opens in Transformers with the same logits."""
    theirs, x = jamba(name), ids(2, 40)
    ours = LinearHybridForCausalLM.from_pretrained(write(theirs, tmp_path / "theirs"))
    save(ours, tmp_path / "back", "jamba")
    files = [weights_of(tmp_path / folder) for folder in ("theirs", "back")]
    assert same(*files)
    back, problems = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert type(back) is JambaForCausalLM and not any(problems.values()) and same(back.state_dict(), theirs.state_dict())
    assert back.config.layers_block_type == theirs.config.layers_block_type
    assert back.config.layers_num_experts == theirs.config.layers_num_experts
    assert close(logits(back, x), logits(ours, x))
    again = LinearHybridForCausalLM.from_pretrained(tmp_path / "back")
    assert same(again.state_dict(), ours.state_dict())
    configs = [LinearHybridConfig.from_pretrained(tmp_path / folder).to_dict() for folder in ("theirs", "back")]
    assert configs[0] == configs[1]
    ours.save_pretrained(tmp_path / "ours")
    assert weights_of(tmp_path / "ours").keys() <= ours.state_dict().keys()
    assert same(LinearHybridForCausalLM.from_pretrained(tmp_path / "ours").state_dict(), ours.state_dict())


def test_experts_of_a_layer_in_several_files(tmp_path):
    theirs, x = jamba("v0.1"), ids(2, 40)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 10
    assert close(logits(LinearHybridForCausalLM.from_pretrained(tmp_path), x), logits(theirs, x))


def test_a_model_of_ours_becomes_theirs(tmp_path):
    """The preset, never a Jamba before."""
    config = tiny_config("jamba", moe_intermediate_size=48, initializer_range=0.1)
    ours, x = LinearHybridForCausalLM(config).eval(), ids(2, 40)
    save(ours, tmp_path, "jamba")
    assert close(logits(JambaForCausalLM.from_pretrained(tmp_path), x), logits(ours, x))


def test_other_heads(tmp_path):
    folder = write(jamba("v0.1"), tmp_path, id2label={"0": "a", "1": "b", "2": "c"})
    assert LinearHybridModel.from_pretrained(folder).config.hidden_size == 32
    model, problems = LinearHybridForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert problems["missing_keys"] == {"score.weight"} and model.config.id2label == {0: "a", 1: "b", 2: "c"}


# --- Configs ---------------------------------------------------------------------------------------------------------

V01 = {  # Jamba-v0.1's config.json, which 1.5 Mini and Jamba2 Mini share but for the end of a text
    "architectures": ["JambaForCausalLM"],
    "attention_dropout": 0.0,
    "attn_layer_offset": 4,
    "attn_layer_period": 8,
    "auto_map": {"AutoConfig": "configuration_jamba.JambaConfig"},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "expert_layer_offset": 1,
    "expert_layer_period": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_state": 16,
    "mamba_dt_rank": 256,
    "mamba_expand": 2,
    "mamba_proj_bias": False,
    "max_position_embeddings": 262144,
    "model_type": "jamba",
    "num_attention_heads": 32,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_logits_to_keep": 1,
    "output_router_logits": False,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_mamba_kernels": True,
    "vocab_size": 65536,
}


def test_the_preset_is_v01():
    read, preset = LinearHybridConfig.from_dict(V01), LinearHybridConfig.from_preset("jamba")
    assert read.for_mixer("mamba") == preset.for_mixer("mamba") and read.dtype == torch.bfloat16
    spelt = ("pattern", "mlp_pattern", "mixer_options", "dtype")
    fields, expected = ({k: v for k, v in c.to_dict().items() if k not in spelt} for c in (read, preset))
    assert fields == expected


def test_older_fields():
    """What changes speed or memory alone is passed over; norms that an older model lacks are left out."""
    older = {"n_ctx": 4096, "calc_logits_for_entire_prompt": False, "mamba_inner_layernorms": False, "num_experts": 1}
    config = LinearHybridConfig.from_dict(V01 | older | {"mamba_dt_rank": "auto"})
    mamba = config.for_mixer("mamba")
    assert (mamba.inner_layernorms, mamba.time_step_rank) == (False, 256)
    assert set(config.mlp_layer_types) == {"dense"} and config.num_experts == 0


def test_what_a_short_config_leaves_out_is_theirs():
    config = LinearHybridConfig.from_dict({"model_type": "jamba", "num_hidden_layers": 8})
    assert (config.hidden_size, config.num_experts, config.num_kv_heads, config.norm_topk_prob) == (4096, 16, 8, False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sliding_window": 2048}, "sliding_window of a jamba must be None, got 2048"),
        ({"hidden_act": "gelu"}, "hidden_act of a jamba must be 'silu', got 'gelu'"),
        ({"mamba_n_groups": 2}, r"mamba_\* of a jamba must be of .*got \['mamba_n_groups'\]"),
        ({"model_type": "zamba2"}, "model_type must be 'linear_hybrid' .*got 'zamba2', and its shared block .*opens it"),
        ({"model_type": "llama"}, "model_type must be 'linear_hybrid' .*got 'llama', and nothing here .*opens it"),
    ],
)
def test_config_that_is_not_here(fields, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(V01 | fields))
    for read in (LinearHybridConfig.from_pretrained, LinearHybridForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=message):
            read(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_topk_prob": True}, "norm_topk_prob of a jamba must be False, got True"),
        ({"num_shared_experts": 1}, "num_shared_experts of a jamba must be 0"),
        ({"moe_intermediate_size": 24}, "moe_intermediate_size of a jamba must be 48, got 24"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_parameters of a jamba must be None"),
        ({"use_qk_norm": True}, "use_qk_norm of a jamba must be False"),
        ({"mixer_options": None}, "inner_layernorms of mamba of a jamba must be True"),
        (
            {"mixer_options": {"mamba": {"inner_layernorms": True, "norm_eps": 1e-5}}},
            "norm_eps of mamba of a jamba must be 1e-06",
        ),
        ({"head_dim": 8}, "head_dim of a jamba must be 16"),
        ({"pattern": "MMMMAAMM"}, "mixers of a jamba must be .*got"),
        ({"pattern": "GGGGAGGG"}, "mixers of a jamba must be .*got"),
        ({"mlp_pattern": "DDSS"}, "mlp_layer_types of a jamba must be .*got"),
    ],
)
def test_what_a_jamba_cannot_say(options, message):
    config = tiny_config("jamba", **{"moe_intermediate_size": 48, **options})
    with pytest.raises(ValueError, match=f"{message}.*: it has no word for this, save the model as ours"):
        Jamba().write_config(config)


# --- Weights ---------------------------------------------------------------------------------------------------------

EXPERT = "model.layers.1.feed_forward.experts.2.up_proj.weight"


@pytest.mark.parametrize(
    ("key", "x", "message"),
    [
        (EXPERT, None, "feed_forward.experts"),
        (EXPERT, torch.ones(3, 2), "feed_forward.experts"),
        ("model.layers.0.mamba.dt_layernorm.weight", None, "missing key 'model.layers.0.mamba.dt_layernorm.weight'"),
        ("model.final_layernorm.weight", None, "missing key 'model.final_layernorm.weight'"),
        ("model.layers.1.feed_forward.router.weight", torch.ones(5, 32), "must have the shape \\[4, 32\\], got \\[5, 32\\]"),
        ("model.layers.0.mamba.dt_bias", torch.ones(64), "unexpected key 'model.layers.0.mamba.dt_bias'"),
    ],
)
def test_no_key_is_lost_or_drawn_anew(key, x, message, tmp_path):
    change(write(jamba("v0.1"), tmp_path), key, x)
    with pytest.raises(ValueError, match=f"(?s){message}.*read as Jamba's"):
        LinearHybridForCausalLM.from_pretrained(tmp_path)


# --- conversion/ -----------------------------------------------------------------------------------------------------


def test_script_both_ways(tmp_path, capsys):
    write(jamba("v0.1").bfloat16(), tmp_path / "theirs")
    dna_tokenizer(256).save_pretrained(tmp_path / "theirs")
    for origin, target, to in (("theirs", "ours", "ours"), ("ours", "back", "jamba")):
        arguments = ["--checkpoint", str(tmp_path / origin), "--output", str(tmp_path / target), "--to", to, "--verify"]
        script.main(arguments)
        assert "verified: " in capsys.readouterr().out
        assert PreTrainedTokenizerFast.from_pretrained(tmp_path / target)("ACGT")["input_ids"] == [7, 8, 9, 10, 1]
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(ours) is LinearHybridForCausalLM and ours.dtype == torch.bfloat16
    assert same(weights_of(tmp_path / "back"), weights_of(tmp_path / "theirs"))
    with pytest.raises(FileExistsError, match="take another name"):
        script.main(arguments)
