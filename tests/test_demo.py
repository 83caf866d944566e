"""The demo, on a budget of seconds, and the plain baselines that it stands beside."""

import gzip
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from training.baselines import compressor_bits_per_byte, ngram_bits_per_byte
from training.demo import RECIPE, StopAfter, bytes_after, steps_in
from training.pretrain import pretrainer
from training.recipe import load_recipe

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "training").glob("*.py"))


@pytest.fixture
def overrides(tmp_path):
    """The demo's own recipe, made small."""
    return [
        f"output_dir={tmp_path}/run",
        "model.hidden_size=32",
        "model.num_heads=2",
        "data.path=text",
        f"data.data_files={ROOT}/training/*.py",
        "data.held_out=3",
        "data.sequence_length=128",
        "tokenizer.vocab_size=400",
        "trainer.warmup_steps=0",
    ]


def test_the_demo_runs_from_end_to_end(overrides, tmp_path):
    out = subprocess.run(
        [sys.executable, "-m", "training.demo", *overrides, "trainer.max_steps=6"],
        cwd=ROOT,
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr[-4000:]
    assert "6/6" in out.stderr  # the progress bar
    assert (tmp_path / "run" / "loss.png").exists()

    bits = {name: float(figure) for name, figure in re.findall(r"^(\w.*?) {2,}(\d+\.\d\d)$", out.stdout, re.M)}
    held_out = Dataset.from_dict({"text": [path.read_text() for path in SOURCES[:3]]})
    assert bits["the model after training"] < bits["the model before training"]
    assert bits["gzip -9, file by file"] == round(compressor_bits_per_byte(gzip.compress, held_out), 2)
    assert "def main():" in out.stdout

    state = re.findall(r"^(\w.*?) {2,}([\d,]+) +([\d,]+) +([\d,]+)$", out.stdout, re.M)
    hybrid, recurrent, transformer = ([int(n.replace(",", "")) for n in row[1:]] for row in state)
    keys_and_values = [2 * 32 * 4 * tokens for tokens in (2**10, 2**15, 2**20)]  # 32 channels of float32 in a layer
    assert transformer == [4 * layer for layer in keys_and_values]
    assert len(set(recurrent)) == 1  # a fixed size, whatever the length
    assert hybrid == [layer + recurrent[0] * 3 // 4 for layer in keys_and_values]


def test_measuring_the_speed_changes_no_weight(overrides):
    trainer = pretrainer(load_recipe(RECIPE, overrides))
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    assert steps_in(0.1, trainer) >= 1
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    assert all(weight.grad is None for weight in trainer.model.parameters())


def test_a_busy_machine_ends_the_run(overrides):
    trainer = pretrainer(load_recipe(RECIPE, [*overrides, "trainer.max_steps=50", "trainer.eval_on_start=false"]))
    trainer.add_callback(StopAfter(minutes=0))
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("pattern", ["GA", "GRLA"])
def test_state_is_what_a_real_cache_holds(pattern):
    config = AutoConfig.for_model(
        "linear_hybrid", pattern=pattern, hidden_size=32, num_hidden_layers=4, num_heads=2, vocab_size=50
    )
    cache = AutoModelForCausalLM.from_config(config)(torch.zeros(1, 40, dtype=torch.long), use_cache=True).past_key_values
    held = []
    for layer in cache.layers:
        held += layer.states.values() if hasattr(layer, "states") else [layer.keys, layer.values]
    assert bytes_after(config, 40) == sum(tensor.nbytes for tensor in held)


def test_bytes_per_bit_of_compressors_counts_every_file():
    documents = Dataset.from_dict({"text": ["é" * 10, "abc"]})
    assert compressor_bits_per_byte(lambda text: text, documents) == 8
    assert compressor_bits_per_byte(lambda text: text + b"1234567", documents) == 8 * (23 + 14) / 23


def test_ngram_is_witten_bell():
    """Against the recursion written down byte by byte."""
    train, held_out = ["abracadabra", "a cadabra é"], ["abra", "cad x"]

    def counts(context):
        return Counter(
            padded[i]
            for text in train
            for padded in [bytes(8) + text.encode()]
            for i in range(8, len(padded))
            if padded[i - len(context) : i] == context
        )

    def probability(byte, context):
        if context is None:
            return 1 / 256
        seen = counts(context)
        shorter = probability(byte, context[1:] if context else None)
        if not seen:
            return shorter
        return (seen[byte] + len(seen) * shorter) / (seen.total() + len(seen))

    for order in (1, 2, 3):
        bits = []
        for text in held_out:
            padded = bytes(order - 1) + text.encode()
            for i in range(order - 1, len(padded)):
                bits.append(-math.log2(probability(padded[i], padded[i - order + 1 : i])))
        expected = sum(bits) / len(bits)
        figure = ngram_bits_per_byte(order, Dataset.from_dict({"text": train}), Dataset.from_dict({"text": held_out}))
        assert figure == pytest.approx(expected, rel=1e-12)
