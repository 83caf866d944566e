"""Where tokens lie: rows, or packed documents, cut into pairs of chunks.

The state advances by chunks of 64 tokens; the backward pass keeps a state for each pair of chunks and works on pairs. A
document begins a pair of its own, so that both chunks of a pair belong to one document; the second may be empty.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = tl.constexpr(64)
PAIR = tl.constexpr(128)
FIELDS = tl.constexpr(
    4
)  # of a pair in the table of packed documents: first token, tokens, document, 1 if first + 2 if last of it


@dataclasses.dataclass(frozen=True)
class Layout:
    """T tokens a row. `row_pairs` pairs a row; a packed row counts as one row whatever its documents."""

    T: int
    rows: int
    row_pairs: int
    table: Tensor | None  # [row_pairs, FIELDS] int32 of a packed row
    documents: int  # states there are: rows, or documents of the packed row

    @property
    def chunks(self) -> int:
        return 2 * self.rows * self.row_pairs

    @property
    def packed(self) -> bool:
        return self.table is not None


def make_layout(B: int, T: int, cu_seqlens: Tensor | None) -> Layout:
    if cu_seqlens is None:
        return Layout(T, B, triton.cdiv(T, PAIR.value), None, B)
    documents = len(cu_seqlens) - 1
    pairs = T // PAIR.value + documents  # enough for any lengths: no shape depends on the values
    table = torch.empty(pairs, FIELDS.value, dtype=torch.int32, device=cu_seqlens.device)
    table_kernel[(documents + 1,)](cu_seqlens, table, documents, pairs)
    return Layout(T, 1, pairs, table, documents)


@triton.jit(do_not_specialize=["documents", "pairs"])
def table_kernel(cu_seqlens, table, documents, pairs):
    """Program n writes the pairs of document n; the last program marks the pairs behind all documents as empty."""
    n = tl.program_id(0)
    begin = 0
    for i in range(n):
        begin += tl.cdiv(tl.load(cu_seqlens + i + 1) - tl.load(cu_seqlens + i), PAIR).to(tl.int32)
    if n == documents:
        for pair in range(begin, pairs):
            for field in tl.static_range(FIELDS):
                tl.store(table + pair * FIELDS + field, 0)
    else:
        start = tl.load(cu_seqlens + n).to(tl.int32)
        length = tl.load(cu_seqlens + n + 1).to(tl.int32) - start
        count = tl.cdiv(length, PAIR)
        for i in range(count):
            to = table + (begin + i) * FIELDS
            tl.store(to, start + i * PAIR)
            tl.store(to + 1, tl.minimum(length - i * PAIR, PAIR))
            tl.store(to + 2, n)
            tl.store(to + 3, tl.where(i == 0, 1, 0) + tl.where(i == count - 1, 2, 0))


@triton.jit
def locate(chunk, T, row_pairs, table, PACKED: tl.constexpr, CHUNKS: tl.constexpr):
    """The first token of a chunk, counted over all rows, and how many tokens it holds; CHUNKS (1 or 2) a pair."""
    pair = chunk // CHUNKS
    before = (chunk % CHUNKS) * (PAIR // CHUNKS)
    if PACKED:
        start = tl.load(table + pair * FIELDS)
        length = tl.load(table + pair * FIELDS + 1)
    else:
        offset = (pair % row_pairs) * PAIR
        start = (pair // row_pairs) * T + offset
        length = T - offset
    return (start + before).to(tl.int64), tl.minimum(tl.maximum(length - before, 0), PAIR // CHUNKS)
