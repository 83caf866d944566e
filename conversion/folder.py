"""Folders that another library wrote for Transformers, config.json and weights: what opens directly, written as ours."""

import argparse
import json
from pathlib import Path

from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from conversion import output
from conversion.hyenadna import argument_parser
from conversion.pickles import read_state_dict
from hf_linear.checkpoints.layout import Layout


def read(checkpoint: Path, config: Path | None, layout: Layout, family: type[PreTrainedModel]) -> PreTrainedModel:
    """The model of a folder, or of a file of weights whose config.json is named apart."""
    if config is None and not (checkpoint / "config.json").is_file():
        raise ValueError(f"--checkpoint must be a folder with a config.json, got {checkpoint}: name the config by --config")
    fields = json.loads((config or checkpoint / "config.json").read_text())
    if not layout.has_config(fields):
        raise ValueError(f"the config must be that of {layout.title}, got {sorted(fields)}: is it another model's?")
    options = {}
    if config is not None:
        options["config"] = family.config_class.from_dict(fields)
    if checkpoint.is_file():
        options["state_dict"] = load_file(checkpoint) if checkpoint.suffix == ".safetensors" else read_state_dict(checkpoint)
        options["dtype"] = next(iter(options["state_dict"].values())).dtype
    source = None if checkpoint.is_file() else checkpoint
    model, problems = family.from_pretrained(source, output_loading_info=True, **options)
    if problems["missing_keys"]:
        raise ValueError(f"{checkpoint} must hold the weights of {layout.title}, got other keys: is it another model's?")
    return model


def read_tokenizer(checkpoint: Path, name: str | None) -> PreTrainedTokenizerBase | None:
    """The one that is named, or that of the folder, where it has one."""
    beside = any((checkpoint / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))
    return AutoTokenizer.from_pretrained(name or checkpoint) if name or beside else None


def convert(layout: Layout, family: type[PreTrainedModel], description: str | None, argv: list[str] | None) -> None:
    parser: argparse.ArgumentParser = argument_parser(description)
    parser.add_argument("--config", type=Path, help="a config.json, where --checkpoint is a file of weights")
    parser.add_argument("--tokenizer", help="a folder or a name on the Hub; that of the checkpoint's folder if left out")
    arguments = parser.parse_args(argv)
    output.check_new(arguments.output)
    model = read(arguments.checkpoint, arguments.config, layout, family)
    tokenizer = read_tokenizer(arguments.checkpoint, arguments.tokenizer)
    output.write(model, tokenizer, arguments.output, arguments.verify)
