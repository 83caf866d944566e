"""Draws results.csv: the kernels under the roof of the card, and beside flash SDPA by length; the long convolution too.

    python -m benchmarks.roofline

Where a figure was measured more than once, its last row counts.
"""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.table import PATH

COPY, PRODUCT = 2.97e12, 699e12  # bytes and bfloat16 operations a second of the H100 in docs/kernels.md
OPS = {
    "gla": ("GLA", "#4477aa", "o"),
    "retention": ("retention", "#cc3311", "s"),
    "linear_attention": ("no decay", "#228833", "^"),
    "linear_attention_per_token": ("decay a token", "#aa3377", "D"),
}
Row = dict[str, str]


def last_rows(metric: str, kind: str) -> dict[tuple[str, str], Row]:
    """The last GPU row of every case and shape: beside SDPA for kind "sdpa", of the op alone or beside fla for kind "op"."""
    with PATH.open() as file:
        rows = [row for row in csv.DictReader(file) if row["suite"] == "ops" and row["metric"] == metric and row["case"] in OPS]
    wanted = [row for row in rows if (row["peer"] == "sdpa") == (kind == "sdpa") and row["peer"] != "one document"]
    return {(row["case"], row["shape"]): row for row in wanted}


def cost(case: str, shape: str) -> tuple[float, float]:
    """Operations and bytes of a forward pass in bfloat16, chunks of 64 tokens, every tensor moved once."""
    B, T, H, K, V = map(int, shape.split())
    decay = {"gla": 4 * K, "linear_attention_per_token": 4}.get(case, 0)
    return 2 * B * T * H * (64 * (K + V) + 2 * K * V), B * T * H * (2 * (2 * K + 2 * V) + decay)


def draw_roofline(path: Path) -> None:
    rows = last_rows("fwd", "op")
    figure = Figure(figsize=(11, 5), layout="constrained")
    roof, bars = figure.subplots(1, 2, width_ratios=(1, 1.15))
    ridge = PRODUCT / COPY
    roof.plot([20, ridge, 2000], [20 * COPY / 1e12, PRODUCT / 1e12, PRODUCT / 1e12], color="black", linewidth=1.2)
    roof.annotate(f"{COPY / 1e12:.2f} TB/s", (48, 54 * COPY / 1e12), rotation=49, ha="center", va="bottom", fontsize=9)
    roof.annotate(f"{PRODUCT / 1e12:.0f} TFLOP/s", (1900, PRODUCT / 1e12 * 1.03), ha="right", va="bottom", fontsize=9)
    for (case, shape), row in rows.items():
        flops, moved = cost(case, shape)
        style = {"color": OPS[case][1], "marker": OPS[case][2], "markersize": 7}
        roof.plot(flops / moved, flops / float(row["ours"]) / 1e9, **style)
        if row["peer_value"]:
            roof.plot(flops / moved, flops / float(row["peer_value"]) / 1e9, fillstyle="none", **style)
    with_peer = any(row["peer_value"] for row in rows.values())
    for name, color, marker in OPS.values():
        roof.plot([], [], marker, color=color, label=name)
    if with_peer:
        roof.plot([], [], "o", color="gray", fillstyle="none", label="fla")
    roof.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TFLOP/s", title="forward, bfloat16, one H100")
    roof.minorticks_off()
    roof.set_xticks([20, 50, 100, 200, 500, 1000], ["20", "50", "100", "200", "500", "1000"])
    roof.set_yticks([20, 50, 100, 200, 500], ["20", "50", "100", "200", "500"])
    roof.grid(alpha=0.3)
    roof.legend(frameon=False, loc="lower right")

    order = sorted(rows.items(), key=lambda item: (list(OPS).index(item[0][0]), [int(n) for n in item[0][1].split()]))
    for y, ((case, _), row) in enumerate(reversed(order)):
        fraction = float(row["roofline"])
        bars.barh(y, fraction, color=OPS[case][1], height=0.7)
        if row["peer_value"]:
            bars.plot(fraction * float(row["ours"]) / float(row["peer_value"]), y, "k|", markersize=13, markeredgewidth=2)
    bars.set_yticks(range(len(order)), [f"{OPS[case][0]}  {shape}" for (case, shape), _ in reversed(order)], fontsize=9)
    bars.set(xlim=(0, 1), xlabel="fraction of the floor reached", title="B T H K V")
    if with_peer:
        bars.plot([], [], "k|", markersize=11, markeredgewidth=2, label="fla")
        bars.legend(frameon=False)
    save(figure, path)


def draw_crossover(path: Path) -> None:
    rows = last_rows("fwd+bwd", "sdpa")
    lines: dict[str, dict[int, float]] = {}
    for (case, shape), row in rows.items():
        B, T, *_ = map(int, shape.split())
        lines.setdefault(case, {})[T] = float(row["ours"]) * 32768 / (B * T)
        lines.setdefault("sdpa", {})[T] = float(row["peer_value"]) * 32768 / (B * T)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for case, points in lines.items():
        name, color, marker = OPS.get(case, ("causal flash SDPA", "black", "x"))
        axes.plot(*zip(*sorted(points.items()), strict=True), color=color, marker=marker, label=name)
    lengths = sorted(lines["sdpa"])
    axes.set(xscale="log", yscale="log", xlabel="tokens of a sequence", ylabel="ms per 32K tokens, forward + backward")
    axes.set_title("16 heads of 128, bfloat16, one H100")
    axes.set_xticks(lengths, [str(T) if T < 1024 else f"{T // 1024}K" for T in lengths])
    axes.minorticks_off()
    axes.set_yticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save(figure, path)


def draw_long_conv(path: Path) -> None:
    with PATH.open() as file:
        rows = [row for row in csv.DictReader(file) if (row["case"], row["peer"]) == ("long_conv", "sdpa")]
    lines: dict[str, dict[int, float]] = {"ours": {}, "peer_value": {}}
    for row in rows:
        B, _, T = map(int, row["shape"].split())
        for column, points in lines.items():
            points[T] = float(row[column]) * 2**17 / (B * T)
    if not rows:
        return
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*sorted(lines["ours"].items()), strict=True), color="#4477aa", marker="o", label="Hyena's long convolution")
    axes.plot(*zip(*sorted(lines["peer_value"].items()), strict=True), color="black", marker="x", label="causal flash SDPA")
    lengths = sorted(lines["ours"])
    axes.set(xscale="log", yscale="log", xlabel="tokens of a sequence", ylabel="ms per 128K tokens, forward + backward")
    axes.set_title("256 channels (2 heads of 128), bfloat16, one H100")
    axes.set_xticks(lengths, [f"{T // 2**10}K" if T < 2**20 else f"{T // 2**20}M" for T in lengths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    print(path.name)


if __name__ == "__main__":
    draw_roofline(PATH.with_name("roofline.png"))
    draw_crossover(PATH.with_name("crossover.png"))
    draw_long_conv(PATH.with_name("long_conv.png"))
