"""torchscale's RetNet, a checkpoint of fairseq or a state dict, as a `retnet` model in our own layout, and back.

    python -m conversion.torchscale --checkpoint checkpoint_best.pt --output my-retnet --verify --tokenizer FOLDER
    python -m conversion.torchscale --checkpoint weights.pt --output my-retnet --verify --config arguments.json
    python -m conversion.torchscale --checkpoint my-retnet --output my-retnet-back --verify --to torchscale

arguments.json holds keyword arguments of torchscale's RetNetConfig. What it leaves out has that class's defaults. A file of
fairseq holds its arguments itself.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from conversion import output, source
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
            f"--config must be given for {path}, which is no checkpoint of fairseq: a JSON of RetNetConfig's arguments"
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


def convert(weights: dict[str, Tensor], fields: Mapping[str, Any], **tokens: int | None) -> PreTrainedModel:
    """Our model of their state dict and arguments."""
    config = RetNetConfig(**{**LAYOUT.read_config(fields), **tokens})
    return source.of_weights(RetNetForCausalLM, weights, config, LAYOUT.title)


@torch.no_grad()
def beside_torchscale(weights: Mapping[str, Tensor], fields: Mapping[str, Any], model: PreTrainedModel) -> str:
    """The largest difference of logits between torchscale's own model in its recurrent form, and ours; both go to float32."""
    try:
        from torchscale.architecture.config import RetNetConfig as Arguments
        from torchscale.architecture.retnet import RetNetDecoder
    except ImportError as error:
        return f"not compared with torchscale's own model: {error}"
    arguments = Arguments(**{name: value for name, value in fields.items() if value is not None})
    original = RetNetDecoder(arguments, embed_tokens=nn.Embedding(*weights["embed_tokens.weight"].shape)).eval()
    original.load_state_dict(weights, strict=False)  # a tied head may be there or not; the rest was checked for ours
    ids, state = output.some_tokens(model), {}
    # It reads the last token alone, but takes its place from the length of all.
    theirs = torch.cat([original(ids[:, : t + 1], incremental_state=state)[0] for t in range(ids.shape[1])], 1)
    difference, size = (theirs - model.float()(ids).logits).abs().max().item(), theirs.abs().max().item()
    return (
        f"torchscale's own logits of {ids.shape[1]} random tokens, up to {size:.1f} in size, differ by {difference:.1e} in "
        "float32"
    )


def main(argv: list[str] | None = None) -> None:
    arguments = output.parse(output.argument_parser(__doc__, LAYOUT), argv)
    if arguments.to == "ours":
        weights, fields, tokens = read(arguments.checkpoint, arguments.config)
        model = convert(weights, fields, **tokens)
        angle = weights.get("retnet_rel_pos.angle")
        if angle is not None and angle.dtype.itemsize < 4:
            print(f"its rotary angles are rounded to {angle.dtype}, ours are not: docs/checkpoints.md says what that makes")
    else:
        model = source.read(arguments, RetNetForCausalLM, LAYOUT)

    def compare(written: Path) -> str:
        if arguments.to == "ours":
            return beside_torchscale(weights, fields, model)
        return beside_torchscale(*read(written / "model.safetensors", written / "config.json")[:2], model)

    output.write(model, arguments, compare=compare)


if __name__ == "__main__":
    main()
