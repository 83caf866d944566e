"""State dicts out of pickled checkpoints from the web, without running what is in them."""

import argparse
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals


class Inert(dict):
    """Stands for every class of a checkpoint that PyTorch does not know to be harmless: it takes anything and does nothing.

    Lightning saves the configuration of a run beside the weights, as objects of libraries that need not be here.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


HARMLESS = {"argparse.Namespace": argparse.Namespace}


def read_checkpoint(path: Path) -> Any:
    """What torch.save put in a file: tensors, plain values and argparse's namespaces as they are, all else as Inert."""
    if not path.is_file():
        raise FileNotFoundError(f"--checkpoint must be a file, got {path}: download the weights first")
    try:
        unknown = get_unsafe_globals_in_checkpoint(path)
        with safe_globals([(HARMLESS.get(name, Inert), name) for name in unknown]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # an optimizer is never read
    except (pickle.UnpicklingError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path} must be a checkpoint of torch.save that holds tensors and plain values, got one that needs more: where "
            "you trust its code, torch.load it and torch.save its state_dict alone, then convert that"
        ) from error


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.ckpt`: of its "state_dict", where Lightning puts them, or the file is the state dict."""
    checkpoint = read_checkpoint(path)
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else checkpoint
    if not is_state_dict(state):
        raise ValueError(
            f"{path} must hold a state dict, its own or under 'state_dict', got {type(state).__name__}: {show(state)}"
        )
    return state


def is_state_dict(state: Any) -> bool:
    return isinstance(state, dict) and bool(state) and all(isinstance(x, Tensor) for x in state.values())


def show(state: Any) -> str:
    return f"its keys are {list(state)[:5]}" if isinstance(state, dict) else "save the model's state_dict"
