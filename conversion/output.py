"""A converted model on disk: all of it or nothing, and proved to be what was read."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

Logits = Callable[[Tensor], Tensor]


def check_new(output: Path) -> None:
    if output.exists():
        raise FileExistsError(f"--output must not exist yet, got {output}: take another name, or remove it")


def importable(build: Callable[..., Logits], *arguments: Any) -> Logits | None:
    """The original as `build` makes it, where its library is here."""
    try:
        return build(*arguments)
    except ImportError as error:
        print(f"the original is not run beside ours: {error}")
        return None


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    output: Path,
    verify: bool,
    original: Logits | None = None,
) -> None:
    """Write to a folder beside `output` and rename it at the end, so that an interrupted conversion leaves no half of one."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        folder = Path(scratch) / output.name
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if verify:
            print(proof(folder, model, tokenizer, original))
        folder.rename(output)
    print(f"wrote {output}: AutoModelForCausalLM.from_pretrained({str(output)!r}) opens it")


@torch.no_grad()
def proof(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, original: Logits | None = None
) -> str:
    """Open what was written as a user does: the tensors must be those that were read, and the logits finite.

    The logits of `original`, in float32, are only compared: how near they are is for the reader to judge.
    """
    opened = AutoModelForCausalLM.from_pretrained(folder)
    read, found = model.state_dict(), opened.state_dict()
    differing = [key for key in read.keys() | found.keys() if key not in found or not torch.equal(read[key], found[key])]
    assert not differing, f"written and read again, these differ: {differing}"
    length = min(256, model.config.max_position_embeddings)
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    logits, expected = opened(ids).logits.float(), model(ids).logits.float()
    assert logits.isfinite().all(), f"logits of {length} random tokens are not finite"
    if tokenizer is not None:
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab(), "the tokenizer came back changed"
    difference = (logits - expected).abs().max().item()
    verified = f"verified: {len(read)} tensors as read, logits of {length} random tokens within {difference:.1e}"
    if original is None:
        return verified
    theirs = original(ids)
    difference = (opened.float()(ids).logits - theirs).abs().max().item()
    return f"{verified}; in float32 within {difference:.1e} of the original's, which are up to {theirs.abs().max():.1f} in size"
