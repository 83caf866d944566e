"""The Triton kernels on a GPU, beside flash-linear-attention and flash SDPA where they are there, in one run.

    python -m benchmarks.kernels [cold ops varlen crossover ...]

Figures are medians of triton.testing.do_bench. The peer tunes itself on its first call, which takes minutes: with
TRITON_CACHE_AUTOTUNING=1 and a kept TRITON_CACHE_DIR it does so once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
from torch import Tensor
from torch.nn import functional as F
from triton.testing import do_bench

from benchmarks.table import append
from hf_linear.ops import gated_linear_attention, linear_attention, retention_decay

try:
    from fla.ops.gla import chunk_gla
    from fla.ops.retention import chunk_retention
    from fla.ops.simple_gla import chunk_simple_gla
except ImportError:
    chunk_gla = None

PEER = "" if chunk_gla is None else f"fla {version('flash-linear-attention')}"
GLA, RETENTION, NONE, PER_TOKEN = "gla", "retention", "linear_attention", "linear_attention_per_token"
CASES = [  # B T H K V
    ((16, 2048, 4, 128, 256), GLA),
    ((8, 2048, 4, 256, 512), GLA),
    ((16, 2048, 4, 256, 512), RETENTION),
    *(((2, 8192, 16, 128, 128), case) for case in (GLA, RETENTION, NONE, PER_TOKEN)),
    *(((1, 16384, 4, 256, 512), case) for case in (GLA, RETENTION)),
    *(((1, 131072, 4, 128, 256), case) for case in (GLA, RETENTION)),
]
MILLISECONDS = {"warmup": 20, "rep": 100, "return_mode": "median"}


class Case:
    """Inputs of one shape, and a call of ours and of the peer's on them."""

    def __init__(self, shape: tuple[int, ...], case: str, cu_seqlens: Tensor | None = None):
        B, T, H, K, V = shape
        self.shape, self.case, self.cu_seqlens = shape, case, cu_seqlens
        new = {"device": "cuda", "dtype": torch.bfloat16}
        self.q, self.k, self.v = torch.randn(B, T, H, K, **new), torch.randn(B, T, H, K, **new), torch.randn(B, T, H, V, **new)
        self.do = torch.randn_like(self.v)
        decays = {GLA: (B, T, H, K), PER_TOKEN: (B, T, H)}
        self.g = F.logsigmoid(torch.randn(*decays[case], device="cuda")).div(16) if case in decays else None
        self.learned = [self.q, self.k, self.v] + ([] if self.g is None else [self.g])
        for x in self.learned:
            x.requires_grad_()

    def ours(self) -> Tensor:
        q, k, v, g, cu_seqlens = self.q, self.k, self.v, self.g, self.cu_seqlens
        if self.case == GLA:
            return gated_linear_attention(q, k, v, g, cu_seqlens=cu_seqlens, backend="triton")[0]
        if self.case == RETENTION:
            g = retention_decay(q.shape[2], q.device)
        return linear_attention(q, k, v, g, cu_seqlens=cu_seqlens, backend="triton")[0]

    def peer(self) -> Tensor:
        q, k, v, g = self.q, self.k, self.v, self.g
        if self.case == GLA:
            return chunk_gla(q, k, v, g, output_final_state=True)[0]
        if self.case == RETENTION:
            return chunk_retention(q, k, v, output_final_state=True)[0]
        return chunk_simple_gla(q, k, v, g=g, output_final_state=True)[0]

    def peer_differentiates(self) -> bool:
        """fla 0.6.0 refuses the gradient of a decay a token on Hopper before Triton 3.7.1, whose results would be wrong."""
        return chunk_gla is not None and self.case != PER_TOKEN

    def forward(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                return call()

        return run

    def both(self, call: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(call(), self.learned, self.do)

    def floor(self, copy: float, product: float, gradients: bool) -> float:
        """Milliseconds that a pass takes at least: its bytes, or its products in chunks of 64, each only once.

        The gradients read the inputs and do again and write one for each input, and take two products for one.
        """
        B, T, H, K, V = self.shape
        size = sum(x.numel() * x.element_size() for x in (*self.learned, self.v))
        flops = 2 * B * T * H * (64 * (K + V) + 2 * K * V)
        if gradients:
            size += size + sum(x.numel() * x.element_size() for x in self.learned)
            flops *= 3
        return 1e3 * max(size / copy, flops / product)


def ceilings() -> tuple[float, float]:
    """Bytes a second that a copy moves, operations a second of a bf16 product, on this card."""
    x = torch.randn(2**28, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    copy = 4e3 * x.numel() / do_bench(lambda: y.copy_(x), **MILLISECONDS)
    a, b = x[: 2**26].view(8192, 8192), x[2**26 : 2**27].view(8192, 8192)
    return copy, 2e3 * 8192**3 / do_bench(lambda: a @ b, **MILLISECONDS)


def row(case: Case, metric: str, unit: str, ours: float, peer: str, value: float | None, floor: float | None = None) -> None:
    shape = " ".join(map(str, case.shape))
    suite = "memory" if metric == "peak" else "ops"
    append(suite, case.case, shape, "bfloat16", metric, unit, ours, peer, value, None if floor is None else floor / ours)


def ops() -> None:
    copy, product = ceilings()
    print(f"copy {copy / 1e12:.2f} TB/s, 8192^3 bf16 product {product / 1e12:.0f} TFLOP/s")
    for shape, name in CASES:
        case = Case(shape, name)
        for metric, of in (("fwd", case.forward), ("fwd+bwd", case.both)):
            known = chunk_gla is not None and (metric == "fwd" or case.peer_differentiates())
            peer = do_bench(of(case.peer), **MILLISECONDS) if known else None
            ours = do_bench(of(case.ours), **MILLISECONDS)
            row(case, metric, "ms", ours, PEER, peer, case.floor(copy, product, metric != "fwd"))
        memory = peak(case.both(case.peer)) if case.peer_differentiates() else None
        row(case, "peak", "MB", peak(case.both(case.ours)), PEER, memory)


def peak(call: Callable) -> float:
    """MB allocated by a call beyond what was there before it."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def varlen() -> None:
    """64 documents of mixed lengths in one row against one document of the same 32K tokens."""
    shape = (1, 32768, 4, 128, 256)
    torch.manual_seed(0)
    cuts = torch.randperm(32767)[:63].sort().values + 1
    bounds = torch.cat([torch.tensor([0]), cuts, torch.tensor([32768])]).to("cuda", torch.int32)
    for name in (GLA, RETENTION):
        packed, whole = Case(shape, name, bounds), Case(shape, name)
        one = do_bench(whole.both(whole.ours), **MILLISECONDS)
        row(packed, "fwd+bwd", "ms", do_bench(packed.both(packed.ours), **MILLISECONDS), "one document", one)


def crossover() -> None:
    """Against causal flash SDPA at equal heads and D = 128, by length, 32K tokens in a batch."""
    for T in (512, 1024, 2048, 4096, 8192, 16384, 32768, 131072):
        B = max(32768 // T, 1)
        x = [torch.randn(B, 16, T, 128, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
        do = torch.randn_like(x[0])

        def attention(x: list[Tensor] = x, do: Tensor = do) -> None:
            torch.autograd.grad(F.scaled_dot_product_attention(*x, is_causal=True), x, do)

        sdpa = do_bench(attention, **MILLISECONDS)
        for name in (GLA, RETENTION):
            case = Case((B, T, 16, 128, 128), name)
            row(case, "fwd+bwd", "ms", do_bench(case.both(case.ours), **MILLISECONDS), "sdpa", sdpa)


def cold() -> None:
    """The first forward and backward pass with an empty Triton cache, and a second shape after it, in a new process."""
    script = "from benchmarks.kernels import first_calls; first_calls('{}')"
    for name in (GLA, RETENTION):
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(
                [sys.executable, "-c", script.format(name)], env=os.environ | {"TRITON_CACHE_DIR": folder}, check=True
            )


def first_calls(name: str) -> None:
    torch.zeros(1, device="cuda")  # the context is not ours to time
    for shape in ((16, 2048, 4, 128, 256), (3, 1000, 5, 128, 256)):
        case = Case(shape, name)
        torch.cuda.synchronize()
        start = time.perf_counter()
        case.both(case.ours)()
        torch.cuda.synchronize()
        append("cold", name, " ".join(map(str, shape)), "bfloat16", "cold", "s", time.perf_counter() - start)


SUITES = {"cold": cold, "ops": ops, "varlen": varlen, "crossover": crossover}

if __name__ == "__main__":
    for suite in sys.argv[1:] or SUITES:
        SUITES[suite]()
