"""Beside flash-linear-attention itself, on a GPU: logits, greedy generation, and its models opening what we wrote.

Needs flash-linear-attention 0.6.0 and fla-core 0.6.0. flash-attn, which its hybrids ask for, is PyTorch's here, with the mask
that flash-attn documents. Classes are named: which library the Auto classes answer with depends on which was imported first.
"""

from pathlib import Path

import pytest
import torch
from make_golden_fla import CASES, SMALL, attend, attend_packed, draw
from torch import Tensor
from transformers import PreTrainedModel

import hf_linear
from conversion.fla import beside_fla
from hf_linear.checkpoints.layout import save

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
# Heads as wide as fla's kernels take them on a GPU.
SHAPE = {**SMALL, "hidden_size": 128, "intermediate_size": 192, "vocab_size": 256}
every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """Products of float32 in float32: fla leaves Triton's default, which is TF32."""
    monkeypatch.setenv("TRITON_F32_DEFAULT", "ieee")


@pytest.fixture(scope="module")
def fla_models():
    models = pytest.importorskip("fla.models", reason="needs flash-linear-attention 0.6.0")
    import fla.layers.attn

    fla.layers.attn.flash_attn_func, fla.layers.attn.flash_attn_varlen_func = attend, attend_packed
    return models


def family(name: str) -> str:
    return {"gla": "GLA", "retnet": "RetNet"}[name.partition("-")[0]]


def make_theirs(models, name: str) -> PreTrainedModel:
    config = getattr(models, f"{family(name)}Config")(**{**SHAPE, **CASES[name]})
    model = getattr(models, f"{family(name)}ForCausalLM")(config).eval()
    draw(model, gain=1.0)
    return model.to(DEVICE)


def open_as_ours(name: str, folder: Path, **options) -> PreTrainedModel:
    return getattr(hf_linear, f"{family(name)}ForCausalLM").from_pretrained(folder, **options).to(DEVICE)


def make_ids(T: int) -> Tensor:
    """The same on every device, and of the seeds one by which rounding counts little: norms after small sums amplify it."""
    return torch.randint(0, SHAPE["vocab_size"], (2, T), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def distance(a: Tensor, b: Tensor) -> float:
    return (a.float() - b.float()).abs().max().item()


@every_case
@pytest.mark.parametrize("T", [37, 200])  # fla goes token by token up to 64, and in chunks beyond
@torch.no_grad()
def test_logits(name, T, fla_models, tmp_path):
    theirs, ids = make_theirs(fla_models, name), make_ids(T)
    theirs.save_pretrained(tmp_path)
    ours, exact = open_as_ours(name, tmp_path), theirs(ids, use_cache=False).logits
    assert distance(ours(ids, use_cache=False).logits, exact) < 1e-4
    theirs, ours = theirs.bfloat16(), open_as_ours(name, tmp_path, dtype=torch.bfloat16)
    errors = [(model(ids, use_cache=False).logits - exact).square().mean().sqrt().item() for model in (ours, theirs)]
    assert errors[0] < 2 * errors[1]  # as far from float32 as fla's own, give or take the order of the roundings


@every_case
def test_greedy_generation(name, fla_models, tmp_path):
    theirs, ids = make_theirs(fla_models, name), make_ids(20)
    theirs.save_pretrained(tmp_path)
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(open_as_ours(name, tmp_path).generate(ids, **options), theirs.generate(ids, **options))


@every_case
@torch.no_grad()
def test_fla_opens_what_we_wrote(name, fla_models, tmp_path):
    theirs, ids = make_theirs(fla_models, name), make_ids(37)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = open_as_ours(name, tmp_path / "theirs")
    save(ours, tmp_path / "written", "fla")
    again, problems = type(theirs).from_pretrained(tmp_path / "written", output_loading_info=True)
    assert not any(problems.values())
    assert distance(again.to(DEVICE)(ids, use_cache=False).logits, theirs(ids, use_cache=False).logits) < 1e-4
    if not theirs.config.attn:  # the script's own words, of whole tokens
        assert "fla's own logits of 256 random tokens" in beside_fla(tmp_path / "written", ours)
