"""Every family goes to a Hub and comes back, in the process that pushed it and in a fresh one, with the same logits.

huggingface_hub reads HF_ENDPOINT when it is imported. So the tests talk to no Hub: two processes do that are born with the
address of the local one, running `publish` and `fetch` below, and the tests look at what they report.
"""

import os
import re
import shlex
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import LocalHub
from huggingface_hub import ModelCard, upload_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from model_cards.generate import write_card

FAMILIES = {"gla": {}, "retnet": {}, "linear_attention": {}, "hyena": {}, "linear_hybrid": {"pattern": "GA"}}
AUTO_CLASSES = {"lm": AutoModelForCausalLM, "classifier": AutoModelForSequenceClassification}
PUSHED = [f"{family}/{head}" for family in FAMILIES for head in AUTO_CLASSES]
TRAINED, FOREIGN = "trained/lm", "foreign/lm"
README = Path(__file__).parents[1] / "README.md"
WORDS = ["[PAD]", "[UNK]", "the", "state", "of", "a", "linear", "model", "does", "not", "grow"]
TEXT = " ".join(WORDS[2:] * 8)  # 72 tokens: more than one chunk


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")


def make_model(repo: str) -> PreTrainedModel:
    """A small random model of the family and with the head that the repository's name tells."""
    family, head = repo.split("/")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2, "vocab_size": len(WORDS)}
    config = AutoConfig.for_model(family, **shape, **FAMILIES[family])
    return AUTO_CLASSES[head].from_config(config).eval()


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    return model(**tokenizer(TEXT, return_tensors="pt")).logits


def publish(folder: Path) -> dict[str, dict[str, Any]]:
    """Push every model with its tokenizer and card, then a trained one by Trainer, and open them all again."""
    from hf_linear.checkpoints.layout import save  # here and not above: in `fetch` the card has to import hf_linear

    tokenizer, report = make_tokenizer(), {}
    for repo in PUSHED:
        model, local = make_model(repo), folder / repo
        model.push_to_hub(repo)
        tokenizer.push_to_hub(repo)
        model.save_pretrained(local)
        tokenizer.save_pretrained(local)
        upload_file(path_or_fileobj=write_card(local, name=repo), path_in_repo="README.md", repo_id=repo)
        report[repo] = {"pushed_logits": logits_of(model, tokenizer)}
    model.push_to_hub(repo, commit_message="once more")  # must leave the card of the repository alone

    save(make_model("gla/lm"), folder / FOREIGN, "fla")
    AutoModelForCausalLM.from_pretrained(folder / FOREIGN).push_to_hub(FOREIGN)

    model, local = make_model("gla/lm").train(), folder / TRAINED
    tokens = tokenizer(TEXT)["input_ids"]
    arguments = TrainingArguments(str(local), max_steps=1, hub_model_id=TRAINED, report_to="none", use_cpu=True)
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": tokens, "labels": tokens}], processing_class=tokenizer)
    trainer.train()
    trainer.push_to_hub()
    card = write_card(local, name=TRAINED, overwrite=True)
    upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=TRAINED)
    report[TRAINED] = {"pushed_logits": logits_of(model.eval(), tokenizer)}

    for repo in report:
        auto_class = AUTO_CLASSES[repo.split("/")[1]]
        model, problems = auto_class.from_pretrained(repo, output_loading_info=True)
        report[repo]["loading_problems"] = {kind: list(keys) for kind, keys in problems.items() if keys}
        report[repo]["model_type"] = model.config.model_type
        report[repo]["logits"] = logits_of(model, AutoTokenizer.from_pretrained(repo))
    return report


def fetch(folder: Path) -> dict[str, dict[str, Any]]:
    """Open every repository as its card says: the code in it is run as it stands."""
    assert "hf_linear" not in sys.modules
    report = {}
    for repo in [*PUSHED, TRAINED]:
        (code,) = re.findall(r"```python\n(.*?)```", ModelCard.load(repo).text, re.DOTALL)
        user: dict[str, Any] = {}
        exec(code, user)
        model, tokenizer = user["model"], user["tokenizer"]
        report[repo] = {"model_type": model.config.model_type, "logits": logits_of(model, tokenizer)}
    return report


def in_fresh_process(step: str, hub: LocalHub, folder: Path) -> dict[str, dict[str, Any]]:
    environment = {**hub.environment(home=folder / f"{step}-home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, step, str(folder)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stderr
    return torch.load(folder / f"{step}.pt")


def test_every_model_comes_back_as_it_went(tmp_path):
    """One test and not one a model: a process costs seconds, and parallel test runners would start it once a worker."""
    with LocalHub() as hub:
        published = in_fresh_process("publish", hub, tmp_path)
        fetched = in_fresh_process("fetch", hub, tmp_path)
    assert hub.unknown_requests == []
    # What was read in another library's layout is pushed in ours.
    assert hub.repos[FOREIGN].head["model.safetensors"] == hub.repos["gla/lm"].head["model.safetensors"]
    for repo in [*PUSHED, TRAINED]:
        files, pushed = hub.repos[repo].head, published[repo]["pushed_logits"]
        assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(files), repo
        assert files["README.md"].decode() == (tmp_path / repo / "README.md").read_text(), repo
        assert pushed.isfinite().all(), repo
        assert published[repo]["loading_problems"] == {}, repo
        for opened in (published[repo], fetched[repo]):
            assert opened["model_type"] == ("gla" if repo == TRAINED else repo.split("/")[0])
            assert torch.equal(opened["logits"], pushed), repo


def test_upload_as_the_readme_has_it(tmp_path):
    import hf_linear  # noqa: F401  (as in `publish`)

    (line,) = re.findall(r"^hf upload .*$", README.read_text(), re.MULTILINE)
    _, _, repo, folder, *options = shlex.split(line)
    kept, left = tmp_path / folder, tmp_path / folder / "checkpoint-8"
    for files in (kept, left):
        make_model("gla/lm").save_pretrained(files)
    write_card(kept, name=repo)
    with LocalHub() as hub:
        command = [str(Path(sys.executable).with_name("hf")), "upload", repo, folder, *options]
        process = subprocess.run(
            command, cwd=tmp_path, env=hub.environment(tmp_path / "home"), capture_output=True, text=True, timeout=60
        )
        assert process.returncode == 0, process.stderr
    pushed = {path: content for path, content in hub.repos[repo].head.items() if path != ".gitattributes"}
    assert pushed == {file.name: file.read_bytes() for file in kept.iterdir() if file.is_file()}


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/api/models/gla/none", "RepoNotFound"),
        ("/gla/lm/resolve/none/config.json", "RevisionNotFound"),
        ("/gla/lm/resolve/main/none.json", "EntryNotFound"),
    ],
)
def test_local_hub_says_what_it_lacks(path, code):
    with LocalHub() as hub:
        hub.create_repo(b'{"organization": "gla", "name": "lm"}')
        connection = HTTPConnection("127.0.0.1", hub.server_port)
        connection.request("GET", path)
        response = connection.getresponse()
        connection.close()
    assert (response.status, response.headers["X-Error-Code"]) == (404, code)


if __name__ == "__main__":
    step, folder = sys.argv[1], Path(sys.argv[2])
    torch.save({"publish": publish, "fetch": fetch}[step](folder), folder / f"{step}.pt")
