"""Compare hybrids by ratio and placement of their attention layers: the same data, steps and shape, another pattern.

    python -m training.compare RECIPE.yaml [section.key=value ...] --patterns GGGGGGGG GGGAGGGA GAGAGAGA
    python -m training.compare --plot docs/hybrids.png docs/hybrids.csv

Every run is a process of its own, `training.recall` or `training.pretrain` as the recipe's data say, in a folder of its own
under the recipe's output_dir; one whose figures are there already is not repeated. The table is printed, the best learning
rate of a pattern alone, and written beside the runs as results.csv, all of it.
"""

import csv
import json
import os
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from hf_linear.version import __version__
from training.plot import plot_hybrids
from training.recipe import Recipe, load_recipe

METRICS = {"eval_accuracy": "recall", "eval_bits_per_byte": "bits per byte"}  # more is better, less is better


@dataclass(frozen=True)
class Run:
    """One row of the table."""

    task: str
    pattern: str
    learning_rate: float
    metric: str
    value: float
    parameters: int
    tokens: int
    device: str
    versions: str

    @property
    def rank(self) -> float:
        """The less, the better, which goes for both metrics."""
        return -self.value if self.metric == "recall" else self.value


def compare(path: str, patterns: list[str], rates: list[float], jobs: int, overrides: list[str]) -> list[Run]:
    recipe = load_recipe(path, overrides)
    rates = rates or [recipe.trainer["learning_rate"]]
    todo = [(pattern, rate) for pattern in patterns for rate in rates]
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(todo), desc=Path(path).stem, unit="run") as bar:
        started = [pool.submit(train, path, recipe, *one, overrides, max(1, (os.cpu_count() or 1) // jobs)) for one in todo]
        for done in as_completed(started):
            done.result()
            bar.update()
    return [read(path, recipe, *one) for one in todo]


def folder_of(recipe: Recipe, pattern: str, rate: float) -> Path:
    return Path(recipe.output_dir) / f"{pattern}-{rate:g}"


def train(path: str, recipe: Recipe, pattern: str, rate: float, overrides: list[str], threads: int) -> None:
    folder = folder_of(recipe, pattern, rate)
    if (folder / "eval_results.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    module = "recall" if recipe.data.path == "mqar" else "pretrain"
    own = [f"model.pattern={pattern}", f"trainer.learning_rate={rate}", f"output_dir={folder}"]
    with (folder / "log.txt").open("w") as log:
        command = [sys.executable, "-m", f"training.{module}", path, *overrides, *own]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}  # runs that share all cores wait for each other
        if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode:
            raise RuntimeError(f"the run of {pattern} at {rate:g} stopped: {folder}/log.txt says why")


def read(path: str, recipe: Recipe, pattern: str, rate: float) -> Run:
    folder = folder_of(recipe, pattern, rate)
    figures = json.loads((folder / "eval_results.json").read_text())
    name, metric = next((name, metric) for name, metric in METRICS.items() if name in figures)
    parameters = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="meta").num_parameters()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = f"hf_linear {__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    tokens = figures["num_input_tokens_seen"]
    return Run(Path(path).stem, pattern, rate, metric, figures[name], parameters, tokens, device, versions)


def best(runs: Iterable[Run]) -> list[Run]:
    """Of each pattern of each task, the run with the best learning rate."""
    chosen: dict[tuple[str, str], Run] = {}
    for run in sorted(runs, key=lambda run: run.rank):
        chosen.setdefault((run.task, run.pattern), run)
    return list(chosen.values())


def write(runs: list[Run], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Run)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(run) for run in runs)


def read_table(paths: Iterable[str]) -> list[Run]:
    numbers = {"learning_rate": float, "value": float, "parameters": int, "tokens": int}
    rows = [row for path in paths for row in csv.DictReader(Path(path).read_text().splitlines())]
    return [Run(**{name: numbers.get(name, str)(value) for name, value in row.items()}) for row in rows]


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a YAML file; with --plot a table of results")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the recipe")
    parser.add_argument("--patterns", nargs="+", help="letters of linear_hybrid")
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[], help="each pattern is trained at each")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument(
        "--plot", metavar="FILE.png", help="draw tables of results, given in the recipe's place, and train nothing"
    )
    args = parser.parse_intermixed_args()
    if args.plot:
        return plot_hybrids(best(read_table([args.recipe, *args.overrides])), args.plot)
    if not args.patterns:
        parser.error("got no --patterns; wanted letters of linear_hybrid, such as GGGGGGGG GGGA")
    runs = compare(args.recipe, args.patterns, args.learning_rates, args.jobs, args.overrides)
    table = Path(load_recipe(args.recipe, args.overrides).output_dir) / "results.csv"
    write(runs, table)
    print(f"{'pattern':<20}{'learning rate':>14}{'parameters':>14}{runs[0].metric:>16}")
    for run in best(runs):
        print(f"{run.pattern:<20}{run.learning_rate:>14g}{run.parameters:>14,}{run.value:>16.3f}")
    print(f"all {len(runs)} runs: {table}")


if __name__ == "__main__":
    main()
