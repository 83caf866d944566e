"""The face of every script, and a converted model on disk: all of it or nothing, and proved to be what was read."""

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_linear.checkpoints import layout as layouts

# What a tokenizer of Transformers is saved as, of whatever kind.
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*")
SHARD_SIZE = "1GB"  # the progress bar moves a shard at a time


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="the original's weights")
    parser.add_argument("--output", type=Path, required=True, help="a folder to be made")
    parser.add_argument("--verify", action="store_true", help="open the output and compare it with what was read")
    return parser


def check_absent(output: Path) -> None:
    if output.exists():
        raise FileExistsError(f"--output must not exist yet, got {output}: take another name, or remove it")


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | Path | None,
    output: Path,
    verify: bool,
    layout: str | None = None,
    compare: Callable[[Path], str] | None = None,
) -> None:
    """Write to a folder beside `output` and rename it at the end, so that an interrupted conversion leaves no half of one.

    Args:
        tokenizer: it, or a folder whose files of it are copied as they are, or None for none.
        layout: another library's name, to write as it does; None for our own.
        compare: what else there is to say of a folder that is being verified.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        folder = Path(scratch) / output.name
        if layout is None:
            model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
        else:
            layouts.save(model, folder, layout, max_shard_size=SHARD_SIZE)
        if isinstance(tokenizer, Path):
            for path in (path for pattern in TOKENIZER_FILES for path in tokenizer.glob(pattern)):
                shutil.copy(path, folder)
        elif tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if verify:
            print(proof(folder, model, tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None))
            if compare is not None:
                print(compare(folder))
        folder.rename(output)
    opens = f"AutoModelForCausalLM.from_pretrained({str(output)!r})" if layout is None else f"{layout}, as hf_linear does,"
    print(f"wrote {output}: {opens} opens it")


@torch.no_grad()
def proof(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Open what was written as a user does: the tensors must be those that were read, and the logits finite."""
    opened = AutoModelForCausalLM.from_pretrained(folder)  # in the layout of another's model, that model
    again = opened if type(opened) is type(model) else type(model).from_pretrained(folder)
    read, found = model.state_dict(), again.state_dict()
    differing = [key for key in read.keys() | found.keys() if key not in found or not torch.equal(read[key], found[key])]
    assert not differing, f"written and read again, these differ: {differing}"
    ids = some_tokens(model)
    logits, expected = opened(ids, use_cache=False).logits.float(), model(ids, use_cache=False).logits.float()
    assert logits.isfinite().all(), f"logits of {ids.shape[1]} random tokens are not finite"
    if tokenizer is not None:
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab(), "the tokenizer came back changed"
    difference = (logits - expected).abs().max().item()
    return f"verified: {len(read)} tensors as read, logits of {ids.shape[1]} random tokens within {difference:.1e}"


def some_tokens(model: PreTrainedModel) -> torch.Tensor:
    length = min(256, model.config.max_position_embeddings)
    return torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
