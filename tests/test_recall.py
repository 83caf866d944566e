"""Associative recall: the task itself, a run on it, and a comparison of patterns by it."""

import csv
from pathlib import Path

import pytest
import torch

from training import compare, recall
from training.mqar import SPLITS, associative_recall
from training.recipe import Recipe, build, load_recipe
from training.run import train

RECIPES = Path(__file__).parents[1] / "training" / "recipes"
SMALL = {"model_type": "linear_hybrid", "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2, "vocab_size": 32}


@pytest.fixture(autouse=True)
def few_documents(monkeypatch):
    monkeypatch.setattr("training.mqar.SPLITS", dict.fromkeys(SPLITS, 50))


def test_every_key_is_asked_for_once_and_its_value_is_the_label():
    pairs, length, vocab = 6, 40, 64
    for row in associative_recall("train", pairs, length, vocab):
        ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
        value_of = dict(zip(ids[: 2 * pairs : 2], ids[1 : 2 * pairs : 2], strict=True))
        assert len(value_of) == len(set(value_of.values())) == pairs
        assert all(0 < key < vocab // 2 for key in value_of) and all(vocab // 2 <= v < vocab for v in value_of.values())
        asked = [t for t in range(length) if labels[t] != -100]
        assert sorted(ids[t - 1] for t in asked) == sorted(value_of)
        assert all(labels[t] == ids[t] == value_of[ids[t - 1]] for t in asked) and min(asked) > 2 * pairs
        assert sum(x != 0 for x in ids) == 4 * pairs


def test_documents_are_the_same_in_every_run_and_others_in_every_split():
    first, again, other = (torch.stack(list(associative_recall(s, 4, 32, 64)["input_ids"])) for s in ("train", "train", "test"))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_keys_are_mostly_asked_for_soon():
    labels = torch.stack(list(associative_recall("train", 4, 216, 64)["labels"]))
    places = (labels != -100).nonzero()[:, 1]
    assert places.float().median() < 8 + (216 - 8) / 4  # evenly drawn, half of them would come after the middle


@pytest.mark.parametrize("pairs, length, vocab", [(0, 32, 64), (9, 32, 64), (16, 64, 32)])
def test_impossible_documents_are_refused(pairs, length, vocab):
    with pytest.raises(ValueError, match=r"data\.pairs: got .*; wanted .*Change"):
        associative_recall("train", pairs, length, vocab)


def test_accuracy_counts_the_values_alone():
    labels = torch.tensor([[-100, -100, 3, -100, 1], [-100, -100, -100, 2, -100]])
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 3, 0, 2, 0], [0, 0, 2, 0, 0]]), 4).float()
    assert recall.found_and_asked(logits, labels).tolist() == [[1, 2], [1, 1]]


def recipe(folder, **data):
    data = {"path": "mqar", "pairs": 3, "held_out": "validation", "sequence_length": 16, **data}
    trainer = {"max_steps": 2, "per_device_train_batch_size": 4, "eval_strategy": "steps", "eval_steps": 1, "use_cpu": True}
    model = {**SMALL, "pattern": "GA"}
    return build(Recipe, "recipe", {"output_dir": str(folder), "model": model, "data": data, "trainer": trainer})


def test_a_run_leaves_its_accuracy_and_a_plot(tmp_path):
    metrics = train(recall.recaller(recipe(tmp_path)), plot=lambda log, path: recall.plot_accuracy(log, {"guess": 1 / 3}, path))
    assert 0 <= metrics["eval_accuracy"] <= 1
    assert (tmp_path / "loss.png").exists() and (tmp_path / "eval_results.json").exists()


def test_other_data_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data: got path='text', .*; wanted the path mqar"):
        recall.recaller(recipe(tmp_path, path="text"))


def test_patterns_are_compared_once_each(tmp_path, monkeypatch, capsys):
    """Two patterns, of which one has its figures already; the table holds both, best first, and becomes a plot."""
    small = [f"model.{key}={value}" for key, value in SMALL.items() if key != "model_type"]
    small += ["data.pairs=3", "data.sequence_length=16", "trainer.max_steps=1", "trainer.use_cpu=true", "trainer.eval_steps=1"]
    overrides = [*small, f"output_dir={tmp_path}", "trainer.per_device_train_batch_size=2", "trainer.save_strategy=no"]
    path = RECIPES / "compare-recall.yaml"
    ready = load_recipe(path, [*overrides, "model.pattern=GG", f"output_dir={tmp_path / 'GG-0.01'}"])
    train(recall.recaller(ready), plot=lambda log, path: None)
    arguments = [str(path), *overrides, "--patterns", "GG", "GA", "--learning-rates", "0.01"]
    monkeypatch.setattr("sys.argv", ["compare", *arguments])
    compare.main()
    assert not (tmp_path / "GG-0.01" / "log.txt").exists() and (tmp_path / "GA-0.01" / "log.txt").exists()
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["pattern"] for row in rows] == ["GG", "GA"] and all(row["metric"] == "recall" for row in rows)
    assert "GA" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["compare", "--plot", str(tmp_path / "plot.png"), str(tmp_path / "results.csv")])
    compare.main()
    assert (tmp_path / "plot.png").stat().st_size > 0
