"""A converted model on disk: all of it or nothing, and proved to be what was read."""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_linear.checkpoints.layout import save


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, output: Path, verify: bool, layout: str | None = None
) -> None:
    """Write to a folder beside `output` and rename it at the end, so that an interrupted conversion leaves no half of one.

    What is written is ours, or in the foreign `layout` of that name.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        folder = Path(scratch) / output.name
        if layout is None:
            model.save_pretrained(folder)
        else:
            save(model, folder, layout)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if verify:
            print(proof(folder, model, tokenizer))
        folder.rename(output)
    print(f"wrote {output}: AutoModelForCausalLM.from_pretrained({str(output)!r}) opens it")


@torch.no_grad()
def proof(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Open what was written as a user does: the tensors must be those that were read, and the logits finite."""
    read, found = model.state_dict(), type(model).from_pretrained(folder).state_dict()
    differing = [key for key in read.keys() | found.keys() if key not in found or not torch.equal(read[key], found[key])]
    assert not differing, f"written and read again, these differ: {differing}"
    length = min(256, model.config.max_position_embeddings)
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    opened = AutoModelForCausalLM.from_pretrained(folder)  # in another's layout, another's model
    logits, expected = opened(ids, use_cache=False).logits.float(), model(ids, use_cache=False).logits.float()
    assert logits.isfinite().all(), f"logits of {length} random tokens are not finite"
    if tokenizer is not None:
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab(), "the tokenizer came back changed"
    difference = (logits - expected).abs().max().item()
    return f"verified: {len(read)} tensors as read, logits of {length} random tokens within {difference:.1e}"
