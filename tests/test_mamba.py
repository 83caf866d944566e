"""Mamba and Mamba-2 beside those of Transformers' Jamba, Bamba and others."""

import importlib

import pytest
import torch
import transformers
from torch import Tensor

import hf_linear
from hf_linear.mixers.mamba import Mamba
from hf_linear.mixers.mamba2 import Mamba2
from hf_linear.ops import linear_attention


def check_same(original: torch.nn.Module, ours: torch.nn.Module, T: int) -> None:
    """The output of T tokens, and the gradient of every parameter."""
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
    check_same(original, ours, T)


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


# Transformers' Mamba-2 layers: the options of their configs, the words for ours, and the mixer.
TWO_GROUPS = {"mamba2": "n_groups", "bamba": "mamba_n_groups", "granitemoehybrid": "mamba_n_groups", "zamba2": "mamba_ngroups"}
MAMBA2 = {
    "mamba2": ("Mamba2", "Mamba2Mixer", {"num_heads": 4, "head_dim": 16, "state_size": 6, "conv_kernel": 3, "use_bias": True}),
    "bamba": ("Bamba", "BambaMixer", {"mamba_n_heads": 4, "mamba_d_state": 6, "mamba_d_conv": 3, "mamba_proj_bias": True}),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        "GraniteMoeHybridMambaLayer",
        {"mamba_n_heads": 4, "mamba_d_state": 6, "mamba_d_conv": 3, "mamba_proj_bias": True},
    ),
    "zamba2": (
        "Zamba2",
        "Zamba2MambaMixer",
        {"n_mamba_heads": 4, "mamba_d_state": 6, "mamba_d_conv": 3, "add_bias_linear": True},
    ),
}


def mamba2_and_ours(name: str, groups: int):
    """A Mamba-2 layer of Transformers and ours with its parameters, by their names."""
    torch.manual_seed(0)
    family, mixer, options = MAMBA2[name]
    config = getattr(transformers, f"{family}Config")(hidden_size=32, **options, **{TWO_GROUPS[name]: groups})
    original = getattr(importlib.import_module(f"transformers.models.{name}.modeling_{name}"), mixer)(config, 0)
    original.time_step_limit = (0.1, 1.5)
    own = {"num_heads": 4, "state_size": 6, "conv_kernel": 3, "n_groups": groups, "use_bias": True, "norm_eps": 1e-5}
    if name == "granitemoehybrid":
        own["norm_eps"] = 1e-6
    own["time_step_limit"] = (0.1, 1.5)
    config = hf_linear.LinearHybridConfig(
        hidden_size=32, num_heads=2, num_hidden_layers=1, pattern="N", mixer_options={"mamba2": own}
    )
    ours = Mamba2(config.for_mixer("mamba2"), 0)
    with torch.no_grad():
        for p in original.parameters():
            p.add_(torch.randn_like(p) / 4)
    ours.load_state_dict(original.state_dict(), strict=True)
    return original, ours


@pytest.mark.parametrize("T", [1, 70])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", MAMBA2)
def test_mamba2_is_that_of_transformers(name, groups, T):
    """Output and gradients in float32, in which they compute whatever their dtype."""
    original, ours = mamba2_and_ours(name, groups)
    if groups == 2 and not hasattr(original.norm, "group_size"):  # before 5.24 some normalised all groups as one
        ours.norm.groups = 1
    check_same(original, ours, T)


def test_mamba2_starts_as_in_transformers():
    """A = -1, ..., -H and D = 1; steps of 0.001 to 0.1."""
    options = {"mamba2": {"num_heads": 8}}
    config = hf_linear.LinearHybridConfig(
        vocab_size=8, hidden_size=32, num_heads=2, num_hidden_layers=1, pattern="N", mixer_options=options
    )
    mixer = hf_linear.LinearHybridModel(config).layers[0].mixer
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 9))
    assert torch.equal(mixer.D, torch.ones(8)) and torch.equal(mixer.norm.weight, torch.ones(64))
    steps = torch.nn.functional.softplus(mixer.dt_bias)
    assert steps.min() > 0.00099 and steps.max() < 0.101 and steps.max() > 3 * steps.min()


def ssm(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The state space of a head as the Mamba-2 paper writes it: h_t = a_t h_{t-1} + B_t x_t^T, y_t = C_t^T h_t."""
    h, y = torch.zeros(B.shape[1], x.shape[1], dtype=x.dtype), []
    for t in range(len(x)):
        h = (dt[t] * A).exp() * h + torch.outer(B[t], dt[t] * x[t])
        y.append(C[t] @ h)
    return torch.stack(y)


def semiseparable(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Its dual: y = (L * (C B^T)) (dt x), L_ij = a_i ... a_{j+1}, attention under a mask of decays."""
    steps = (dt * A).cumsum(0)
    L = (steps[:, None] - steps).tril().exp().tril()
    return (L * (C @ B.T)) @ (dt[:, None] * x)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_duality(backend):
    """The state space, masked attention, and `linear_attention` of C, B and dt x with the log-decay dt A are one function."""
    rng = torch.Generator().manual_seed(0)
    T, H, N, P = 70, 3, 5, 4
    x, B, C = (torch.randn(T, H, n, generator=rng, dtype=torch.float64) for n in (P, N, N))
    dt = torch.rand(T, H, generator=rng, dtype=torch.float64)
    A = -torch.rand(H, generator=rng, dtype=torch.float64) * 4
    q, k, v, g = C, B, dt[..., None] * x, dt * A
    found, _ = linear_attention(q[None], k[None], v[None], g[None], scale=1.0, backend=backend)
    for form in (ssm, semiseparable):
        wanted = torch.stack([form(x[:, h], dt[:, h], A[h], B[:, h], C[:, h]) for h in range(H)], 1)
        # 70 sums in another order, in float64; the masked form also takes differences of running sums.
        torch.testing.assert_close(found[0], wanted, rtol=1e-11, atol=1e-11)
