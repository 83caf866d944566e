"""The loss curve of a run: training and held-out loss against tokens."""

import math
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

TRAINING, HELD_OUT = "#4477aa", "#cc3311"  # told apart by every eye


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
