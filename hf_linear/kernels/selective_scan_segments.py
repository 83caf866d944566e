"""Rows in segments, where channels alone would not fill the GPU: the state that enters each segment, in either direction.

A segment is walked once for what it adds to a state of zero. What it leaves of the state before it needs no product of decays:
exp(A sum_t dt_t). A short scan over the segments puts the two together.

    forward       h <- exp(dt_t A) h + dt_t x_t B_t^T
    BACK          dh <- exp(dt_t A) (dh + g_t C_t^T),    g_t = dy_t silu(z_t)
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_linear.kernels.layout import FIELDS, locate
from hf_linear.kernels.selective_scan_tiles import (
    RUN_TIME,
    TILE,
    UNALIGNED,
    decay_of,
    load_numbers,
    load_tile,
    pick,
    sigmoid,
    step_sizes,
)


@triton.jit(do_not_specialize=RUN_TIME, do_not_specialize_on_alignment=UNALIGNED)
def segment_kernel(
    v, dt, A, BC, z, bias, edge, added, total, table,
    T, row_blocks, segment_blocks, row_segments, given,
    WIDTH: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    V_STRIDE: tl.constexpr, DT_STRIDE: tl.constexpr, Z_STRIDE: tl.constexpr,
    BACK: tl.constexpr, GATE: tl.constexpr, SOFTPLUS: tl.constexpr, PACKED: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """One program: BD channels, a segment. v is x, BACK dy; other arguments as in `walk_kernel`.

    edge: [documents, N, WIDTH], the initial states, BACK the gradients of the final ones; added: [segments, N, WIDTH]; total:
    [segments, WIDTH], the sum of dt, infinite where a document begins (BACK: ends) and nothing passes.
    """
    segment = tl.program_id(1).to(tl.int64)
    of_row = segment // row_segments
    first_block = (tl.program_id(1) % row_segments) * segment_blocks
    steps = tl.minimum(first_block + segment_blocks, row_blocks) - first_block
    d, n, i = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, NP), tl.arange(0, TILE)
    in_d = d < WIDTH
    SIZE: tl.constexpr = N * WIDTH
    of_state, in_state = n[:, None] * WIDTH + d[None, :], (n < N)[:, None] & in_d[None, :]
    A_, bias_ = tl.load(A + of_state, in_state, 0.0), tl.load(bias + d, in_d, 0.0)[None, :]
    h, sum_ = tl.zeros((NP, BD), tl.float32), tl.zeros((BD,), tl.float32)
    if not PACKED:
        at_edge = first_block + steps == row_blocks if BACK else first_block == 0
        h = tl.load(edge + of_row * SIZE + of_state, in_state & at_edge & (given != 0), 0.0)
    for step in range(0, steps):
        block = of_row * row_blocks + first_block + (steps - 1 - step if BACK else step)
        start, length = locate(block, T, row_blocks, table, PACKED, 1)
        if PACKED:
            if (tl.load(table + block * FIELDS + 3) & (2 if BACK else 1)) != 0:
                document = tl.load(table + block * FIELDS + 2).to(tl.int64)
                h = tl.load(edge + document * SIZE + of_state, in_state & (given != 0), 0.0)
                sum_ += float("inf")
        tiles = tl.cdiv(length, TILE)
        for k in range(0, tiles):
            tile = tiles - 1 - k if BACK else k
            first, rows = start + tile * TILE, length - tile * TILE
            dt_ = step_sizes(dt, bias_, first, rows, d, DT_STRIDE, WIDTH, BD, SOFTPLUS, PRECISE)
            value = load_tile(v, first, rows, d, V_STRIDE, WIDTH, BD)
            if not BACK:
                value *= dt_
            elif GATE:
                z_ = load_tile(z, first, rows, d, Z_STRIDE, WIDTH, BD)
                value *= z_ * sigmoid(z_, PRECISE)
            for s in tl.static_range(TILE):
                here = (i == (TILE - 1 - s if BACK else s))[:, None]
                B_t, C_t = load_numbers(BC, first, TILE - 1 - s if BACK else s, NP)
                own = pick(value, here, 0)[None, :] * (C_t if BACK else B_t)[:, None]
                decay = decay_of(pick(dt_, here, 0)[None, :] * A_, PRECISE)
                h = decay * (h + own) if BACK else decay * h + own
            sum_ += tl.sum(dt_, 0)
    tl.store(added + segment * SIZE + of_state, h, in_state)
    tl.store(total + segment * WIDTH + d, sum_, in_d)


@triton.jit(do_not_specialize=("row_segments",), do_not_specialize_on_alignment=UNALIGNED)
def between_kernel(
    A, added, total, row_segments, WIDTH: tl.constexpr, N: tl.constexpr, PART: tl.constexpr, BACK: tl.constexpr
):  # fmt: skip
    """From what each segment adds, in place, the state that enters it. One program: PART numbers of the state, a row."""
    k = tl.program_id(0) * PART + tl.arange(0, PART)
    SIZE: tl.constexpr = N * WIDTH
    A_ = tl.load(A + k, k < SIZE, 0.0)
    state = tl.zeros((PART,), tl.float32)
    for step in range(0, row_segments):
        segment = tl.program_id(1).to(tl.int64) * row_segments + (row_segments - 1 - step if BACK else step)
        own = tl.load(added + segment * SIZE + k, k < SIZE, 0.0)
        tl.store(added + segment * SIZE + k, state, k < SIZE)
        total_ = tl.load(total + segment * WIDTH + k % WIDTH)
        passes = total_ < float("inf")
        state = tl.where(passes, tl.exp2(A_ * tl.where(passes, total_, 0.0)) * state, 0.0) + own
