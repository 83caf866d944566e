"""Logits of the original implementations that run on a CPU."""

import sys
import types

import pytest
import torch

import hf_linear
from hf_linear.mixers.mamba import Mamba

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


@pytest.fixture
def jamba_and_ours():
    """A Mamba layer of Transformers' Jamba and ours with its parameters, by their names."""
    from transformers import JambaConfig
    from transformers.models.jamba.modeling_jamba import JambaMambaMixer

    torch.manual_seed(0)
    original = JambaMambaMixer(JambaConfig(hidden_size=32, mamba_dt_rank=5, mamba_d_state=6, mamba_d_conv=3), 0)
    own = {"inner_layernorms": True, "time_step_rank": 5, "state_size": 6, "conv_kernel": 3}
    config = hf_linear.LinearHybridConfig(
        hidden_size=32, num_heads=2, num_hidden_layers=1, pattern="M", mixer_options={"mamba": own}
    )
    ours = Mamba(config.for_mixer("mamba"), 0)
    assert torch.equal(ours.A_log, original.A_log)
    ours.load_state_dict(original.state_dict(), strict=True)
    return original, ours


@pytest.mark.parametrize("T", [1, 3, 70])
def test_mamba_is_that_of_jamba(jamba_and_ours, T):
    """Output and gradients in float32, in which Jamba computes whatever its dtype."""
    original, ours = jamba_and_ours
    x = torch.randn(2, T, 32)
    found = []
    for mixer, options in ((original, {}), (ours, {"position_ids": torch.arange(T)[None]})):
        y = mixer(x, **options)
        y = y[0] if isinstance(y, tuple) else y
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        names, parameters = zip(*mixer.named_parameters(), strict=True)
        found.append({"y": y} | dict(zip(names, torch.autograd.grad((y * weights).sum(), parameters), strict=True)))
    for name, wanted in found[0].items():
        # Sums of 140 tokens in another order.
        torch.testing.assert_close(found[1][name], wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item(), msg=name)


def test_mamba_starts_as_published():
    """A = -1, ..., -N and D = 1 in every channel; steps of 0.001 to 0.1."""
    config = hf_linear.LinearHybridConfig(vocab_size=8, hidden_size=32, num_heads=2, num_hidden_layers=1, pattern="M")
    mixer = hf_linear.LinearHybridModel(config).layers[0].mixer
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(64, 16))
    assert torch.equal(mixer.D, torch.ones(64))
    steps = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert 0.00099 < steps.min() < 0.01 < steps.max() < 0.101


def test_mamba_keeps_its_decays_in_float32(tmp_path):
    config = hf_linear.LinearHybridConfig(vocab_size=8, hidden_size=32, num_heads=2, num_hidden_layers=1, pattern="M")
    hf_linear.LinearHybridForCausalLM(config).save_pretrained(tmp_path)
    model = hf_linear.LinearHybridForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    wide = {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert wide == {"A_log", "D"}
    assert model(torch.tensor([[1, 2, 3]])).logits.dtype == torch.bfloat16
