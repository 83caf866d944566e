"""What a script reads: a folder of Transformers, or a state dict; all of it, or an error."""

import argparse
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from conversion import output
from conversion.pickles import read_state_dict
from hf_linear.checkpoints.layout import Layout, layout_of_config


def config_path(arguments: argparse.Namespace) -> Path:
    """That of `--config`, or beside the weights."""
    folder = arguments.checkpoint if arguments.checkpoint.is_dir() else arguments.checkpoint.parent
    path = arguments.config or folder / "config.json"
    if not path.is_file():
        raise ValueError(f"a config.json must lie beside the weights, got none at {path}: name the config by --config")
    return path


def whole(family: Any, source: Path | None, what: str, **options: Any) -> PreTrainedModel:
    """A model of which nothing was drawn anew, as Transformers does with a warning where it knows no key."""
    model, problems = family.from_pretrained(source, output_loading_info=True, **options)
    if problems["missing_keys"]:
        missing = sorted(problems["missing_keys"])[:3]
        raise ValueError(f"--checkpoint must hold the weights of {what}, got none for {missing}: is it another model's?")
    return model


def of_weights(family: Any, weights: dict[str, Tensor], config: Any, what: str) -> PreTrainedModel:
    """The model of a state dict, in its dtype."""
    dtype = next(iter(weights.values())).dtype
    return whole(family, None, what, config=config, state_dict=dict(weights), dtype=dtype)


def read(arguments: argparse.Namespace, family: Any, *layouts: Layout) -> PreTrainedModel:
    """The model of a folder in one of `layouts`, or of a file of weights and its config.json; ours where `--to` is theirs."""
    checkpoint = arguments.checkpoint
    if arguments.to != "ours":
        return whole(family, checkpoint, "a model of ours")
    path = config_path(arguments)
    fields = json.loads(path.read_text())
    layout = layout_of_config(layouts, fields)
    if layout is None:
        titles = " or ".join(layout.title for layout in layouts)
        raise ValueError(f"the config must be that of {titles}, got {sorted(fields)}: is it another model's?")
    config = getattr(family, "config_class", AutoConfig).from_pretrained(path)
    if checkpoint.is_dir():
        return whole(family, checkpoint, layout.title, config=config)
    weights = load_file(checkpoint) if checkpoint.suffix == ".safetensors" else read_state_dict(checkpoint)
    return of_weights(family, weights, config, layout.title)


def convert(description: str | None, argv: list[str] | None, family: Any, *layouts: Layout) -> None:
    """A script whose origin writes folders that open as they are."""
    arguments = output.parse(output.argument_parser(description, *layouts), argv)
    output.write(read(arguments, family, *layouts), arguments)
