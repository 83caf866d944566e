"""The loss curve of a run: training and held-out loss against tokens."""

import math
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

TRAINING, HELD_OUT = "#4477aa", "#cc3311"  # told apart by every eye
COLORS = ("#4477aa", "#cc3311", "#228833", "#aa7700", "#aa3377")


def plot_accuracy(log_history: list[dict], baselines: dict[str, float], path: str | Path) -> None:
    """Draws a classifier's training loss and, on the held-out documents, its accuracy beside that of `baselines`."""
    losses, accuracies = (
        [(log["step"], log[name]) for log in log_history if name in log] for name in ("loss", "eval_accuracy")
    )
    left, right = Figure(figsize=(10, 4), layout="constrained").subplots(1, 2)
    if losses:
        left.plot(*zip(*losses, strict=True), color=TRAINING, linewidth=1.2)
    left.set(xlabel="step", ylabel="training loss (nats)", ylim=(0, None))
    right.plot(
        *zip(*accuracies, strict=True), color=HELD_OUT, marker="o", markersize=4, label=f"model: {accuracies[-1][1]:.1%}"
    )
    for (name, accuracy), style in zip(baselines.items(), ("--", ":"), strict=False):
        right.axhline(accuracy, color="black", linestyle=style, linewidth=1.2, label=f"{name}: {accuracy:.1%}")
    right.set(xlabel="step", ylabel="held-out accuracy", ylim=(min(0.4, *baselines.values()), 1.02))
    right.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.figure.savefig(path, dpi=150)


def plot_losses(log_history: list[dict], path: str | Path) -> None:
    """Draws Trainer's log. Bits per byte stand on the right: for one tokenizer they are the loss in another unit."""
    training = [(log["num_input_tokens_seen"], log["loss"]) for log in log_history if "loss" in log]
    held_out = [
        (log["num_input_tokens_seen"], math.log(log["eval_perplexity"]), log["eval_bits_per_byte"])
        for log in log_history
        if "eval_perplexity" in log
    ]
    tokens, losses, bits = zip(*held_out, strict=True)
    bits_per_nat = bits[-1] / losses[-1]

    axes = Figure(figsize=(8, 4.5), layout="constrained").subplots()
    if training:
        axes.plot(*zip(*training, strict=True), color=TRAINING, linewidth=1.2, label="training")
    axes.plot(
        tokens, losses, color=HELD_OUT, linestyle=":", marker="o", markersize=5, label=f"held out: {bits[-1]:.2f} bits per byte"
    )
    axes.set(xlabel="training tokens", ylabel="loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    scale = axes.secondary_yaxis("right", functions=(lambda nats: nats * bits_per_nat, lambda bits: bits / bits_per_nat))
    scale.set_ylabel("held out (bits per byte)")
    axes.figure.savefig(path, dpi=150)


def plot_hybrids(runs: list, path: str | Path) -> None:
    """A panel a task: the figure of each pattern, written beside it, against its attention layers, a color a linear mixer."""
    tasks = sorted({run.task for run in runs})
    panels = Figure(figsize=(6 * len(tasks), 4.5), layout="constrained").subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        of_task = [run for run in runs if run.task == task]
        colors = dict(zip(sorted({linear_letter(run.pattern) for run in of_task}), COLORS, strict=False))
        for run in of_task:
            at, color = (sum(letter in "AS" for letter in run.pattern), run.value), colors[linear_letter(run.pattern)]
            axes.plot(*at, "o", color=color, markersize=5)
            axes.annotate(run.pattern, at, (5, 3), textcoords="offset points", fontsize=7, color=color)
        axes.set(xlabel="attention layers", ylabel=of_task[0].metric, title=task)
        axes.margins(x=0.18)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].figure.savefig(path, dpi=150)


def linear_letter(pattern: str) -> str:
    """The first letter of a pattern that is not attention; A for attention alone."""
    return next((letter for letter in pattern if letter not in "AS"), "A")
