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


def majority_accuracy(train: Dataset, documents: Dataset) -> float:
    """Always the commonest class of the training documents."""
    return float(np.mean(np.array(documents["label"]) == np.bincount(train["label"]).argmax()))


def kmer_accuracy(k: int, train: Dataset, documents: Dataset) -> float:
    """Naive Bayes on a bag of k-mers:  argmax_c log p(c) + sum_kmers log (n(kmer, c) + 1) / (n(c) + K),  K different k-mers."""
    labels = np.array(train["label"])
    grams = [kmers_of(text, k) for text in train["text"]]
    table, place = np.unique(np.concatenate(grams), return_inverse=True)
    owner = np.repeat(labels, [len(of_one) for of_one in grams])
    counts = np.zeros((labels.max() + 1, len(table)))
    np.add.at(counts, (owner, place), 1)
    scores = np.log(counts + 1) - np.log(counts.sum(1, keepdims=True) + len(table))
    prior = np.log(np.bincount(labels) / len(labels))
    right = 0
    for text, label in zip(documents["text"], documents["label"], strict=True):
        at = np.searchsorted(table, found := kmers_of(text, k)).clip(max=len(table) - 1)
        right += (prior + scores[:, at[table[at] == found]].sum(1)).argmax() == label
    return float(right / len(documents))


def kmers_of(text: str, k: int) -> np.ndarray:
    """Every k bytes of a text, without what stands before its start: that would tell where in the text they are."""
    return grams_of(text, k)[k - 1 :]


def byte_grams(documents: Dataset, k: int) -> np.ndarray:
    """Every k bytes that end at a byte of a document, as one number (so k <= 7); zero bytes stand before its start."""
    return np.concatenate([grams_of(text, k) for text in documents["text"]])


def grams_of(text: str, k: int) -> np.ndarray:
    padded = np.frombuffer(bytes(k - 1) + text.encode(), np.uint8).astype(np.int64)
    return np.lib.stride_tricks.sliding_window_view(padded, k) @ 256 ** np.arange(k)[::-1]


def look_up(keys: np.ndarray, table: np.ndarray, values: np.ndarray) -> np.ndarray:
    """values[i] where table[i] == key, else 0; `table` is sorted."""
    at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return np.where(table[at] == keys, values[at], 0)
