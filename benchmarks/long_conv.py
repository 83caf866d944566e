"""Hyena's gated long convolution on a GPU beside torch.fft, and beside causal flash SDPA of equal width by length.

    python -m benchmarks.long_conv [ops crossover cold]

torch.fft is measured in the same run. FlashFFTConv needs a CUDA build: its figures are those once measured on an H100 80GB
HBM3 with torch 2.11 and CUDA 13.0, and its rows say so.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from triton.testing import do_bench

from benchmarks.kernels import MILLISECONDS, ceilings, peak
from benchmarks.table import append
from hf_linear.ops import long_conv

# B D T, and FlashFFTConv's forward and forward + backward in ms, its extra memory in MB.
CASES = {
    (16, 768, 2048): (0.455, 1.807, 350),
    (8, 768, 8192): (2.910, 10.242, 700),
    (2, 768, 32768): (4.404, 12.750, 3380),
    (1, 768, 131072): (13.76, 36.44, 9750),
    (1, 256, 1048576): (60.24, 128.31, 26000),
}
FLASH = "flashfftconv (recorded)"
WIDTH, HEAD = 256, 128  # of the crossover: HyenaDNA's width


class Case:
    """Inputs of one shape, and a call of ours and of torch.fft's on them."""

    def __init__(self, B: int, D: int, T: int):
        self.shape = B, D, T
        new = {"device": "cuda"}
        self.u, self.pre, self.post, self.dy = (torch.randn(B, D, T, dtype=torch.bfloat16, **new) for _ in range(4))
        self.h = torch.randn(D, T, **new) * torch.exp(-3 * torch.arange(T, **new) / T)
        self.skip = torch.randn(D, **new)
        self.learned = [self.u, self.h, self.skip, self.pre, self.post]
        for x in self.learned:
            x.requires_grad_()

    def ours(self) -> Tensor:
        return long_conv(self.u, self.h, self.skip, pre_gate=self.pre, post_gate=self.post, backend="triton")[0]

    def peer(self) -> Tensor:
        T = self.shape[-1]
        p = self.pre * self.u.float()
        c = torch.fft.irfft(torch.fft.rfft(p, 2 * T) * torch.fft.rfft(self.h, 2 * T), 2 * T)[..., :T]
        return (self.post * (c + self.skip[:, None] * p)).to(self.u.dtype)

    @staticmethod
    def forward(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return torch.no_grad()(call)

    def both(self, call: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(call(), self.learned, self.dy)

    def floor(self, copy: float, gradients: bool) -> float:
        """Milliseconds to read every input once and write y; for the gradients, to read all again and dy, and write five."""
        B, D, T = self.shape
        size = 8 * B * D * T + 4 * D * T
        if gradients:
            size += 14 * B * D * T + 8 * D * T
        return 1e3 * size / copy


def row(
    shape: tuple[int, ...], metric: str, unit: str, ours: float, peer: str, value: float, floor: float | None = None
) -> None:
    suite, fraction = "memory" if metric == "peak" else "ops", None if floor is None else floor / ours
    append(suite, "long_conv", " ".join(map(str, shape)), "bfloat16", metric, unit, ours, peer, value, fraction)


def ops() -> None:
    copy, _ = ceilings()
    print(f"copy {copy / 1e12:.2f} TB/s")
    for shape, recorded in CASES.items():
        case = Case(*shape)
        for metric, of, flash in (("fwd", case.forward, recorded[0]), ("fwd+bwd", case.both, recorded[1])):
            peer = do_bench(of(case.peer), **MILLISECONDS)
            ours = do_bench(of(case.ours), **MILLISECONDS)
            floor = case.floor(copy, metric != "fwd")
            row(shape, metric, "ms", ours, "torch.fft", peer, floor)
            row(shape, metric, "ms", ours, FLASH, flash, floor)
        memory, ours = peak(case.both(case.peer)), peak(case.both(case.ours))
        row(shape, "peak", "MB", ours, "torch.fft", memory)
        row(shape, "peak", "MB", ours, FLASH, recorded[2])


def crossover() -> None:
    """Forward + backward of a long convolution and of causal attention, 256 channels, 128K tokens in a batch or one row."""
    for T in (2**n for n in range(10, 21)):
        B = max(2**17 // T, 1)
        case = Case(B, WIDTH, T)
        ours = do_bench(case.both(case.ours), **MILLISECONDS)
        x = [torch.randn(B, WIDTH // HEAD, T, HEAD, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
        do = torch.randn_like(x[0])

        def attention(x: list[Tensor] = x, do: Tensor = do) -> None:
            torch.autograd.grad(F.scaled_dot_product_attention(*x, is_causal=True), x, do)

        row((B, WIDTH, T), "fwd+bwd", "ms", ours, "sdpa", milliseconds(attention, T))


def milliseconds(call: Callable, T: int) -> float:
    """do_bench calls at least seven times, where once takes seconds."""
    if T < 2**18:
        return do_bench(call, **MILLISECONDS)
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def cold() -> None:
    """The first forward and backward pass with an empty Triton cache, in a new process."""
    for shape in ((16, 768, 2048), (2, 768, 32768)):
        script = f"from benchmarks.long_conv import first_call; first_call({shape})"
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, "-c", script], env=os.environ | {"TRITON_CACHE_DIR": folder}, check=True)


def first_call(shape: tuple[int, int, int]) -> None:
    case = Case(*shape)
    torch.cuda.synchronize()
    start = time.perf_counter()
    case.both(case.ours)()
    torch.cuda.synchronize()
    append("cold", "long_conv", " ".join(map(str, shape)), "bfloat16", "cold", "s", time.perf_counter() - start)


SUITES = {"cold": cold, "ops": ops, "crossover": crossover}

if __name__ == "__main__":
    for suite in sys.argv[1:] or SUITES:
        SUITES[suite]()
