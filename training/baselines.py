"""What plain programs make of the held-out documents, in bits per byte: the figures a model has to beat."""

from collections.abc import Callable

import numpy as np
from datasets import Dataset

from training.data import count_bytes


def compressor_bits_per_byte(compress: Callable[[bytes], bytes], documents: Dataset) -> float:
    """Each document alone, as the model sees them."""
    return 8 * sum(len(compress(text.encode())) for text in documents["text"]) / count_bytes(documents)


def ngram_bits_per_byte(order: int, train: Dataset, held_out: Dataset) -> float:
    """A Witten-Bell n-gram of bytes:  p_k(c | s) = (n(sc) + d(s) p_{k-1}(c | s')) / (n(s) + d(s)),  p_0 = 1/256.

    n counts in the training documents, d(s) is the number of different bytes seen after s, and s' is s less its oldest byte.
    """
    p = np.full(count_bytes(held_out), 1 / 256)
    for k in range(1, order + 1):
        grams, counts = np.unique(byte_grams(train, k), return_counts=True)
        contexts, first = np.unique(grams >> 8, return_index=True)
        totals, kinds = np.add.reduceat(counts, first), np.diff(first, append=len(grams))
        gram = byte_grams(held_out, k)
        n = look_up(gram, grams, counts)
        total, kind = look_up(gram >> 8, contexts, totals), look_up(gram >> 8, contexts, kinds)
        p = np.where(total > 0, (n + kind * p) / np.maximum(total + kind, 1), p)
    return float(-np.log2(p).mean())


def byte_grams(documents: Dataset, k: int) -> np.ndarray:
    """Every k bytes that end at a byte of a document, as one number (so k <= 7); zero bytes stand before its start."""
    grams = []
    for text in documents["text"]:
        padded = np.frombuffer(bytes(k - 1) + text.encode(), np.uint8).astype(np.int64)
        windows = np.lib.stride_tricks.sliding_window_view(padded, k)
        grams.append(windows @ 256 ** np.arange(k)[::-1])
    return np.concatenate(grams)


def look_up(keys: np.ndarray, table: np.ndarray, values: np.ndarray) -> np.ndarray:
    """values[i] where table[i] == key, else 0; `table` is sorted."""
    at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return np.where(table[at] == keys, values[at], 0)
