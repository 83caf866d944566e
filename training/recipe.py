"""A recipe is one YAML file that says everything about a run.

A section that belongs to a library goes to that library as it is: `trainer` to transformers.TrainingArguments, `lora` to
peft.LoraConfig, `model` to the family's config or to from_pretrained. A key its owner does not know is an error here,
because a config would keep it as an unused attribute and train a model that nobody asked for.
"""

import dataclasses
import difflib
import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Collection
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments

DEFAULTS = {
    # The rows of a batch are laid end to end in one: one fills a CPU, and evaluation counts row by row.
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "include_num_input_tokens_seen": "all",  # the loss curve is drawn against tokens
    "ddp_find_unused_parameters": False,  # every parameter of a causal LM has its part in the loss
    # Each process reads a stream itself: rows differ in length, so one process cannot hand out slices of a batch.
    "accelerator_config": {"dispatch_batches": False},
    "dataloader_pin_memory": torch.cuda.is_available(),  # elsewhere torch warns of it
    "report_to": "none",
}


class Loader(yaml.SafeLoader):
    """YAML as those who write `learning_rate: 3e-4` and `save_strategy: no` mean it; YAML 1.1 reads a string and false."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
for letter in "yYnNoO":  # true and false alone are booleans; yes, no, on and off are words
    resolvers = Loader.yaml_implicit_resolvers[letter]
    Loader.yaml_implicit_resolvers[letter] = [(tag, regexp) for tag, regexp in resolvers if not tag.endswith(":bool")]


@dataclass(kw_only=True)
class DataRecipe:
    """Where the documents come from: the words are those of datasets.load_dataset.

    Attributes:
        path: a data set's name on the Hub, or "text" (a file is a document), "parquet", "json", or one that needs no download:
            "python-stdlib", "dna-motifs" (training/dna.py), or "mqar" (training/mqar.py, for training.recall).
        name: the data set's configuration.
        data_files: files or globs.
        split: the split to train on.
        streaming: read while training instead of preparing first. Needs trainer.max_steps.
        column: the column that holds a document's text.
        label: the column that holds its class, for training.classify.
        pairs: for training.recall, the keys of a document.
        test: for training.classify, the split whose accuracy is measured once, at the end; the held-out documents may then
            choose among models.
        held_out: the documents to evaluate on. A fraction (chosen by the hash of the text, so that the choice is the same in
            every run, and a copy of a held-out document never trains); or a number (the first so many); or a split's name.
        sequence_length: tokens in a packed row. A longer document is cut into pieces of at most so many.
    """

    path: str
    name: str | None = None
    data_files: str | list[str] | None = None
    split: str = "train"
    streaming: bool = False
    column: str = "text"
    label: str | None = None
    pairs: int | None = None
    test: str | None = None
    held_out: float | int | str = 0.05
    sequence_length: int = 2048

    def __post_init__(self):
        held_out = self.held_out
        fraction, number = isinstance(held_out, float) and 0 < held_out < 1, type(held_out) is int and held_out > 0
        if not (fraction or number or isinstance(held_out, str)):
            raise ValueError(
                f"data.held_out: got {held_out!r}; wanted a fraction of the documents between 0 and 1, a number of documents "
                "(a positive integer), or the name of a split. Try 0.05."
            )
        if fraction and self.streaming:
            raise ValueError(
                f"data.held_out: got the fraction {held_out} of a stream, whose length nobody knows; wanted a number of "
                "documents or the name of a split. Try 1000."
            )
        if type(self.sequence_length) is not int or self.sequence_length < 2:
            raise ValueError(f"data.sequence_length: got {self.sequence_length!r}; wanted a number of tokens >= 2. Try 2048.")


@dataclass(kw_only=True)
class TokenizerRecipe:
    """The tokenizer of a checkpoint, a byte-level BPE of vocab_size tokens trained on the training documents, or HyenaDNA's."""

    checkpoint: str | None = None
    vocab_size: int | None = None
    alphabet: str | None = None

    def __post_init__(self):
        if sum(value is not None for value in (self.checkpoint, self.vocab_size, self.alphabet)) != 1:
            raise ValueError(
                f"tokenizer: got checkpoint={self.checkpoint!r}, vocab_size={self.vocab_size!r}, alphabet={self.alphabet!r}; "
                "wanted exactly one: `checkpoint` to use a tokenizer, `vocab_size` to train a byte-level BPE, or "
                "`alphabet: dna`."
            )
        if self.alphabet not in (None, "dna"):
            raise ValueError(f"tokenizer.alphabet: got {self.alphabet!r}; wanted dna. For text use checkpoint or vocab_size.")


@dataclass(kw_only=True)
class Recipe:
    output_dir: str
    model: dict[str, Any]
    data: DataRecipe
    tokenizer: TokenizerRecipe | None = None
    trainer: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] | None = None

    def __post_init__(self):
        self.data = build(DataRecipe, "data", self.data)
        if self.tokenizer is not None:
            self.tokenizer = build(TokenizerRecipe, "tokenizer", self.tokenizer)
        check_keys("trainer", self.trainer, field_names(TrainingArguments) - {"output_dir"})
        if self.lora is not None:
            from peft import LoraConfig

            check_keys("lora", self.lora, field_names(LoraConfig))

    def training_arguments(self) -> TrainingArguments:
        return TrainingArguments(output_dir=self.output_dir, **DEFAULTS | self.trainer)


def load_recipe(path: str | Path, overrides: Collection[str] = ()) -> Recipe:
    """Reads a recipe; `overrides` such as "trainer.max_steps=10" replace or add single values."""
    if not Path(path).is_file():
        raise ValueError(f"recipe: got {str(path)!r}, which is no file; wanted a YAML file. Try training/recipes/demo.yaml.")
    values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    for override in overrides:
        keys, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"override: got {override!r}; wanted section.key=value. Write it as trainer.max_steps=10.")
        *sections, key = keys.split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
        target[key] = yaml.load(value, Loader)
    return build(Recipe, "recipe", values)


def recipe_parser(description: str) -> ArgumentParser:
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a YAML file, such as training/recipes/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the recipe")
    return parser


def build(cls: type, section: str, values: Any):
    """Makes the dataclass `cls` of a mapping, and says what is wrong with the mapping if it cannot."""
    if not isinstance(values, dict):
        raise ValueError(
            f"{section}: got {values!r}; wanted keys and values: {', '.join(sorted(field_names(cls)))}. "
            "Write key: value, one a line."
        )
    check_keys(section, values, field_names(cls))
    required = {f.name for f in dataclasses.fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    if missing := required - values.keys():
        raise ValueError(f"{section}: got {sorted(values)}; wanted {sorted(missing)} too. Add the missing keys.")
    return cls(**values)


def check_keys(section: str, given: Collection[str], allowed: Collection[str]) -> None:
    for key in given:
        if key not in allowed:
            raise ValueError(
                f"{section}: got the unknown key {key!r}; wanted one of {', '.join(sorted(allowed))}."
                f"{did_you_mean(key, allowed)}"
            )


def did_you_mean(word: Any, allowed: Collection[str]) -> str:
    close = difflib.get_close_matches(str(word), allowed, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def field_names(cls: type) -> set[str]:
    return {f.name for f in dataclasses.fields(cls) if f.init}
