"""What a script reads: a folder of Transformers, or a state dict; all of it, or an error."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from types import EllipsisType

from safetensors import safe_open
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from conversion import output
from conversion.pickles import read_state_dict
from hf_linear.checkpoints.layout import Layout, layout_of_config


class OnDisk:
    """A tensor of a file, read when Transformers' loader takes `[...]` of it, as of a slice of safetensors.

    Each opens the file anew: the tensor has a mapping of its own, whose memory goes back when the tensor is dropped, where one
    mapping of the file would keep all that was ever touched until its last tensor goes.
    """

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key

    def __getitem__(self, everything: EllipsisType) -> Tensor:
        if self.path.suffix != ".safetensors":
            return read_state_dict(self.path)[self.key]
        with safe_open(self.path, "pt") as opened:
            return opened.get_tensor(self.key)


def on_disk(path: Path) -> dict[str, OnDisk]:
    """The tensors of a file."""
    if path.suffix != ".safetensors":
        keys = list(read_state_dict(path))
    else:
        with safe_open(path, "pt") as opened:
            keys = opened.keys()
    return {key: OnDisk(path, key) for key in keys}


def files_of(checkpoint: Path) -> list[Path]:
    """The files of weights of a folder, in Transformers' order of preference; a file is its own."""
    if checkpoint.is_file():
        return [checkpoint]
    for name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME):
        if (checkpoint / name).is_file():
            return [checkpoint / name]
        index = checkpoint / f"{name}.index.json"
        if index.is_file():
            return [checkpoint / shard for shard in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    raise FileNotFoundError(
        f"--checkpoint must hold {SAFE_WEIGHTS_NAME}, {WEIGHTS_NAME}, or shards with their index, got none in {checkpoint}: "
        "name the file of weights"
    )


def folder_of(checkpoint: Path) -> Path:
    return checkpoint if checkpoint.is_dir() else checkpoint.parent


def config_path(arguments: argparse.Namespace) -> Path:
    """That of `--config`, or beside the weights."""
    path = arguments.config or folder_of(arguments.checkpoint) / "config.json"
    if not path.is_file():
        raise ValueError(f"a config.json must lie beside the weights, got none at {path}: name the config by --config")
    return path


def of_weights(
    family: type[PreTrainedModel], weights: Mapping[str, Tensor | OnDisk], config: PreTrainedConfig, what: str
) -> PreTrainedModel:
    """The model of a state dict, in the dtype of its config or else its own.

    Nothing may be drawn anew, as Transformers does with a warning where it knows no key.
    """
    dtype = config.dtype or next(iter(weights.values()))[...].dtype
    options = {"config": config, "state_dict": dict(weights), "dtype": dtype}
    model, problems = family.from_pretrained(None, output_loading_info=True, **options)
    if problems["missing_keys"]:
        missing = sorted(problems["missing_keys"])[:3]
        raise ValueError(f"--checkpoint must hold the weights of {what}, got none for {missing}: is it another model's?")
    return model


def read(arguments: argparse.Namespace, family: type[PreTrainedModel] | None, *layouts: Layout) -> PreTrainedModel:
    """The model of a folder in one of `layouts`, or of a file of weights and its config.json; ours where `--to` is theirs.

    A `family` of None is that which the config names.
    """
    path, what = config_path(arguments), "a model of ours"
    if arguments.to == "ours":
        fields = json.loads(path.read_text())
        layout = layout_of_config(layouts, fields)
        if layout is None:
            titles = " or ".join(layout.title for layout in layouts)
            raise ValueError(f"the config must be that of {titles}, got {sorted(fields)}: is it another model's?")
        what = layout.title
    config = (AutoConfig if family is None else family.config_class).from_pretrained(path)
    family = family or MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    weights = {key: x for file in files_of(arguments.checkpoint) for key, x in on_disk(file).items()}
    model = of_weights(family, weights, config, what)
    folder = folder_of(arguments.checkpoint)
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def convert(description: str | None, argv: list[str] | None, family: type[PreTrainedModel], *layouts: Layout) -> None:
    """A script whose origin writes folders that open as they are."""
    arguments = output.parse(output.argument_parser(description, *layouts), argv)
    output.write(read(arguments, family, *layouts), arguments)
