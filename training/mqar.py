"""Multi-query associative recall (MQAR), a task that needs no download: what was the value of this key?

    k1 v1 k2 v2 ... kn vn  . . k2 v2 . . k1 v1 . . .        dots are blanks; every key is asked for once

A document holds n keys with their values, then each key again at a random place, most of them soon, and after it its value,
which alone is to be predicted. The mapping is new in every document, so nothing but the context tells it: a model whose state
is smaller than the pairs must forget some. Who only knows which values were not asked for yet finds (1 + 1/2 + ... + 1/n) / n.

Source: Arora et al. 2023, arXiv 2312.04927, section 4 and appendix (places drawn with p(i) ~ i^(a - 1), a = 0.01).
"""

import numpy as np
from datasets import Dataset
from numpy.random import Generator, default_rng

SPLITS = {"train": 100_000, "validation": 1_000, "test": 3_000}
BLANK, POWER = 0, 0.01


def associative_recall(split: str, pairs: int, length: int, vocab_size: int) -> Dataset:
    """The documents of one split, "input_ids" and "labels" [length]; the same in every run, other ones in every split.

    Keys are tokens 1 ... vocab_size / 2 - 1, values the upper half. Labels are -100 but at a value that is to be predicted.
    """
    if split not in SPLITS:
        raise ValueError(f"data: got the split {split!r} of mqar; wanted one of {', '.join(SPLITS)}. Name one of them.")
    if not (0 < pairs < vocab_size // 2 and 4 * pairs <= length):
        raise ValueError(
            f"data.pairs: got {pairs} in {length} tokens of a vocabulary of {vocab_size}; wanted 1 to length / 4, fewer "
            "than half the vocabulary. Change data.pairs, data.sequence_length or model.vocab_size."
        )
    random, count = default_rng(list(SPLITS).index(split)), SPLITS[split]
    half, places = vocab_size // 2, (length - 2 * pairs) // 2
    keys = 1 + choice(random, np.zeros(half - 1), count, pairs)
    values = half + choice(random, np.zeros(vocab_size - half), count, pairs)
    likelihood = (POWER - 1) * np.log(np.arange(1, places + 1))
    asked = 2 * pairs + 2 * choice(random, likelihood, count, pairs)
    ids = np.full((count, length), BLANK)
    ids[:, 0 : 2 * pairs : 2], ids[:, 1 : 2 * pairs : 2] = keys, values
    np.put_along_axis(ids, asked, keys, 1)
    np.put_along_axis(ids, asked + 1, values, 1)
    labels = np.full_like(ids, -100)
    np.put_along_axis(labels, asked + 1, values, 1)
    return Dataset.from_dict({"input_ids": ids, "labels": labels}).with_format("torch")


def choice(random: Generator, log_weights: np.ndarray, count: int, n: int) -> np.ndarray:
    """[count, n]: in each row n different indices of the weights, drawn one after the other by weight (Gumbel's trick)."""
    noisy = log_weights.astype(np.float32) + random.gumbel(size=(count, len(log_weights))).astype(np.float32)
    top = np.argpartition(noisy, -n, axis=1)[:, -n:]
    return random.permuted(top, axis=1)
