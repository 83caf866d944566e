"""Mamba's selective scan and short convolution on a GPU, beside mamba-ssm's and causal-conv1d's kernels where they are there.

    python -m benchmarks.selective_scan [scan varlen step conv cold]

Every tensor is in the layout that its kernel takes: tokens before channels here, channels before tokens there. The floor is the
memory's: every tensor read or written once at the rate of a copy. `docs/kernels.md` has that of the exponentials.
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

from benchmarks.kernels import MILLISECONDS, ceilings, peak
from benchmarks.table import append
from hf_linear.ops import selective_scan, selective_scan_step, short_conv, short_conv_step

try:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
except ImportError:
    selective_scan_fn = None
try:
    from causal_conv1d import causal_conv1d_fn
except ImportError:
    causal_conv1d_fn = None

SCANS = [(8, 2048, 4096, 16), (1, 32768, 4096, 16), (2, 2048, 2048, 16)]  # B T D N; the last is that of a small Jamba
CONVS = [(8, 2048, 4096, 4), (1, 32768, 4096, 4)]  # B T D W


class Case:
    """Learned inputs, one call of ours on them and one of the peer's on its own."""

    def __init__(self, shape: tuple[int, ...], cu_seqlens: Tensor | None = None):
        B, T, D, _ = self.shape = shape
        self.cu_seqlens = cu_seqlens
        self.dy = self.tokens(B, T, D)

    @staticmethod
    def tokens(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()

    @staticmethod
    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda").requires_grad_()

    def forward(self) -> Callable[[], Tensor]:
        return torch.no_grad()(self.ours)

    def both(self) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(self.ours(), self.learned, self.dy)

    def peer_forward(self) -> Callable[[], Tensor]:
        return torch.no_grad()(self.peer)

    def peer_both(self) -> Callable[[], tuple[Tensor, ...]]:
        dy = self.dy.transpose(1, 2).contiguous()
        return lambda: torch.autograd.grad(self.peer(), self.peer_learned, dy)

    def floor(self, copy: float, gradients: bool) -> float:
        """Milliseconds to read every input and write y; for the gradients, to read all again and dy, and write one each."""
        inputs = sum(x.numel() * x.element_size() for x in self.learned)
        y = self.dy.numel() * self.dy.element_size()
        return 1e3 * (inputs + y + (2 * inputs + y) * gradients) / copy


class Scan(Case):
    name, peer_name = "selective_scan", f"mamba-ssm {version('mamba-ssm')}" if selective_scan_fn else ""

    def __init__(self, shape: tuple[int, ...], cu_seqlens: Tensor | None = None):
        super().__init__(shape, cu_seqlens)
        B, T, D, N = shape
        self.x, self.dt, self.z = (self.tokens(B, T, D) for _ in range(3))
        self.B, self.C = self.tokens(B, T, N), self.tokens(B, T, N)
        self.D, self.bias = self.numbers(D), self.numbers(D)
        self.A = -torch.arange(1.0, N + 1, device="cuda").repeat(D, 1)
        self.A.requires_grad_()
        self.bias.data -= 4  # step sizes around 0.02, as Mamba begins with
        self.learned = [self.x, self.dt, self.A, self.B, self.C, self.D, self.z, self.bias]
        if selective_scan_fn:
            moved = (self.x, self.dt, self.B, self.C, self.z)
            x, dt, b, c, z = (y.detach().transpose(1, 2).contiguous().requires_grad_() for y in moved)
            self.peer_learned = [x, dt, self.A, b, c, self.D, z, self.bias]

    def ours(self) -> Tensor:
        x, dt, A, B, C, D, z, bias = self.learned
        options = {"dt_bias": bias, "dt_softplus": True, "cu_seqlens": self.cu_seqlens, "backend": "triton"}
        return selective_scan(x, dt, A, B, C, D, z, **options)[0]

    def peer(self) -> Tensor:
        x, dt, A, B, C, D, z, bias = self.peer_learned
        return selective_scan_fn(x, dt, A, B, C, D, z, delta_bias=bias, delta_softplus=True)


class Convolution(Case):
    """The peer is causal-conv1d's kernel, or torch's conv1d on a sequence that is already channel-major."""

    name = "short_conv"
    peer_name = f"causal-conv1d {version('causal-conv1d')}" if causal_conv1d_fn else "torch conv1d"

    def __init__(self, shape: tuple[int, ...], cu_seqlens: Tensor | None = None):
        super().__init__(shape, cu_seqlens)
        B, T, D, W = shape
        self.learned = [self.tokens(B, T, D), self.tokens(D, W), self.tokens(D)]
        x, w, b = self.learned
        self.peer_learned = [x.detach().transpose(1, 2).contiguous().requires_grad_(), w, b]

    def ours(self) -> Tensor:
        return short_conv(*self.learned, activation="silu", cu_seqlens=self.cu_seqlens, backend="triton")[0]

    def peer(self) -> Tensor:
        x, w, b = self.peer_learned
        if causal_conv1d_fn:
            return causal_conv1d_fn(x, w, b, activation="silu")
        T, W = x.shape[2], w.shape[1]
        return F.silu(F.conv1d(x, w[:, None], b, padding=W - 1, groups=len(w))[..., :T])


def row(case: Case, metric: str, unit: str, ours: float, peer: str, value: float | None, floor: float | None = None) -> None:
    suite, fraction = "memory" if metric == "peak" else "ops", None if floor is None else floor / ours
    append(suite, case.name, " ".join(map(str, case.shape)), "bfloat16", metric, unit, ours, peer, value, fraction)


def measure(case: Case, copy: float) -> None:
    for metric, ours, peer in (("fwd", case.forward, case.peer_forward), ("fwd+bwd", case.both, case.peer_both)):
        known = do_bench(peer(), **MILLISECONDS) if case.peer_name else None
        floor = case.floor(copy, metric != "fwd")
        row(case, metric, "ms", do_bench(ours(), **MILLISECONDS), case.peer_name, known, floor)
    memory = peak(case.peer_both()) if case.peer_name else None
    row(case, "peak", "MB", peak(case.both()), case.peer_name, memory)


def scan() -> None:
    copy, _ = ceilings()
    print(f"copy {copy / 1e12:.2f} TB/s")
    for shape in SCANS:
        measure(Scan(shape), copy)


def conv() -> None:
    copy, _ = ceilings()
    for shape in CONVS:
        measure(Convolution(shape), copy)


def varlen() -> None:
    """64 documents of mixed lengths in one row against one document of the same 32K tokens."""
    torch.manual_seed(0)
    cuts = torch.randperm(32767)[:63].sort().values + 1
    bounds = torch.cat([torch.tensor([0]), cuts, torch.tensor([32768])]).to("cuda", torch.int32)
    for kind, shape in ((Scan, SCANS[1]), (Convolution, CONVS[1])):
        one = do_bench(kind(shape).both(), **MILLISECONDS)
        packed = kind(shape, bounds)
        row(packed, "fwd+bwd", "ms", do_bench(packed.both(), **MILLISECONDS), "one document", one)


@torch.no_grad()
def step() -> None:
    """One token in place: in a CUDA graph, so that the host's time is not in it."""
    copy, _ = ceilings()
    for B in (1, 32):
        scan, conv = Scan((B, 1, 4096, 16)), Convolution((B, 1, 4096, 4))
        h, past = torch.zeros(B, 4096, 16, device="cuda"), torch.zeros(B, 3, 4096, device="cuda", dtype=torch.bfloat16)
        x, dt, A, b, c, D, z, bias = scan.learned

        def scan_step(inputs: tuple = (x, dt, A, b, c, D, z), bias: Tensor = bias, h: Tensor = h) -> None:
            selective_scan_step(*inputs, state=h, dt_bias=bias, dt_softplus=True, backend="triton")

        def conv_step(inputs: list = conv.learned, past: Tensor = past) -> None:
            short_conv_step(*inputs, state=past, activation="silu", backend="triton")

        for case, call, state in ((scan, scan_step, h), (conv, conv_step, past)):
            call()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            floor = case.floor(copy, False) + 2e3 * state.numel() * state.element_size() / copy
            row(case, "step", "ms", do_bench(graph.replay, **MILLISECONDS), "", None, floor)


def cold() -> None:
    """The first forward and backward pass with an empty Triton cache, in a new process."""
    for kind in ("Scan((8, 2048, 4096, 16))", "Convolution((8, 2048, 4096, 4))"):
        script = f"from benchmarks.selective_scan import *; first_call({kind})"
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, "-c", script], env=os.environ | {"TRITON_CACHE_DIR": folder}, check=True)


def first_call(case: Case) -> None:
    torch.cuda.synchronize()
    start = time.perf_counter()
    case.both()()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    append("cold", case.name, " ".join(map(str, case.shape)), "bfloat16", "cold", "s", seconds)


SUITES = {"scan": scan, "varlen": varlen, "step": step, "conv": conv, "cold": cold}

if __name__ == "__main__":
    for suite in sys.argv[1:] or SUITES:
        SUITES[suite]()
