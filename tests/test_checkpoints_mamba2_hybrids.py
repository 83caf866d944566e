"""Bamba's and Granite's checkpoints: small random ones that Transformers' own classes make, opened and written back."""

import pytest
import torch
from checkpoint_files import close, same, weights_of
from families import ids, logits
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    GraniteMoeHybridConfig,
    PreTrainedModel,
)

from hf_linear import LinearHybridConfig, LinearHybridForCausalLM
from hf_linear.checkpoints.layout import save

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mamba_n_heads": 8,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
    "max_position_embeddings": 256,
    "eos_token_id": 63,
    "initializer_range": 0.1,
}
GRANITE = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    "embedding_multiplier": 12,
    "attention_multiplier": 0.125,
    "residual_multiplier": 0.22,
    "logits_scaling": 4,
    "shared_intermediate_size": 48,
    "tie_word_embeddings": True,
}
THEIRS = {
    "bamba": BambaConfig(**TINY, attn_layer_indices=[1, 3]),
    "bamba-limits": BambaConfig(**TINY, attn_layer_indices=[2], mamba_proj_bias=True, time_step_limit=(0.01, 0.1)),
    "granite": GraniteMoeHybridConfig(**{**TINY, **GRANITE}, num_local_experts=5, num_experts_per_tok=3),
    "granite-dense": GraniteMoeHybridConfig(**{**TINY, **GRANITE}, num_local_experts=0),
    "granite-rope": GraniteMoeHybridConfig(**{**TINY, **GRANITE}, num_local_experts=4, position_embedding_type="rope"),
}
every_config = pytest.mark.parametrize("name", THEIRS)


def transformers_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(THEIRS[name]).eval()
    for key, p in model.named_parameters():
        if p.dim() == 1 and "A_log" not in key:
            nn.init.normal_(p, mean=1.0 if "norm" in key or key.endswith(".D") else 0.0, std=0.2)
    return model


@every_config
def test_opens_and_is_written_back(name, tmp_path):
    """Logits and greedy tokens of Transformers' own class; and bit for bit back."""
    theirs, x = transformers_model(name), ids(2, 40)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, problems = LinearHybridForCausalLM.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(problems.values())
    expected = logits(theirs, x)
    assert expected.abs().max() > 0.3 and close(logits(ours, x), expected)
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(ours.generate(x[:, :9], **greedy), theirs.generate(x[:, :9], **greedy))
    save(ours, tmp_path / "back", name.split("-")[0] + "_hybrid" * name.startswith("granite"))
    assert same(*(weights_of(tmp_path / folder) for folder in ("theirs", "back")))
    back, problems = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert type(back) is type(theirs) and not any(problems.values())
    assert close(logits(back, x), expected)  # in chunks of another size
    ours.save_pretrained(tmp_path / "ours")
    assert same(LinearHybridForCausalLM.from_pretrained(tmp_path / "ours").state_dict(), ours.state_dict())


def test_the_preset_is_granite_h_small():
    attention = [5, 15, 25, 35]
    fields = {
        "model_type": "granitemoehybrid",
        "attention_multiplier": 0.0078125,
        "embedding_multiplier": 12,
        "hidden_size": 4096,
        "intermediate_size": 768,
        "layer_types": ["full_attention" if i in attention else "linear_attention" for i in range(40)],
        "logits_scaling": 16,
        "mamba_d_head": 64,
        "mamba_d_state": 128,
        "mamba_n_heads": 128,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_experts_per_tok": 10,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "num_local_experts": 72,
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-5,
        "shared_intermediate_size": 1536,
        "tie_word_embeddings": True,
        "vocab_size": 100352,
    }
    read, preset = LinearHybridConfig.from_dict(fields), LinearHybridConfig.from_preset("granite-4")
    assert read.for_mixer("mamba2") == preset.for_mixer("mamba2")
    # How the layers are spelt; and the width of an MLP that no layer has.
    apart = ("pattern", "mixer_options", "intermediate_size")
    ours, expected = ({k: v for k, v in c.to_dict().items() if k not in apart} for c in (read, preset))
    assert ours == expected


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("bamba", {"mamba_n_groups": 2}, "mamba_n_groups of a bamba must be 1, got 2: this variant"),
        ("bamba", {"mlp_bias": True}, "mlp_bias of a bamba must be False, got True: this variant"),
        ("granite", {"attention_bias": True}, "attention_bias of a granite_hybrid must be False, got True: this variant"),
        ("granite", {"shared_intermediate_size": 40}, "must be a multiple of intermediate_size = 24, got 40: this variant"),
    ],
)
def test_config_that_is_not_here(name, fields, message):
    with pytest.raises(ValueError, match=message):
        LinearHybridConfig.from_dict(THEIRS[name].to_dict() | fields)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("bamba", {"rope_parameters": None}, "partial_rotary_factor of a .* must be 0.5, got None"),
        ("bamba", {"residual_multiplier": 2}, "residual_multiplier of a .* must be 1"),
        ("granite", {"norm_topk_prob": False}, "norm_topk_prob of a .* must be True"),
        ("granite", {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}, "mlp_layer_types of a .* must be"),
        ("granite", {"mixers": ["gla"] * 4, "mixer_options": None, "layer_types": None}, "mixers of a .* must be"),
    ],
)
def test_what_theirs_cannot_say(name, fields, message):
    ours = LinearHybridConfig.from_dict(THEIRS[name].to_dict())
    config = LinearHybridConfig(**{**ours.to_dict(), **fields})
    layout = next(layout for layout in config.layouts if layout.name.startswith(name))
    with pytest.raises(ValueError, match=f"{message}.*: it has no word for this, save the model as ours"):
        layout.write_config(config)
