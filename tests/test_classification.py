"""Classes of DNA: the token that is scored, the data, the baselines, and runs of training.classify small enough for seconds."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_files import golden, write_repository
from datasets import ClassLabel, Dataset
from families import tiny_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from training import dna
from training.baselines import kmer_accuracy, majority_accuracy
from training.classify import classifier, train_and_test
from training.data import load_classes
from training.dna import MOTIFS, motif_order
from training.recipe import DataRecipe, Recipe, build

pytestmark = pytest.mark.usefixtures("data_cache")

PAD = 4


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A function that makes a small recipe on a few sequences, changed as the call says."""
    monkeypatch.setattr(dna, "SPLITS", {"train": 120, "validation": 40, "test": 40})
    fresh = {"model_type": "hyena", "hidden_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 128}

    def make(model=None, data=(), trainer=(), output="out", **rest):
        values = {
            "output_dir": str(tmp_path / output),
            "model": model or fresh | {"intermediate_size": 32, "filter_order": 8, "filter_emb_dim": 5},
            "data": {"path": "dna-motifs", "label": "label", "held_out": "validation", "test": "test", "sequence_length": 128},
            "tokenizer": {"alphabet": "dna"},
            "trainer": {"max_steps": 6, "per_device_train_batch_size": 16, "logging_steps": 1, "use_cpu": True},
        }
        values["data"] |= dict(data)
        values["trainer"] |= {"disable_tqdm": True, "learning_rate": 1e-2, **dict(trainer)}
        return build(Recipe, "recipe", values | rest)

    return make


# The token that is scored


@pytest.fixture(params=["ours", "hyenadna-hf"])
def model(request, tmp_path):
    """A classifier in float64: one of ours, and one opened from a repository of HyenaDNA's."""
    if request.param == "ours":
        return tiny_model("hyena-order3", head="ForSequenceClassification", pad_token_id=PAD, num_labels=3)
    config, weights, _ = golden("hyena-hf-score")
    folder = write_repository(tmp_path / "repository", config, weights)
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64)


def scores_and_gradients(model, batch: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    logits = torch.cat([model(x, attention_mask=mask, use_cache=False).logits for x, mask in batch])
    torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)) % 3).backward()
    return logits.detach(), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_real_token_is_scored_on_either_side_of_padding(model, side):
    """Rows of several lengths, one without padding: logits and gradients of each row alone. Float64, sums in another order."""
    lengths, longest = (5, 15, 1, 18), 18
    rows = [torch.randint(7, 12, (1, n), generator=torch.Generator().manual_seed(n)) for n in lengths]
    gaps = [(longest - n, 0) if side == "left" else (0, longest - n) for n in lengths]
    padded = torch.cat([torch.nn.functional.pad(row, gap, value=PAD) for row, gap in zip(rows, gaps, strict=True)])
    expected = scores_and_gradients(model, [(row, torch.ones_like(row)) for row in rows])
    found = scores_and_gradients(model, [(padded, (padded != PAD).long())])
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-10)
    assert len(found[1]) == len(expected[1]) > 10
    for gradient, alone in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(gradient, alone, rtol=0, atol=1e-9 * max(1, alone.abs().max().item()))


# Data and baselines


def test_the_order_of_the_motifs_is_all_that_tells_classes_apart(monkeypatch):
    monkeypatch.setattr(dna, "SPLITS", {"train": 600, "validation": 200, "test": 200})
    splits = {split: motif_order(split) for split in dna.SPLITS}
    assert splits["train"][:] == motif_order("train")[:]
    texts = [text for documents in splits.values() for text in documents["text"]]
    assert len(set(texts)) == len(texts) == 1000 and {len(text) for text in texts} == set(range(60, 101))
    for documents in splits.values():
        for text, label in zip(documents["text"], documents["label"], strict=True):
            assert all(text.count(motif) == 1 for motif in MOTIFS)
            assert (text.index(MOTIFS[0]) < text.index(MOTIFS[1])) == label
    # 200 coins: five standard deviations are 0.18
    assert kmer_accuracy(6, splits["train"], splits["test"]) == pytest.approx(0.5, abs=0.18)
    assert majority_accuracy(splits["train"], splits["test"]) == pytest.approx(0.5, abs=0.18)
    with pytest.raises(ValueError, match="'tests' of dna-motifs; wanted one of train"):
        motif_order("tests")


def test_a_bag_of_kmers_finds_what_composition_tells():
    """Naive Bayes by hand: three documents, p(k-mer | class) with one added to each count."""
    train = Dataset.from_dict({"text": ["AAAC", "AACA", "GGTG"], "label": [0, 0, 1]})
    held_out = Dataset.from_dict({"text": ["AAAA", "GTGG", "TTTTT", "CCAA"], "label": [0, 1, 1, 0]})
    # "TTTTT" has no k-mer of either class: the prior says 0
    assert kmer_accuracy(2, train, held_out) == 0.75
    assert majority_accuracy(train, held_out) == 0.5


def test_classes_are_numbered_by_name(tmp_path):
    texts = {"train": ["AC", "GG", "TT", "CA"], "validation": ["AA"], "test": ["CC"]}
    for split, of_split in texts.items():
        labels = ["promoter" if "A" in text else "junk" for text in of_split]
        Dataset.from_dict({"seq": of_split, "kind": labels}).to_parquet(tmp_path / "named" / f"{split}.parquet")
    columns = {"column": "seq", "label": "kind", "held_out": "validation", "test": "test"}
    splits, classes = load_classes(DataRecipe(path=str(tmp_path / "named"), **columns))
    assert classes == ["junk", "promoter"] and list(splits["train"]["label"]) == [1, 0, 0, 1]
    assert splits["held_out"][:] == {"text": ["AA"], "label": [1]} and splits["test"][:] == {"text": ["CC"], "label": [0]}
    features = Dataset.from_dict({"text": ["A", "C"], "label": [1, 0]}).cast_column("label", ClassLabel(names=["no", "yes"]))
    for split in texts:
        features.to_parquet(tmp_path / "typed" / f"{split}.parquet")
    _, classes = load_classes(DataRecipe(path=str(tmp_path / "typed"), label="label", held_out="validation", test="test"))
    assert classes == ["no", "yes"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"label": None}}, r"data: got label=None.*Set data\.label and data\.test"),
        ({"data": {"test": None}}, r"test=None.*Set data\.label and data\.test"),
        ({"data": {"label": "lable"}}, "Did you mean 'label'"),
        ({"tokenizer": {"alphabet": "rna"}}, "got 'rna'; wanted dna"),
        ({"tokenizer": {"alphabet": "dna", "vocab_size": 300}}, "wanted exactly one"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_errors_name_what_was_wanted(recipe, changes, message):
    with pytest.raises(ValueError, match=message):
        classifier(recipe(**changes))


def test_a_class_that_training_never_saw_is_an_error(tmp_path):
    for split, labels in {"train": [0, 1], "test": [0, 2]}.items():
        Dataset.from_dict({"text": ["A", "C"], "label": labels}).to_parquet(tmp_path / "c" / f"{split}.parquet")
    with pytest.raises(ValueError, match=r"the classes \[2\] in held_out; wanted those of the training documents, \[0, 1\]"):
        load_classes(DataRecipe(path=str(tmp_path / "c"), label="label", held_out="test", test="test"))


# Runs


def test_a_run_resumes_and_leaves_a_folder_that_the_auto_classes_open(recipe):
    def run(output, **trainer):
        changes = {"save_steps": 3, "eval_strategy": "steps", "eval_steps": 3, **trainer}
        metrics = train_and_test(recipe(trainer=changes, output=output))
        log = json.loads((Path(recipe(output=output).output_dir) / "trainer_state.json").read_text())["log_history"]
        return metrics, [entry["loss"] for entry in log if "loss" in entry]

    metrics, losses = run("whole")
    folder = Path(recipe(output="whole").output_dir)
    assert len(losses) == 6 and run("resumed", resume_from_checkpoint=str(folder / "checkpoint-3"))[1] == losses
    assert {"test_accuracy", "test_accuracy of majority", "test_accuracy of bag of 6-mers"} <= metrics.keys()
    assert json.loads((folder / "test_results.json").read_text())["test_accuracy"] == metrics["test_accuracy"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "accuracy" in (folder / "README.md").read_text()

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    documents, right = motif_order("test"), 0
    for text, label in zip(documents["text"], documents["label"], strict=True):  # one by one, without padding
        tokens = tokenizer(text, return_tensors="pt")["input_ids"]
        assert tokens.shape[1] == len(text) + 1
        right += model.eval()(tokens).logits.argmax(-1).item() == label
    assert right / len(documents) == metrics["test_accuracy"]


@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["full", "lora"])
def test_a_repository_of_hyenadna_is_fine_tuned(recipe, tmp_path, lora):
    """A language model: the head is new. Its layers learn, or with `lora` what is beside them."""
    config, weights, _ = golden("hyena-hf")
    repository = write_repository(tmp_path / "repository", config, weights)
    changes = {"model": {"checkpoint": str(repository)}, "data": {"sequence_length": config["max_seq_len"]}, "lora": lora}
    trainer, _, _ = classifier(recipe(**changes))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert trainer.model.config.id2label == {0: "0", 1: "1"}
    assert any("score" in name for name in changed) and any("implicit_filter" in name for name in changed)
    if lora is not None:
        assert all("lora_" in name or "score" in name for name in changed)
