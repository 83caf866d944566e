"""Latency of a decoded token of a long convolution against its position, beside convolving the history anew.

    python -m benchmarks.hyena_decode [longest]

From a full state of P tokens to the next doubling there is one token that doubles, P / 2U tokens with a tile of each size
U = 32, 64, ..., P / 2, and all others have none. A kind of token takes the same time wherever it comes, so a few of each are
timed: the mean is that of the medians, weighted by how often each kind occurs, the worst is the slowest median. `longest` is
the last position; by default 1M on a GPU, 64K on a CPU.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks import table
from hf_linear import ops
from hf_linear.ops.long_conv_step import BLOCK

D, FIRST, REPEATS = 256, 1024, 5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def milliseconds(call: Callable[[], object], repeats: int = REPEATS) -> float:
    """The median, after one call that is not timed."""
    times = []
    for _ in range(repeats + 1):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def token_kinds(P: int) -> dict[int, int]:
    """How many of the tokens from P to 2 P - 1 have a tile of each size; of size P, the one that doubles, of size 0, none."""
    tiles = {U: P // (2 * U) for U in (1 << k for k in range(BLOCK.bit_length() - 1, P.bit_length() - 1))}
    return {P: 1, **tiles, 0: P - 1 - sum(tiles.values())}


def token_times(P: int, h: Tensor, skip: Tensor, one: Tensor) -> dict[int, float]:
    """The milliseconds of each kind of token, by the size of its tile as in `token_kinds`."""

    def token(state: Tensor, t: int) -> Tensor:
        state = ops.long_conv_ahead(h, state, t)
        ops.long_conv_step(one, h, skip, one, state, t)
        return state

    full = torch.randn(1, D, P, device=DEVICE)
    state = token(full, P)
    # The first token with a tile of U comes U after the doubling; one without any is in between.
    places = {U: U or BLOCK // 2 for U in token_kinds(P) if U != P}
    times = {U: milliseconds(partial(token, state, P + i)) for U, i in places.items()}
    return times | {P: milliseconds(partial(token, full, P))}


def time_anew(P: int, h: Tensor, skip: Tensor, one: Tensor) -> float:
    """The milliseconds of the same token by a sum over its whole history of P tokens."""
    history, x = torch.randn(1, D, P, device=DEVICE), one[..., None]
    return milliseconds(partial(ops.long_conv, x, h, skip, pre_gate=x, initial_state=history), repeats=3)


@torch.no_grad()
def main() -> None:
    longest = int(sys.argv[1]) if len(sys.argv) > 1 else (1 << 20 if DEVICE == "cuda" else 1 << 16)
    h = torch.randn(D, longest, device=DEVICE) / longest**0.5
    skip, one = torch.randn(D, device=DEVICE), torch.randn(1, D, device=DEVICE)
    rows, P = [], FIRST
    while longest > P:
        kinds, times = token_kinds(P), token_times(P, h, skip, one)
        mean, worst = sum(n * times[U] for U, n in kinds.items()) / P, max(times.values())
        P *= 2
        anew = time_anew(P - 1, h, skip, one)  # at the last token before the next doubling
        rows.append((P, mean, worst, anew))
        for metric, value in (("mean", mean), ("worst", worst)):
            table.append("decode", "long_conv_step", f"1 {D} {P}", "float32", metric, "ms", value, "direct sum", anew)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    positions, *series = zip(*rows, strict=True)
    for values, label in zip(series, ("relaxed, mean", "relaxed, worst", "history anew"), strict=True):
        axes.plot(positions, values, "o-", label=label)
    axes.set(xscale="log", yscale="log", xlabel="position", ylabel="ms a token")
    axes.set_title(f"One long convolution, D = {D}, {table.device()}")
    axes.set_xticks(positions, [f"{P // 1024}K" if P < 1 << 20 else f"{P >> 20}M" for P in positions])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(Path(__file__).with_name("hyena_decode.png"), dpi=150)


if __name__ == "__main__":
    main()
