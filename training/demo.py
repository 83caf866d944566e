"""Trains a small hybrid on the Python source of this machine's standard library, then reopens it in a new process.

    python -m training.demo [section.key=value ...]

It needs nothing but Python and this package. The values replace those of recipes/demo.yaml; with trainer.max_steps the
number of steps is yours, without it the speed of this machine decides how many fit into three minutes.
"""

import gzip
import json
import lzma
import platform
import subprocess
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from itertools import islice
from pathlib import Path

import datasets
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    set_seed,
)

from hf_linear.cache import CACHE_NAME, cache_bytes
from training.baselines import compressor_bits_per_byte, ngram_bits_per_byte
from training.data import count_bytes, load_documents
from training.evaluate import evaluate
from training.pretrain import new_model, pretrainer
from training.recipe import Recipe, load_recipe
from training.run import train

RECIPE = Path(__file__).parent / "recipes" / "demo.yaml"
MINUTES = 2.5  # of forward and backward passes; the optimizer and the evaluations add a third
NGRAM = 6  # bytes: of the orders 1 to 7 the best but for a hair, and quick
PROMPT = 'import os\nimport sys\n\n\ndef main():\n    """'


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--reopen", action="store_true", help="train nothing: open the saved folder and print its figures")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of recipes/demo.yaml")
    args = parser.parse_args()
    recipe = load_recipe(RECIPE, args.overrides)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    if args.reopen:
        reopen(recipe)
    else:
        train_from_scratch(recipe)
        subprocess.run([sys.executable, "-m", "training.demo", "--reopen", *args.overrides], check=True)


def train_from_scratch(recipe: Recipe) -> None:
    say(f"1. The corpus: {recipe.data.path} (Python {platform.python_version()}), split by file")
    trainer = pretrainer(recipe)
    model, tokenizer = trainer.model, trainer.processing_class
    print(f"{len(trainer.train_dataset)} rows of at most {recipe.data.sequence_length} tokens to train on")
    print(f"{len(trainer.eval_dataset)} rows of other files held out")
    print(f"{len(tokenizer)} tokens in the vocabulary, a byte-level BPE trained on the training files")

    say(f"2. The model: {type(model).__name__}, {model.num_parameters():,} parameters")
    print(", ".join(f"{key} {value}" for key, value in recipe.model.items()))
    if "max_steps" not in recipe.trainer:
        trainer.args.max_steps = steps_in(MINUTES, trainer)
        trainer.add_callback(StopAfter(MINUTES + 1))

    say(f"3. Training: {trainer.args.max_steps} steps")
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressWithLoss)
    train(trainer)
    print(f"saved in {recipe.output_dir}, with the loss curve in {recipe.output_dir}/loss.png")


class ProgressWithLoss(ProgressCallback):
    """Keeps the loss in the bar, where Trainer's own prints a line for each log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.2f}")


class StopAfter(TrainerCallback):
    """Ends a run on a machine that became busy after its speed was measured."""

    def __init__(self, minutes: float):
        self.seconds, self.start = 60 * minutes, None

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = self.start or time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= time.perf_counter() - self.start > self.seconds


def steps_in(minutes: float, trainer: Trainer) -> int:
    """How many training steps this machine makes in so many minutes. The weights stay as they are."""
    warm_up, timed = 3, 10
    for i, row in enumerate(islice(trainer.get_train_dataloader(), warm_up + timed)):
        if i == warm_up:
            start = time.perf_counter()
        trainer.model(**row).loss.backward()
        trainer.model.zero_grad()
    return round(60 * minutes * timed / (time.perf_counter() - start))


def reopen(recipe: Recipe) -> None:
    folder = Path(recipe.output_dir)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    say(f"4. A new process opened {folder} through the Auto classes: {type(model).__name__}")

    train_documents, held_out = load_documents(recipe.data)
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    bits = {
        "the model before training": next(entry["eval_bits_per_byte"] for entry in log if "eval_bits_per_byte" in entry),
        "gzip -9, file by file": compressor_bits_per_byte(gzip.compress, held_out),
        "xz -9, file by file": compressor_bits_per_byte(lambda text: lzma.compress(text, preset=9), held_out),
        f"{NGRAM}-gram of bytes, same training files": ngram_bits_per_byte(NGRAM, train_documents, held_out),
        "the model after training": evaluate(model, tokenizer, held_out, recipe.data.sequence_length)["eval_bits_per_byte"],
    }
    say(f"5. Bits per byte of the {len(held_out)} held-out files ({count_bytes(held_out):,} bytes); less is better")
    for name, figure in bits.items():
        print(f"{name:<40}{figure:8.2f}")

    say("6. A sample: what the model writes after the prompt")
    print(sample(model, tokenizer, PROMPT))

    say("7. Bytes of state for one sequence in float32, counted in the cache itself")
    print(f"{'':<40}{'1K tokens':>16}{'32K tokens':>16}{'1M tokens':>16}")
    pattern = recipe.model["pattern"]
    for name, letters in {
        f"this model, {pattern}": pattern,
        "its shape, GLA alone": "G",
        "its shape, a Transformer": "A",
    }.items():
        recipe.model["pattern"] = letters
        print(f"{name:<40}" + "".join(f"{size:>16,}" for size in state_bytes(new_model(recipe, tokenizer).config)))


def state_bytes(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Bytes that a model keeps of a sequence in order to go on, at 1K, 32K and 1M tokens.

    The first two are read off the cache. A layer's share is constant or grows by so much a token, which gives the third.
    """
    at_1k, at_32k = bytes_after(config, 2**10), bytes_after(config, 2**15)
    a_token = (at_32k - at_1k) // (2**15 - 2**10)
    return at_1k, at_32k, at_32k + a_token * (2**20 - 2**15)


def bytes_after(config: PreTrainedConfig, tokens: int) -> int:
    with torch.device("meta"), torch.no_grad():  # shapes without numbers: no memory, no arithmetic
        model = AutoModelForCausalLM.from_config(config)
        return cache_bytes(model(torch.zeros(1, tokens, dtype=torch.long), use_cache=True, logits_to_keep=1)[CACHE_NAME])


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    set_seed(0)
    ids = tokenizer(prompt, return_tensors="pt").to(model.device)
    new = model.generate(**ids, max_new_tokens=200, do_sample=True, temperature=0.7, top_p=0.95)
    return tokenizer.decode(new[0], skip_special_tokens=True)


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    main()
