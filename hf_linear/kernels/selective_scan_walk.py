"""The selective scan forward: a program holds the states of some channels in registers and walks over the tokens.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,        y_t = (h_t C_t + D x_t) silu(z_t)

Beside the state nothing is kept between tiles of tokens, which are read as the walk comes to them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_linear.kernels.layout import FIELDS, locate
from hf_linear.kernels.selective_scan_tiles import (
    RUN_TIME,
    TILE,
    TILES,
    UNALIGNED,
    decay_of,
    load_numbers,
    load_tile,
    pick,
    sigmoid,
    step_sizes,
    store_tile,
)


@triton.jit(do_not_specialize=RUN_TIME, do_not_specialize_on_alignment=UNALIGNED)
def walk_kernel(
    x, dt, A, BC, D, z, bias, y, initial, final, entering, states, table,
    T, row_blocks, segment_blocks, row_segments, given,
    WIDTH: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    X_STRIDE: tl.constexpr, DT_STRIDE: tl.constexpr, Z_STRIDE: tl.constexpr,
    GATE: tl.constexpr, SOFTPLUS: tl.constexpr, KEEP: tl.constexpr, PACKED: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """One program: BD channels, a segment of a row.

    x, dt, z and y: [tokens, WIDTH], the first three with a stride of their own between tokens; A: [N, WIDTH], times log2(e);
    BC: [tokens + TILE, NP, 2] float32, B and C side by side, zeros from N on; D, bias: [WIDTH] float32; initial, final:
    [documents, N, WIDTH]; entering: [segments, N, WIDTH], the state before each segment of several. KEEP: states
    [blocks TILES, N, WIDTH], the state before every tile.
    grid     (WIDTH / BD, segments)
    dtypes   x, dt, z, y as they are; everything else and all arithmetic float32, but `states` as the caller made them
    traffic  x, dt, z and y once, 8 bytes a token and channel in bfloat16; with KEEP 2 more at N = 16. B and C from a cache
    cost     N + 4 of the special functions a token and channel, N of them the decays: more than the memory takes
    oracle   hf_linear.ops.reference.selective_scan
    """
    segment = tl.program_id(1).to(tl.int64)
    of_row = segment // row_segments
    first_block = (tl.program_id(1) % row_segments) * segment_blocks
    last_block = tl.minimum(first_block + segment_blocks, row_blocks)
    d, n, i = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, NP), tl.arange(0, TILE)
    in_d = d < WIDTH
    SIZE: tl.constexpr = N * WIDTH
    of_state, in_state = n[:, None] * WIDTH + d[None, :], (n < N)[:, None] & in_d[None, :]
    A_ = tl.load(A + of_state, in_state, 0.0)
    D_, bias_ = tl.load(D + d, in_d, 0.0)[None, :], tl.load(bias + d, in_d, 0.0)[None, :]
    h = tl.load(entering + segment * SIZE + of_state, in_state & (row_segments > 1), 0.0)
    if not PACKED:
        if first_block == 0:
            h = tl.load(initial + of_row * SIZE + of_state, in_state & (given != 0), 0.0)
    for part in range(first_block, last_block):
        block = of_row * row_blocks + part
        start, length = locate(block, T, row_blocks, table, PACKED, 1)
        if PACKED:
            document, place = tl.load(table + block * FIELDS + 2).to(tl.int64), tl.load(table + block * FIELDS + 3)
            if (place & 1) != 0:
                h = tl.load(initial + document * SIZE + of_state, in_state & (given != 0), 0.0)
        for tile in range(0, tl.cdiv(length, TILE)):
            first, rows = start + tile * TILE, length - tile * TILE
            if KEEP:
                tl.store(states + (block * TILES + tile) * SIZE + of_state, h.to(states.dtype.element_ty), in_state)
            x_ = load_tile(x, first, rows, d, X_STRIDE, WIDTH, BD)
            dt_ = step_sizes(dt, bias_, first, rows, d, DT_STRIDE, WIDTH, BD, SOFTPLUS, PRECISE)
            u, y_ = dt_ * x_, tl.zeros((TILE, BD), tl.float32)
            for t in tl.static_range(TILE):
                here = (i == t)[:, None]
                B_t, C_t = load_numbers(BC, first, t, NP)
                h = decay_of(pick(dt_, here, 0)[None, :] * A_, PRECISE) * h + pick(u, here, 0)[None, :] * B_t[:, None]
                y_ = tl.where(here, tl.sum(h * C_t[:, None], 0)[None, :], y_)
            y_ += D_ * x_
            if GATE:
                z_ = load_tile(z, first, rows, d, Z_STRIDE, WIDTH, BD)
                y_ *= z_ * sigmoid(z_, PRECISE)
            store_tile(y, first, rows, d, y_, WIDTH, WIDTH, BD)
        if PACKED:
            if (place & 2) != 0:
                tl.store(final + document * SIZE + of_state, h, in_state)
    if not PACKED:
        if last_block == row_blocks:
            tl.store(final + of_row * SIZE + of_state, h, in_state)
