"""Where tokens lie: rows, or packed documents, cut into blocks of 128 tokens. A document begins a block of its own."""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_linear.kernels.launch import cdiv, launch, multiprocessors

BLOCK = tl.constexpr(128)
BLOCKS_A_SEGMENT = 4  # at least: shorter ones spend more on their states than they gain
# Of a block in the table of packed documents: first token, tokens, document, 1 if first + 2 if last of it.
FIELDS = tl.constexpr(4)
TABLE_TILE = tl.constexpr(128)


@dataclasses.dataclass(frozen=True)
class Layout:
    """T tokens a row. `row_blocks` blocks a row; a packed row counts as one row whatever its documents."""

    T: int
    rows: int
    row_blocks: int
    table: Tensor | None  # [row_blocks, FIELDS] int32 of a packed row
    documents: int  # states there are: rows, or documents of the packed row

    @property
    def blocks(self) -> int:
        return self.rows * self.row_blocks

    @property
    def packed(self) -> bool:
        return self.table is not None

    def new_state(self, like: Tensor | None, x: Tensor, *shape: int) -> Tensor:
        """A state [documents, *shape] to write, on the device of x; that of a document without tokens stays what it was."""
        if not self.packed:
            return x.new_empty(self.documents, *shape, dtype=torch.float32)
        if like is None:
            return x.new_zeros(self.documents, *shape, dtype=torch.float32)
        return like.clone(memory_format=torch.contiguous_format)


def make_layout(B: int, T: int, cu_seqlens: Tensor | None) -> Layout:
    if cu_seqlens is None:
        return Layout(T, B, cdiv(T, BLOCK.value), None, B)
    documents = len(cu_seqlens) - 1
    blocks = T // BLOCK.value + documents  # enough for any lengths: no shape depends on the values
    table = torch.empty(blocks, FIELDS.value, dtype=torch.int32, device=cu_seqlens.device)
    launch(table_kernel, (documents + 1,), cu_seqlens.dtype, (cu_seqlens, table, documents, blocks))
    return Layout(T, 1, blocks, table, documents)


def row_segments(layout: Layout, programs: int, device: torch.device, at_once: int = 2) -> tuple[int, int]:
    """How many segments to cut a row into for a walk that has `programs` programs without, and the blocks in each.

    `at_once` programs run on a multiprocessor at a time.

    Segments cost a second pass over the keys and values, so only where a quarter of the GPU would idle without them.
    """
    processors = multiprocessors(device)
    count = 1 if 4 * programs >= 3 * processors else at_once * processors // programs
    count = min(count, max(layout.row_blocks // BLOCKS_A_SEGMENT, 1))
    length = cdiv(layout.row_blocks, count)
    return cdiv(layout.row_blocks, length), length


@triton.jit(do_not_specialize=["documents", "blocks"])
def table_kernel(cu_seqlens, table, documents, blocks):
    """Program n writes the blocks of document n; the last program marks the blocks behind all documents as empty."""
    n = tl.program_id(0)
    step = tl.arange(0, TABLE_TILE)
    begin = 0
    for i0 in range(0, n, TABLE_TILE):
        at = cu_seqlens + i0 + step
        inside = i0 + step < n
        lengths = tl.load(at + 1, inside, 0) - tl.load(at, inside, 0)
        begin += tl.sum(tl.cdiv(lengths, BLOCK).to(tl.int32), 0)
    if n == documents:
        for i0 in range(begin * FIELDS, blocks * FIELDS, TABLE_TILE):
            tl.store(table + i0 + step, 0, i0 + step < blocks * FIELDS)
    else:
        start = tl.load(cu_seqlens + n).to(tl.int32)
        length = tl.load(cu_seqlens + n + 1).to(tl.int32) - start
        count = tl.cdiv(length, BLOCK)
        for i0 in range(0, count, TABLE_TILE):
            i = i0 + step
            to, inside = table + (begin + i) * FIELDS, i < count
            tl.store(to, start + i * BLOCK, inside)
            tl.store(to + 1, tl.minimum(length - i * BLOCK, BLOCK), inside)
            tl.store(to + 2, n, inside)
            tl.store(to + 3, tl.where(i == 0, 1, 0) + tl.where(i == count - 1, 2, 0), inside)


@triton.jit
def locate(part, T, row_blocks, table, PACKED: tl.constexpr, PARTS: tl.constexpr):
    """The first token of a part of a block, counted over all rows, and how many tokens it holds; PARTS (1 or 2) a block."""
    block = part // PARTS
    before = (part % PARTS) * (BLOCK // PARTS)
    if PACKED:
        start = tl.load(table + block * FIELDS)
        length = tl.load(table + block * FIELDS + 1)
    else:
        offset = (block % row_blocks) * BLOCK
        start = (block // row_blocks) * T + offset
        length = T - offset
    return (start + before).to(tl.int64), tl.minimum(tl.maximum(length - before, 0), BLOCK // PARTS)


@triton.jit
def of_document(block, table, PACKED: tl.constexpr):
    """The document of a block of a packed row, and its place there: 1 if the first block, + 2 if the last."""
    if PACKED:
        return tl.load(table + block * FIELDS + 2), tl.load(table + block * FIELDS + 3)
    return 0, 0
