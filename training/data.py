"""Documents to packed rows: load, split by document, train a tokenizer, pack without mixing.

A document is tokenized as  bos + text + eos  (eos stands in for a missing bos), so that its first token is predicted too
and every byte is paid for. A document longer than a row is cut into pieces; a piece starts with the last token of the
piece before it, which is context only. So every token but bos is a target exactly once, in training as in evaluation.
"""

import glob
import hashlib
import sysconfig
from bisect import bisect_left, insort
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from datasets import Dataset, IterableDataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import DataCollatorWithFlattening, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from training.dna import motif_order
from training.recipe import DataRecipe, did_you_mean

FILE_FORMATS = ("text", "parquet", "json")
DOCUMENTS_FOR_TOKENIZER = 100_000  # merges stop changing long before; a stream would have no end
PACKING_WINDOW = 1_000  # documents packed together: enough to fill rows to about 99%
SHUFFLE_BUFFER = 1_000  # rows of a stream held back, so that neighbours in the source are not neighbours in training
END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"


def load_documents(recipe: DataRecipe) -> tuple[Dataset | IterableDataset, Dataset]:
    """The documents to train on and those held out, each a data set with the one column "text"."""
    documents = load_split(recipe, recipe.split)
    match recipe.held_out:
        case str():
            train, held_out = documents, load_split(recipe, recipe.held_out)
        case float():
            is_held_out = partial(hashed_below, fraction=recipe.held_out)
            train = documents.filter(lambda text: not is_held_out(text), input_columns="text")
            held_out = documents.filter(is_held_out, input_columns="text")
        case int():
            train, held_out = documents.skip(recipe.held_out), documents.take(recipe.held_out)
    if isinstance(held_out, IterableDataset):
        held_out = Dataset.from_list(list(held_out))
    if len(held_out) == 0:
        raise ValueError(f"data.held_out: got {recipe.held_out!r}, which holds out no document. Hold out more.")
    return train, held_out


def load_split(recipe: DataRecipe, split: str) -> Dataset | IterableDataset:
    if recipe.path in ("python-stdlib", "dna-motifs"):
        made_here = recipe.path == "dna-motifs"
        documents = motif_order(split) if made_here else Dataset.from_dict({recipe.column: list(read_standard_library())})
        documents = documents.to_iterable_dataset() if recipe.streaming else documents
    else:
        if recipe.path in FILE_FORMATS:
            check_files(recipe)
        whole_files = {"sample_by": "document"} if recipe.path == "text" else {}
        documents = load_dataset(
            recipe.path, recipe.name, data_files=recipe.data_files, split=split, streaming=recipe.streaming, **whole_files
        )
    columns = {"column": recipe.column} if recipe.label is None else {"column": recipe.column, "label": recipe.label}
    first = next(iter(documents), dict.fromkeys(columns.values()))
    for key, name in columns.items():
        if name not in first:
            raise ValueError(f"data.{key}: got {name!r}; wanted one of {', '.join(first)}.{did_you_mean(name, first)}")
    documents = documents.select_columns(list(columns.values()))
    for name, ours in zip(columns.values(), ("text", "label"), strict=False):
        if name != ours:
            documents = documents.rename_column(name, ours)
    documents = documents.filter(bool, input_columns="text")  # an empty document has nothing to learn and costs no byte
    if next(iter(documents), None) is None:
        raise ValueError(
            f"data: got no text in the split {split!r} of {recipe.path!r}; wanted at least one document. "
            "Name another split or column."
        )
    return documents


def load_classes(recipe: DataRecipe) -> tuple[dict[str, Dataset], list[str]]:
    """The documents to train on, those held out and those of the test, "text" and "label" 0, 1, ..., and the classes' names."""
    if recipe.label is None or recipe.test is None or recipe.streaming:
        raise ValueError(
            f"data: got label={recipe.label!r}, test={recipe.test!r} and streaming={recipe.streaming}; wanted a column of "
            "classes, a split to test on, and no stream. Set data.label and data.test."
        )
    train, held_out = load_documents(recipe)
    splits = {"train": train, "held_out": held_out, "test": load_split(recipe, recipe.test)}
    classes = sorted(set(train["label"]))
    for name, documents in splits.items():
        if unknown := set(documents["label"]) - set(classes):
            raise ValueError(
                f"data.label: got the classes {sorted(unknown)} in {name}; wanted those of the training documents, {classes}. "
                "Give each of them some."
            )

    def number(label: str | int) -> dict[str, int]:
        return {"label": classes.index(label)}

    numbered = {name: documents.map(number, input_columns="label") for name, documents in splits.items()}
    features = train.features["label"]
    return numbered, features.int2str(classes) if hasattr(features, "int2str") else [str(label) for label in classes]


def check_files(recipe: DataRecipe) -> None:
    patterns = [recipe.data_files] if isinstance(recipe.data_files, str) else recipe.data_files or []
    missing = [p for p in patterns if "://" not in p and not glob.glob(p, recursive=True)]
    if missing or not patterns:
        raise ValueError(
            f"data.data_files: got {recipe.data_files!r}, of which {missing or 'nothing'} is a file; wanted files or globs. "
            f"Paths start at {Path.cwd()}."
        )


def read_standard_library() -> Iterator[str]:
    """The source files of this Python's standard library, without its tests (most distributions leave those out)."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    files = [f for f in sorted(root.rglob("*.py")) if left_out.isdisjoint(f.relative_to(root).parts)]
    if not files:
        raise ValueError(
            f"data.path: got python-stdlib, but {root} holds no .py files; wanted a Python with its sources. "
            "Use another Python, or data.path=text with data.data_files."
        )
    for file in files:
        try:
            yield file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:  # a few files show off other encodings
            continue


def hashed_below(text: str, fraction: float) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < fraction * 2**64


def count_bytes(documents: Dataset) -> int:
    return sum(len(text.encode()) for text in documents["text"])


def train_tokenizer(documents: Dataset | IterableDataset, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text survives the round trip. bos and eos are one token, and a prompt starts with it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [END_OF_TEXT, PADDING]
    if vocab_size < len(alphabet) + len(special):
        raise ValueError(
            f"tokenizer.vocab_size: got {vocab_size}; wanted at least {len(alphabet) + len(special)}: the bytes, "
            f"{END_OF_TEXT} and {PADDING}. Try 4096."
        )
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    texts = (document["text"] for document in documents.take(DOCUMENTS_FOR_TOKENIZER))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B",
        special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))],
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=PADDING)


def pack(documents: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset | IterableDataset:
    """Rows of at most `length` tokens. A row's "input_ids" is the list of its documents or pieces, still apart."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "tokenizer: got one without an eos_token; wanted one, to tell where a document ends. Set tokenizer.eos_token and "
            "save the tokenizer."
        )

    def pack_window(texts: list[str]) -> dict[str, list]:
        pieces = [piece for ids in encode(texts, tokenizer) for piece in cut(ids, length)]
        return {"input_ids": best_fit(pieces, length)}

    return documents.map(pack_window, batched=True, batch_size=PACKING_WINDOW, input_columns="text", remove_columns="text")


def encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each document between its bos and eos."""
    eos = tokenizer.eos_token_id
    bos = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    # verbose=False: a document longer than the tokenizer's model_max_length is cut by us, no reason to warn
    return [[bos, *ids, eos] for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def cut(ids: list[int], length: int) -> list[list[int]]:
    """Pieces of at most `length` tokens; each repeats its predecessor's last token, so that every token has a context."""
    return [ids[start : start + length] for start in range(0, len(ids) - 1, length - 1)]


def best_fit(pieces: list[list[int]], length: int) -> list[list[list[int]]]:
    """Best fit decreasing: the longest piece first, each into the fullest row that has room for it."""
    rows, rooms = [], []  # rooms: (tokens still free, index of the row), sorted
    for piece in sorted(pieces, key=len, reverse=True):
        at = bisect_left(rooms, (len(piece), 0))
        if at == len(rooms):
            rows.append([])
            room, row = length, len(rows) - 1
        else:
            room, row = rooms.pop(at)
        rows[row].append(piece)
        insort(rooms, (room - len(piece), row))
    return rows


_flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=True)


def collate(rows: list[dict[str, list[list[int]]]]) -> dict:
    """One row [1, T]: position_ids restart at each document, its first label is -100, cu_seq_lens mark the bounds."""
    return _flatten([{"input_ids": ids} for row in rows for ids in row["input_ids"]])
