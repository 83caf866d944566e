"""Attention's options beside Transformers' own Qwen3-Next, and a shared block beside layers with its weights merged."""

import torch
from families import ids, logits, spread_parameters, tiny_config, tiny_model
from torch import nn
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention, Qwen3NextRotaryEmbedding

from hf_linear import LinearHybridForCausalLM
from hf_linear.mixers.attention import Attention


def test_gate_norms_and_partial_rotation_are_those_of_qwen3_next():
    """Theirs has the gate beside the query in one projection, head by head, and norms that scale by 1 + weight."""
    config = tiny_config("qwen3-next", num_heads=4, num_kv_heads=2, rope_parameters=None)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.25}
    config._attn_implementation = "eager"
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 1}
    theirs_config = Qwen3NextConfig(**shape, rope_parameters=config.rope_parameters, attn_implementation="eager")
    theirs, ours = Qwen3NextAttention(theirs_config, 0), Attention(config, 0)
    for p in ours.parameters():
        nn.init.normal_(p, std=0.5)
    weights = {name: p.detach() for name, p in ours.named_parameters()}
    q, gate = (weights.pop(f"{name}_proj.weight").unflatten(0, (4, 16)) for name in ("q", "g"))
    weights |= {name: p - 1 for name, p in weights.items() if "norm" in name}
    theirs.load_state_dict({**weights, "q_proj.weight": torch.cat([q, gate], 1).flatten(0, 1)})
    x, positions = torch.randn(2, 9, 32), torch.arange(3, 12)[None]
    mask = torch.full((9, 9), -torch.inf).triu(1)[None, None]
    expected, _ = theirs(x, Qwen3NextRotaryEmbedding(theirs_config)(x, positions), mask)
    found, _ = ours(x, position_ids=positions, attention_mask=mask)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_site_is_a_layer_with_the_weights_of_the_block_and_its_adapter():
    """W + B A, in every product of attention and of the MLP; the biases are the block's."""
    model = tiny_model("hybrid-shared", attention_output_gate=True)
    plain = LinearHybridForCausalLM(tiny_config("hybrid-shared", attention_output_gate=True, pattern="GAA"))
    weights = model.state_dict()
    block = {name.rpartition("shared_block.")[2]: x for name, x in weights.items() if "shared_block" in name}
    merged = {name: x for name, x in weights.items() if "shared_block" not in name}
    for i in (1, 2):
        for name, x in block.items():
            key = f"model.layers.{i}.{name}"
            if name.endswith(".weight"):
                down, up = (merged.pop(key.replace(".weight", f".{j}.weight")) for j in (0, 1))
                x = x + up @ down
            merged[key] = x
    plain.double().eval().load_state_dict(merged)
    x = ids(2, 21)
    torch.testing.assert_close(logits(plain, x), logits(model, x))


def test_scores_are_multiplied():
    """attention_multiplier in the place of head_dim ** -0.5: as if the queries were so much longer."""
    model = tiny_model("hybrid-rope")
    scaled = spread_parameters(LinearHybridForCausalLM(tiny_config("hybrid-rope", attention_multiplier=3 * 16**-0.5))).double()
    for layer, kind in zip(model.model.layers, model.config.layer_types, strict=True):
        if kind == "full_attention":
            layer.mixer.q_proj.weight.data *= 3
    x = ids(2, 21)
    torch.testing.assert_close(logits(scaled.eval(), x), logits(model, x))
