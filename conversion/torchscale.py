"""torchscale's RetNet, a checkpoint of fairseq or a state dict beside its arguments, as a `retnet` model.

    python -m conversion.torchscale --checkpoint checkpoint_best.pt --output my-retnet --tokenizer FOLDER --verify
    python -m conversion.torchscale --checkpoint weights.pt --args args.json --output my-retnet --verify

args.json holds keyword arguments of torchscale's RetNetConfig. What it leaves out has that class's defaults. A file of fairseq
holds its arguments itself.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from conversion import output
from conversion.hyenadna import argument_parser
from conversion.pickles import is_state_dict, read_checkpoint, show
from hf_linear import RetNetConfig, RetNetForCausalLM
from hf_linear.checkpoints.torchscale import Torchscale

LAYOUT = Torchscale()
FAIRSEQ_TOKENS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}  # of every fairseq dictionary


def read(path: Path, arguments: Path | None) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, int]]:
    """The state dict, the arguments of RetNetConfig, and the tokens that are known."""
    checkpoint = load_file(path) if path.suffix == ".safetensors" else read_checkpoint(path)
    inside = checkpoint if isinstance(checkpoint, dict) else {}
    weights = inside.get("model", inside.get("state_dict", inside))
    fields = fairseq_arguments(inside)
    tokens = {} if fields is None else FAIRSEQ_TOKENS
    if arguments is not None:
        fields = json.loads(arguments.read_text())
    if fields is None:
        raise ValueError(
            f"--args must be given for {path}, which is no checkpoint of fairseq: a JSON of RetNetConfig's arguments"
        )
    if not is_state_dict(weights):
        raise ValueError(f"{path} must hold a state dict, its own or under 'model' or 'state_dict', got {show(checkpoint)}")
    weights = {key.removeprefix("decoder."): x for key, x in weights.items()}  # what fairseq calls it in a language model
    if not LAYOUT.has_weights(weights) or "embed_tokens.weight" not in weights:
        raise ValueError(
            f"{path} must hold {LAYOUT.title} with its embed_tokens.weight, got {show(weights)}: is it another model's?"
        )
    if (fields.get("vocab_size") or -1) < 0:  # fairseq's is the size of its dictionary
        fields["vocab_size"] = len(weights["embed_tokens.weight"])
    return weights, fields, tokens


def fairseq_arguments(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Those of a checkpoint of fairseq that torchscale reads, old (`args`) or new (`cfg`); None where there are none."""
    args = checkpoint.get("args") or (checkpoint.get("cfg") or {}).get("model")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    if not args:
        return None
    fields = {name: value for name, value in args.items() if name in LAYOUT.arguments}
    if fields.get("max_target_positions") is None:
        fields["max_target_positions"] = args.get("tokens_per_sample")
    return fields


def convert(weights: dict[str, Tensor], fields: Mapping[str, Any], **tokens: int | None) -> RetNetForCausalLM:
    """Our model of their state dict and arguments."""
    config = RetNetConfig(**{**LAYOUT.read_config(fields), **tokens})
    dtype = weights["embed_tokens.weight"].dtype
    return RetNetForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)


def original_logits(weights: Mapping[str, Tensor], fields: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    """What torchscale computes in float32, in its recurrent form, which wants the whole prefix for every token."""
    from torchscale.architecture.config import RetNetConfig as Arguments
    from torchscale.architecture.retnet import RetNetDecoder

    arguments = Arguments(**{name: value for name, value in fields.items() if value is not None})
    embed_tokens = weights["embed_tokens.weight"]
    original = RetNetDecoder(arguments, embed_tokens=nn.Embedding(*embed_tokens.shape)).eval()
    original.load_state_dict(weights, strict=False)  # a tied head may be there or not; the rest was checked for ours

    @torch.no_grad()
    def logits(ids: Tensor) -> Tensor:
        state: dict = {}
        return torch.cat([original(ids[:, : t + 1], incremental_state=state)[0] for t in range(ids.shape[1])], 1)

    return logits


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--args", type=Path, help="JSON, where the checkpoint does not hold them")
    parser.add_argument("--tokenizer", help="a folder or a name on the Hub, copied along; none if left out")
    arguments = parser.parse_args(argv)
    output.check_new(arguments.output)
    weights, fields, tokens = read(arguments.checkpoint, arguments.args)
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer) if arguments.tokenizer else None
    model = convert(dict(weights), fields, **tokens)
    original = output.importable(original_logits, weights, fields) if arguments.verify else None
    output.write(model, tokenizer, arguments.output, arguments.verify, original)


if __name__ == "__main__":
    main()
