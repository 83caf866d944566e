"""Folders that another library wrote for Transformers, which open as they are: written as ours, and back."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel

from conversion import output
from conversion.pickles import read_state_dict
from hf_linear.checkpoints.layout import Layout


def read(checkpoint: Path, config: Path | None, layout: Layout, family: type[PreTrainedModel]) -> PreTrainedModel:
    """The model of a folder, or of a file of weights whose config.json is named apart."""
    if config is None and not (checkpoint / "config.json").is_file():
        raise ValueError(f"--checkpoint must be a folder with a config.json, got {checkpoint}: name the config by --config")
    fields = json.loads((config or checkpoint / "config.json").read_text())
    if not layout.has_config(fields):
        raise ValueError(f"the config must be that of {layout.title}, got {sorted(fields)}: is it another model's?")
    source, options = checkpoint, {"config": family.config_class.from_dict(fields)}
    if checkpoint.is_file():
        source, weights = None, load_file(checkpoint) if checkpoint.suffix == ".safetensors" else read_state_dict(checkpoint)
        options |= {"state_dict": weights, "dtype": next(iter(weights.values())).dtype}
    return whole(family, source, layout.title, **options)


def whole(family: type[PreTrainedModel], source: Path | None, what: str, **options: Any) -> PreTrainedModel:
    """A model of which nothing was drawn anew, as Transformers does with a warning where it knows no key."""
    model, problems = family.from_pretrained(source, output_loading_info=True, **options)
    if problems["missing_keys"]:
        missing = sorted(problems["missing_keys"])[:3]
        raise ValueError(f"--checkpoint must hold the weights of {what}, got none for {missing}: is it another model's?")
    return model


def convert(layout: Layout, family: type[PreTrainedModel], description: str | None, argv: list[str] | None) -> None:
    parser = output.argument_parser(description)
    parser.add_argument("--to", choices=["ours", layout.name], default="ours", help="the layout to write")
    parser.add_argument("--config", type=Path, help="a config.json, where --checkpoint is a file of weights")
    parser.add_argument("--tokenizer", help="a folder or a name on the Hub; that of the checkpoint's folder if left out")
    arguments = parser.parse_args(argv)
    output.check_absent(arguments.output)
    if arguments.to == "ours":
        model, written = read(arguments.checkpoint, arguments.config, layout, family), None
    else:
        model, written = whole(family, arguments.checkpoint, "a model of ours"), layout.name
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer) if arguments.tokenizer else arguments.checkpoint
    output.write(model, tokenizer, arguments.output, arguments.verify, written)
