"""results.csv: one row a figure, with the machine, the versions and the commit it was measured on."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

PATH = Path(__file__).parent / "results.csv"
COLUMNS = ["suite", "case", "shape", "dtype", "metric", "unit", "ours", "peer", "peer_value", "ratio", "roofline"]
COLUMNS += ["device", "torch", "triton", "commit", "date"]


def append(
    suite: str,
    case: str,
    shape: str,
    dtype: str,
    metric: str,
    unit: str,
    ours: float,
    peer: str = "",
    peer_value: float | None = None,
    roofline: float | None = None,
    lower_is_better: bool = True,
) -> None:
    """Write one row; without a peer's value it has no ratio.

    `ratio` comes out above 1 where ours is better; `roofline` is the fraction of the floor reached."""
    ratio = None
    if peer_value is not None:
        ratio = peer_value / ours if lower_is_better else ours / peer_value
    row = {
        "suite": suite,
        "case": case,
        "shape": shape,
        "dtype": dtype,
        "metric": metric,
        "unit": unit,
        "ours": f"{ours:.4g}",
        "peer": peer,
        "peer_value": "" if peer_value is None else f"{peer_value:.4g}",
        "ratio": "" if ratio is None else f"{ratio:.3g}",
        "roofline": "" if roofline is None else f"{roofline:.3g}",
        "device": device(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    fresh = not PATH.exists()
    with PATH.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)
    print(
        f"{case:32} {shape:18} {metric:8} ours {ours:10.4g} {unit:4} {peer} {row['peer_value']:>10} {row['ratio']:>6}",
        flush=True,
    )


def device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


def commit() -> str:
    """The commit the figures belong to, marked where the working tree differs from it in code.

    On a machine that has the files but not their history the environment says it, HF_LINEAR_COMMIT.
    """
    if name := os.environ.get("HF_LINEAR_COMMIT"):
        return name
    git = ["git", "-C", str(PATH.parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "../hf_linear"], capture_output=True, text=True, check=True)
    return head + ("+" if changed.stdout.strip() else "")
