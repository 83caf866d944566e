"""Checkpoints on disk for the tests: golden ones, ones that are written, and ones that are changed.

tests/golden holds small random weights in each layout and what the originals' own code made of them: tests/make_golden_*.py.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

GOLDEN = Path(__file__).parent / "golden"
NAME = "model.safetensors"
# Logits of order 1 after two to eight layers in float32: two implementations that both are right differ by a few 1e-6 at most.
TOLERANCE = 1e-5


def golden(name: str) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    """The config and the weights in one layout, and the ids and what the original made of them."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    made = load_file(GOLDEN / f"{name}.safetensors")
    weights = {key.removeprefix("weights."): made.pop(key) for key in list(made) if key.startswith("weights.")}
    return config, weights, made


def write_repository(folder: Path, config: dict, weights: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / NAME, metadata={"format": "pt"})
    return folder


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / NAME)


def change(folder: Path, key: str, x: Tensor | None) -> Path:
    """Replace a tensor of a checkpoint, or with None leave it out."""
    weights = {**weights_of(folder), key: x}
    save_file({key: x for key, x in weights.items() if x is not None}, folder / NAME, metadata={"format": "pt"})
    return folder


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")))
    tokenizer.save_pretrained(folder)
    return tokenizer


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """The same keys and bits."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def close(a: Tensor, b: Tensor) -> bool:
    """Logits of one shape and dtype that two implementations may have."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=TOLERANCE)


def far(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()
