"""Ops on a CPU: the chunked form against the token loop, and its cost against the length.

    python -m benchmarks.ops

Rows of suite "cpu". Ours and the peer take turns in one run; figures are medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.table import append
from hf_linear.ops import gated_linear_attention, linear_attention

B, H, K, V = 1, 4, 64, 64
LENGTHS = (1024, 2048, 4096, 8192, 16384)


def inputs(T: int, per_channel: bool) -> tuple[Tensor, ...]:
    q, k = torch.randn(B, T, H, K), torch.randn(B, T, H, K)
    g = torch.nn.functional.logsigmoid(torch.randn(B, T, H, K) if per_channel else torch.randn(B, T, H)) / 16
    return tuple(x.requires_grad_() for x in (q, k, torch.randn(B, T, H, V), g))


def forward_backward(op: Callable, T: int, backend: str, per_channel: bool) -> Callable[[], None]:
    arguments = inputs(T, per_channel)

    def call() -> None:
        o, state = op(*arguments, backend=backend)
        torch.autograd.grad(o.sum() + state.sum(), arguments)

    return call


def milliseconds(calls: list[Callable[[], None]], repeats: int) -> list[float]:
    """Median time of each call, the calls taking turns so that all meet the same machine.

    Each goes twice and is timed the second time: what the change of size or of kind costs the allocator is nobody's.
    """
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, into in zip(calls, times, strict=True):
            call()
            start = time.perf_counter()
            call()
            into.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(into) for into in times]


def main() -> None:
    cases = {"gla": (gated_linear_attention, True), "linear_attention_per_token": (linear_attention, False)}
    for case, (op, per_channel) in cases.items():
        calls = [forward_backward(op, 2048, backend, per_channel) for backend in ("chunked", "reference")]
        ours, loop = milliseconds(calls, repeats=15)
        append("cpu", case, f"{B} 2048 {H} {K} {V}", "float32", "fwd+bwd", "ms", ours, "token loop", loop)
    for case, (op, per_channel) in cases.items():
        calls = [forward_backward(op, T, "chunked", per_channel) for T in LENGTHS]
        times = milliseconds(calls, repeats=9)
        for T, ours in zip(LENGTHS, times, strict=True):
            proportional = times[0] * T / LENGTHS[0]
            append("cpu", case, f"{B} {T} {H} {K} {V}", "float32", "fwd+bwd", "ms", ours, "linear from T=1024", proportional)


if __name__ == "__main__":
    main()
