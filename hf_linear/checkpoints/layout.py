"""Layouts: how other libraries name the fields and the weights of a family of ours.

A layout is one table in Transformers' own words, `WeightRenaming` and `WeightConverter`, theirs to ours. Transformers' loader
reads by it, shard by shard, onto whatever device and in whatever dtype was asked for; `save` writes by it backwards.
A family's config names its layouts in `layouts`; the decoder asks here which of them a checkpoint is in.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import load_state_dict, remove_tied_weights_from_state_dict
from transformers.utils import CONFIG_NAME
from transformers.utils.loading_report import LoadStateDictInfo

HEADS = ("lm_head.", "score.")


class Layout:
    """One foreign layout of a family. Subclasses fill in what they have: weights alone, or a config.json too.

    Attributes:
        name: what `save` and the conversion scripts call it; None for one that is only read.
        title: what errors call it.
    """

    name: str | None = None
    title: str

    def has_config(self, fields: Mapping[str, Any]) -> bool:
        """Whether a config.json is of this layout."""
        return False

    def read_config(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Their config.json in our fields; a value that means a model which is not here is an error.

        The `model_type` may be another family's, whose config is what opens then.
        """
        raise NotImplementedError

    def write_config(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Our config as their config.json; what theirs cannot say is an error."""
        raise NotImplementedError

    def has_weights(self, keys: Collection[str]) -> bool:
        """Whether a checkpoint with these keys is of this layout."""
        raise NotImplementedError

    def transforms(self, config: PreTrainedConfig) -> list[WeightTransform]:
        """The table, theirs to ours, made anew for each use: a transform collects tensors while it works."""
        raise NotImplementedError

    def derived(self, config: PreTrainedConfig) -> dict[str, Tensor]:
        """What they save and our models compute, under what the table makes of their keys: checked where found, written too."""
        return {}


def renamings(names: Mapping[str, str]) -> list[WeightTransform]:
    """A renaming for each pair of parts of keys, theirs and ours: all that match a key are applied to it in turn.

    Dots stand for themselves; for the rest, parts are regular expressions as Transformers reads them. Backwards, our part
    must match no key but those that their part was in.
    """
    return [WeightRenaming(theirs.replace(".", r"\."), ours.replace(".", r"\.")) for theirs, ours in names.items()]


def layout_of_config(layouts: Iterable[Layout], fields: Mapping[str, Any]) -> Layout | None:
    """The layout that a config.json is in; None for our own."""
    return next((layout for layout in layouts if layout.has_config(fields)), None)


def layout_of_weights(layouts: Iterable[Layout], keys: Collection[str]) -> Layout | None:
    """The layout that a checkpoint with these keys is in; None for our own."""
    return next((layout for layout in layouts if layout.has_weights(keys)), None)


def check_derived(
    layout: Layout, config: PreTrainedConfig, keys: Collection[str], state_dict: Mapping | None, files: list[str] | None
) -> None:
    """Tensors that our models compute must be those of the checkpoint; Transformers has no place for them."""
    derived, transforms = layout.derived(config), layout.transforms(config)
    names = {key: rename(key, transforms)[0] for key in keys} if derived else {}
    wanted = {key: derived[name] for key, name in names.items() if name in derived}
    found = {key: x[...] for key, x in (state_dict or {}).items() if key in wanted}
    for file in files or [] if wanted else []:
        if file.endswith(".safetensors"):
            with safe_open(file, "pt") as opened:
                found |= {key: opened.get_tensor(key) for key in wanted.keys() & set(opened.keys())}
        else:
            found |= {key: x for key, x in load_state_dict(file).items() if key in wanted}
    for key, x in found.items():
        expected, rounding = wanted[key], torch.finfo(x.dtype).eps
        if x.shape != expected.shape or not torch.allclose(x.float().cpu(), expected, rtol=8 * rounding, atol=1e-7):
            raise ValueError(
                f"{key!r} must be {shown(expected)}, as the config says, got {shown(x)}: another variant of {layout.title} is "
                "not here"
            )


def shown(x: Tensor) -> str:
    ends = x.flatten()[[0, -1]].tolist() if x.numel() else []
    return f"{list(x.shape)} from {' to '.join(f'{end:g}' for end in ends)}"


def read_keys(state_dict: Mapping[str, Tensor] | None, files: list[str] | None) -> Collection[str]:
    """The keys of a checkpoint, of its files' headers where it is not in memory."""
    return state_dict or {key for file in files or [] for key in load_state_dict(file, map_location="meta")}


def check_loaded(
    layout: Layout,
    transforms: list[WeightTransform],
    model: PreTrainedModel,
    keys: Collection[str],
    info: LoadStateDictInfo,
) -> None:
    """Whatever Transformers found wrong is an error, where it would draw weights anew with a warning, or take one of two."""
    info.unexpected_keys -= layout.derived(model.config).keys()
    found = list(problems(transforms, model, keys, info))
    if found:
        more = f" (and {len(found) - 5} more)" if len(found) > 5 else ""
        raise ValueError(
            f"a checkpoint must fit its config.json, got: {'; '.join(found[:5])}{more}. It was read as {layout.title}: does "
            "the config belong to it?"
        )


def check_known(layouts: Collection[Layout], keys: Collection[str], info: LoadStateDictInfo) -> None:
    """A checkpoint of which nothing has a place is in a layout that nobody knows; Transformers would draw the whole model."""
    if keys and len(info.unexpected_keys) == len(keys):
        known = ["hf_linear's own (model.layers.0.mixer...)", *(layout.title for layout in layouts)]
        raise ValueError(
            f"a checkpoint must be in a known layout, one of {'; '.join(known)}; got {sorted(keys)[:3]}...: is it another "
            "model's?"
        )


def problems(
    transforms: list[WeightTransform], model: PreTrainedModel, keys: Collection[str], info: LoadStateDictInfo
) -> Iterator[str]:
    """What does not fit, under the checkpoint's own keys.

    Heads are looser: a new `score` may be missing or of another shape, and so may a tied `lm_head`; a head that the model has
    no place for is left out.
    """
    shapes = {key: list(x.shape) for key, x in model.state_dict().items()}
    back = [transform.reverse_transform() for transform in reversed(transforms)]

    def theirs(key: str) -> str:
        return repr(rename(key, back, reverse=True)[0])

    for key, error in sorted(info.conversion_errors.items()):
        yield f"{theirs(key)} could not be converted: {reason(error)}"
    origins = defaultdict(list)
    for key in sorted(keys):
        name, pattern = rename(key, transforms)
        if pattern is None:  # what a converter takes together comes from several
            origins[name].append(repr(key))
    yield from (f"{' and '.join(several)} are one tensor here" for several in origins.values() if len(several) > 1)

    drawn = ("score.", "lm_head.") if model.config.tie_word_embeddings else ("score.",)
    unconverted = {theirs(key) for key in info.conversion_errors}
    for key in sorted(info.missing_keys):
        if not key.startswith(drawn) and theirs(key) not in unconverted:
            yield f"missing key {theirs(key)}, wanted with the shape {shapes[key]}"
    for key, got, wanted in sorted(info.mismatched_keys):
        if not key.startswith("score."):
            yield f"{theirs(key)} must have the shape {list(wanted)}, got {list(got)}"
    other_heads = tuple(head for head in HEADS if not any(key.startswith(head) for key in shapes))
    for key in sorted(info.unexpected_keys):
        if not key.startswith(other_heads):
            yield f"unexpected key {theirs(key)}"


def reason(error: str) -> str:
    """The exception's own words, of what Transformers makes of it: a traceback, and what was being converted."""
    return error.rpartition("\nError")[0].rpartition("\n")[2] or error


def rename(key: str, transforms: list[WeightTransform], reverse: bool = False) -> tuple[str, str | None]:
    """What a table makes of a key, and the pattern of the converter that did, if one did."""
    names = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    return rename_source_key(key, names, converters, reverse=reverse)


def save(
    model: PreTrainedModel, folder: str | Path, name: str, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
) -> None:
    """Write a model as another library does: its config.json, its keys. `kwargs` are those of `save_pretrained`.

    A `state_dict` to write in place of the model's own is used up, as by `save_pretrained`.

    Raises:
        ValueError: the family has no layout of this name, or the layout cannot say what the model is.
    """
    known = {layout.name: layout for layout in model.config.layouts if layout.name}
    if name not in known:
        raise ValueError(f"the layout of a {model.config.model_type} must be one of {sorted(known)}, got {name!r}")
    if hasattr(model, "score"):
        raise ValueError(
            f"a model for {name} must be a language model, got {type(model).__name__}: save what it was made from, or ours"
        )
    layout = known[name]
    fields = layout.write_config(model.config) | {"dtype": str(model.dtype).removeprefix("torch.")}
    weights = model.state_dict() if state_dict is None else state_dict
    weights |= layout.derived(model.config)
    offloaded = any(x.is_meta for x in weights.values())
    ours = getattr(model, "_weight_conversions", None)
    model._weight_conversions = layout.transforms(model.config)
    try:
        if not offloaded:  # what is offloaded, Transformers fetches and converts shard by shard
            held = remove_tied_weights_from_state_dict(weights, model)
            weights = revert_weight_conversion(model, held)
            held.clear()  # so that a shard, once written, may leave the memory
        model.save_pretrained(folder, state_dict=weights, save_original_format=offloaded, **kwargs)
    finally:
        model._weight_conversions = ours
    (Path(folder) / CONFIG_NAME).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
