"""Mamba beside that of Transformers' Jamba. RetNet beside torchscale's: test_torchscale.py."""

import pytest
import torch

import hf_linear
from hf_linear.mixers.mamba import Mamba


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
