"""Logits of the original implementations that run on a CPU."""

import sys
import types

import pytest
import torch

import hf_linear

OURS = {
    "embed_tokens": "model.embed_tokens",
    "retention.q_proj": "mixer.q_proj",
    "retention.k_proj": "mixer.k_proj",
    "retention.v_proj": "mixer.v_proj",
    "retention.g_proj": "mixer.g_proj",
    "retention.out_proj": "mixer.o_proj",
    "retention_layer_norm": "mixer_norm",
    "ffn.fc1": "mlp.gate_proj",  # torchscale activates fc1 and multiplies by gate
    "ffn.gate": "mlp.up_proj",
    "ffn.fc2": "mlp.down_proj",
    "final_layer_norm": "mlp_norm",
    "layer_norm": "model.norm",
    "output_projection": "lm_head",
}


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


def build(torchscale):
    """The same random RetNet twice, in float64: value width 1.5 times the key width, an MLP with SwiGLU."""
    original = torchscale.retnet.RetNetDecoder(
        torchscale.config.RetNetConfig(
            vocab_size=97,
            decoder_embed_dim=32,
            decoder_value_embed_dim=48,
            decoder_retention_heads=4,
            decoder_ffn_embed_dim=40,
            decoder_layers=2,
            activation_fn="swish",
            recurrent_chunk_size=4,
        ),
        embed_tokens=torch.nn.Embedding(97, 32),
    )
    config = hf_linear.RetNetConfig(
        vocab_size=97,
        hidden_size=32,
        expand_v=1.5,
        num_heads=4,
        intermediate_size=40,
        num_hidden_layers=2,
        rope_style="interleaved",
        rope_frequencies="linspace",
        elementwise_affine=False,
        retention_norm="decay",
    )
    ours = hf_linear.RetNetForCausalLM(config)
    state = {ours_key(key): x for key, x in original.state_dict().items() if "retnet_rel_pos" not in key}
    ours.load_state_dict(state, strict=True)
    return original.double().eval(), ours.double().eval()


def ours_key(key: str) -> str:
    """torchscale's key in our words: "layers.0.ffn.fc1.weight" to "model.layers.0.mlp.gate_proj.weight"."""
    parts = key.split(".")
    prefix = f"model.layers.{parts[1]}." if parts[0] == "layers" else ""
    name = ".".join(parts[2:-1] if prefix else parts[:-1])
    return f"{prefix}{OURS[name]}.{parts[-1]}"


def recurrent_logits(original, ids):
    """torchscale's recurrent form, one token a call; it wants the whole prefix each time."""
    state = {}
    steps = [original(ids[:, : t + 1], incremental_state=state)[0][:, -1] for t in range(ids.shape[1])]
    return torch.stack(steps, 1)


# torchscale keeps its rotary angles and decays in float32 buffers, which costs 3e-7 at logits of order 1.
TOLERANCE = 1e-6


def test_retnet_equals_torchscale_in_parallel(torchscale):
    original, ours = build(torchscale)
    ids = torch.randint(0, 97, (2, 70))
    assert torch.isclose(ours(ids).logits, original(ids)[0], rtol=0, atol=TOLERANCE).all()


def test_retnet_equals_torchscale_recurrently(torchscale):
    original, ours = build(torchscale)
    with torch.no_grad():
        for module in (original, ours):  # scores far above 1: the parallel form would clamp its row sums here
            for name, p in module.named_parameters():
                if "q_proj" in name or "k_proj" in name:
                    p.mul_(8)
    ids = torch.randint(0, 97, (2, 20))
    expected = recurrent_logits(original, ids)
    assert torch.isclose(ours(ids).logits, expected, rtol=0, atol=TOLERANCE).all()
    cache, steps = None, []
    for t in range(ids.shape[1]):
        out = ours(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    assert torch.isclose(torch.cat(steps, 1), expected, rtol=0, atol=TOLERANCE).all()
