"""Latency of a decoded token of a long convolution against its position, beside convolving the history anew.

python -m benchmarks.hyena_decode
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

from benchmarks import table
from hf_linear import ops

D, LONGEST, ANEW = 256, 1 << 16, 3  # ANEW: repeats of the convolution of the whole history


@torch.no_grad()
def main() -> None:
    h, skip = torch.randn(D, 2 * LONGEST) / LONGEST**0.5, torch.randn(D)
    rows, position = [], 1024
    while position < LONGEST:
        # From a full buffer through one doubling and every tile until the next.
        p, one = torch.randn(1, D, position), torch.randn(1, D)
        _, state = ops.long_conv(p, h)
        took = []
        for t in range(position, 2 * position):
            start = time.perf_counter()
            state = ops.long_conv_ahead(h, state, t)
            ops.long_conv_step(one, h, skip, one, state, t)
            took.append(1e3 * (time.perf_counter() - start))
        anew, history = [], state[..., :-1].contiguous()
        for _ in range(ANEW):
            start = time.perf_counter()
            ops.long_conv(one[..., None], h, skip, pre_gate=one[..., None], initial_state=history)
            anew.append(1e3 * (time.perf_counter() - start))
        position *= 2
        mean, worst, peer = sum(took) / len(took), max(took), sorted(anew)[ANEW // 2]
        rows.append((position, mean, worst, peer))
        for metric, value in (("mean", mean), ("worst", worst)):
            table.append("decode", "long_conv_step", f"1 {D} {position}", "float32", metric, "ms", value, "direct sum", peer)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    positions, *series = zip(*rows, strict=True)
    for values, label in zip(series, ("relaxed, mean", "relaxed, worst", "history anew"), strict=True):
        axes.loglog(positions, values, "o-", label=label, base=2)
    axes.set(xlabel="position", ylabel="ms a token", title=f"One long convolution, D = {D}, {table.device()}")
    axes.legend()
    figure.savefig(Path(__file__).with_name("hyena_decode.png"), dpi=150)


if __name__ == "__main__":
    main()
