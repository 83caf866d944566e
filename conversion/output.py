"""The face of every script, and a converted model on disk: all of it or nothing, and proved to be what was read."""

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_linear.checkpoints.layout import Layout, save

# What a tokenizer of Transformers is saved as, of whatever kind.
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*")
SHARD_SIZE = "1GB"  # the progress bar moves a shard at a time


def argument_parser(description: str | None, *layouts: Layout) -> argparse.ArgumentParser:
    """What every script takes; `layouts` are those that it writes beside ours."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a folder, a file of weights, or a name on the Hub")
    parser.add_argument("--output", type=Path, required=True, help="a folder to be made")
    parser.add_argument("--verify", action="store_true", help="open the output and compare it with what was read")
    parser.set_defaults(to="ours")
    if layouts:
        parser.add_argument("--to", choices=["ours", *(layout.name for layout in layouts)], help="the layout to write")
    parser.add_argument("--config", type=Path, help="the original's config, where it is not found with the weights")
    parser.add_argument("--tokenizer", help="a folder or a name on the Hub; that of the checkpoint's folder if left out")
    return parser


def local(checkpoint: Path) -> Path:
    """A file or a folder as it is; anything else is a name on the Hub."""
    if checkpoint.exists():
        return checkpoint
    try:
        return Path(snapshot_download(str(checkpoint)))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(f"--checkpoint must be a file, a folder or a name on the Hub, got {checkpoint}") from error


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The arguments, once the output is found absent and the checkpoint is on this machine."""
    arguments = parser.parse_args(argv)
    if arguments.output.exists():
        raise FileExistsError(f"--output must not exist yet, got {arguments.output}: take another name, or remove it")
    arguments.checkpoint = local(arguments.checkpoint)
    return arguments


def write(
    model: PreTrainedModel,
    arguments: argparse.Namespace,
    tokenizer: PreTrainedTokenizerBase | None = None,
    compare: Callable[[Path], str] | None = None,
) -> None:
    """Write to a folder beside `--output` and rename it at the end, so that an interrupted conversion leaves no half of one.

    Args:
        tokenizer: what goes along where `--tokenizer` names none; None for the files that lie in the checkpoint's folder.
        compare: what else there is to say of a folder that is being verified.
    """
    output, layout = arguments.output, arguments.to
    if arguments.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        folder = Path(scratch) / output.name
        weights = model.state_dict()
        if not arguments.verify:
            model.to("meta")  # `weights` alone holds them, and saving takes them out of it: what is written leaves the memory
        if layout == "ours":
            model.save_pretrained(folder, state_dict=weights, max_shard_size=SHARD_SIZE, save_original_format=False)
        else:
            save(model, folder, layout, state_dict=weights, max_shard_size=SHARD_SIZE)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        elif arguments.checkpoint.is_dir():
            for path in (path for pattern in TOKENIZER_FILES for path in arguments.checkpoint.glob(pattern)):
                shutil.copy(path, folder)
        if arguments.verify:
            print(proof(folder, model, tokenizer))
            if compare is not None:
                print(compare(folder))
        folder.rename(output)
    opens = f"AutoModelForCausalLM.from_pretrained({str(output)!r})" if layout == "ours" else f"{layout}, as hf_linear does,"
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
