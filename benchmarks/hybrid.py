"""Hybrids without a CUDA build: Transformers' Jamba, the same after `hf_linear.accelerate`, and ours of the same shape.

    python -m benchmarks.hybrid [cpu gpu mamba2]

Forward and backward of one batch in training, without a cache; the three take turns in one run, and the first two have the
same weights. `cpu`: 4 layers, one of them attention, in float32. `gpu`: 8 layers in bfloat16, which the original goes through
once, warmed up on a short batch. `shape` is "B T D layers". `mamba2` is the op behind Mamba-2 beside mamba-ssm's Triton
kernels, where mamba-ssm is installed; `shape` is "B T H N P". Without a name: the GPU's if there is one, the CPU's if not.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import JambaConfig, JambaForCausalLM

import hf_linear
from benchmarks.table import append
from hf_linear.ops import linear_attention

try:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
except ImportError:
    mamba_chunk_scan_combined = None

VOCABULARY, EXPERTS = 1024, 4
SHAPE = 8, 2048, 64, 128, 64  # a layer of Mamba-2 1.3B


def jamba(hidden_size: int, layers: int, attention_at: int) -> JambaForCausalLM:
    return JambaForCausalLM(
        JambaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=hidden_size // 64,
            num_key_value_heads=hidden_size // 64,
            attn_layer_period=layers,
            attn_layer_offset=attention_at,
            num_experts=EXPERTS,
            mamba_dt_rank=hidden_size // 16,
        )
    )


def ours(hidden_size: int, layers: int, attention_at: int) -> hf_linear.LinearHybridForCausalLM:
    return hf_linear.LinearHybridForCausalLM(
        hf_linear.LinearHybridConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=layers,
            num_heads=hidden_size // 64,
            pattern="".join("A" if i == attention_at else "M" for i in range(layers)),
            mixer_options={"mamba": {"inner_layernorms": True}},
            mlp_layer_types=["sparse" if i % 2 else "dense" for i in range(layers)],
            num_experts=EXPERTS,
            norm_topk_prob=False,
        )
    )


def step(model: nn.Module, B: int, T: int) -> Callable[[], None]:
    """Forward and backward of one batch; call it, then read the clock."""
    device = next(model.parameters()).device
    ids = torch.randint(VOCABULARY, (B, T), generator=torch.Generator().manual_seed(0)).to(device)

    def call() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return call


def compare(
    suite: str, case: str, B: int, T: int, size: tuple[int, int, int], turns: int, dtype: torch.dtype, device: str
) -> None:
    """Rows of suite `suite`: ours and the accelerated original beside the original."""
    torch.manual_seed(0)
    native = jamba(*size).to(device, dtype).train()
    models = {
        "fwd+bwd": ours(*size).to(device, dtype).train(),
        "fwd+bwd accelerated": hf_linear.accelerate(copy.deepcopy(native)),
    }
    step(native, B, 64)()
    slow, fast = step(native, B, T), {metric: step(model, B, T) for metric, model in models.items()}
    times: dict[str, list[float]] = {metric: [] for metric in ("native", *fast)}
    for _ in range(turns):
        times["native"].append(milliseconds(slow))
        for metric, call in fast.items():
            call()
            times[metric].append(milliseconds(call))
    original, shape = statistics.median(times["native"]), f"{B} {T} {size[0]} {size[1]}"
    for metric in models:
        row = suite, case, shape, str(dtype).removeprefix("torch."), metric, "ms", statistics.median(times[metric])
        append(*row, f"transformers {transformers.__version__}", original)


def milliseconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def cpu() -> None:
    compare("cpu", "jamba-4", 1, 512, (256, 4, 2), 3, torch.float32, "cpu")


def gpu() -> None:
    compare("model", "jamba-8", 2, 2048, (1024, 8, 4), 1, torch.bfloat16, "cuda")


def mamba2() -> None:
    """From x, dt, A, B and C, as a layer has them behind its convolution and softplus."""
    if mamba_chunk_scan_combined is None:
        print("mamba2: mamba-ssm is not installed, nothing to compare with")
        return
    from triton.testing import do_bench

    batch, T, H, N, P = SHAPE
    new = {"device": "cuda", "dtype": torch.bfloat16}
    x, dy = torch.randn(batch, T, H, P, **new), torch.randn(batch, T, H, P, **new)
    B, C = torch.randn(batch, T, 1, N, **new), torch.randn(batch, T, 1, N, **new)
    dt, A = F.softplus(torch.randn(batch, T, H, device="cuda") - 4), -torch.arange(1.0, H + 1, device="cuda")
    learned = [z.requires_grad_() for z in (x, dt, A, B, C)]

    def dual() -> Tensor:
        q, k = (z.expand(-1, -1, H, -1) for z in (C, B))
        return linear_attention(q, k, (dt[..., None] * x).to(x.dtype), dt * A, scale=1.0)[0]

    def peer() -> Tensor:
        return mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=256)

    for metric, gradients in (("fwd", False), ("fwd+bwd", True)):
        figures = []
        for call in (dual, peer):
            with torch.set_grad_enabled(gradients):
                run = (lambda f: lambda: torch.autograd.grad(f(), learned, dy))(call) if gradients else call
                figures.append(do_bench(run, warmup=20, rep=100, return_mode="median"))
        shape = " ".join(map(str, SHAPE))
        append("ops", "mamba2", shape, "bfloat16", metric, "ms", figures[0], f"mamba-ssm {version('mamba-ssm')}", figures[1])


SUITES = {"cpu": cpu, "gpu": gpu, "mamba2": mamba2}

if __name__ == "__main__":
    for name in sys.argv[1:] or (["gpu", "mamba2"] if torch.cuda.is_available() else ["cpu"]):
        SUITES[name]()
