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
    behind,
    decay_of,
    load_group,
    load_tile,
    rows_of,
    sigmoid,
    step_sizes,
    store_tile,
    tile_of,
)


@triton.jit(do_not_specialize=RUN_TIME, do_not_specialize_on_alignment=UNALIGNED)
def walk_kernel(
    x, dt, A, BC, D, z, bias, y, initial, final, entering, states, table,
    T, row_blocks, segment_blocks, row_segments, given,
    WIDTH: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, GROUPS: tl.constexpr, SIDE: tl.constexpr, BD: tl.constexpr,
    X_STRIDE: tl.constexpr, DT_STRIDE: tl.constexpr, Z_STRIDE: tl.constexpr,
    GATE: tl.constexpr, SOFTPLUS: tl.constexpr, KEEP: tl.constexpr, PACKED: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """One program: BD channels, a segment of a row.

    x, dt, z and y: [tokens, WIDTH], the first three with a stride of their own between tokens; A: [N, WIDTH], times log2(e);
    BC: [tokens + TILE, 2, NP] float32, B and C side by side, zeros from N on; D, bias: [WIDTH] float32; initial, final:
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
    NI: tl.constexpr = NP // GROUPS
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    n = tl.arange(0, GROUPS)[:, None, None] * NI + tl.arange(0, NI)[None, :, None]
    in_d = d < WIDTH
    SIZE: tl.constexpr = N * WIDTH
    of_state, in_state = n * WIDTH + tl.max_contiguous(d, SIDE)[None, None, :], (n < N) & in_d[None, None, :]
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
        tiles = tl.cdiv(length, TILE)
        next_x = load_tile(x, start, length, d, X_STRIDE, WIDTH, BD)
        next_dt = load_tile(dt, start, length, d, DT_STRIDE, WIDTH, BD)
        for tile in range(0, tiles):
            first, rows = start + tile * TILE, length - tile * TILE
            x_, dt_ = next_x.to(tl.float32), step_sizes(next_dt, bias_, rows, SOFTPLUS, PRECISE)
            # Under way while this tile is walked over.
            ahead = tl.minimum(tile + 1, tiles - 1) * TILE
            next_x = load_tile(x, start + ahead, length - ahead, d, X_STRIDE, WIDTH, BD)
            next_dt = load_tile(dt, start + ahead, length - ahead, d, DT_STRIDE, WIDTH, BD)
            if GATE:
                z_ = load_tile(z, first, rows, d, Z_STRIDE, WIDTH, BD)
            if KEEP:
                tl.store(states + (block * TILES + tile) * SIZE + of_state, h.to(states.dtype.element_ty), in_state)
            rows_, sums = rows_of(behind(dt_, dt_ * x_), 2 * TILE), ()
            for t in tl.static_range(TILE):
                B_t, C_t = load_group(BC, first, t, NI, GROUPS)
                h = decay_of(rows_[t][None, None, :] * A_, PRECISE) * h + rows_[TILE + t][None, None, :] * B_t
                sums = sums + (tl.sum(h * C_t, 1),)
            y_ = tile_of(sums, TILE, GROUPS, BD)
            y_ += D_ * x_
            if GATE:
                z_ = z_.to(tl.float32)
                y_ *= z_ * sigmoid(z_, PRECISE)
            store_tile(y, first, rows, d, y_, WIDTH, WIDTH, BD)
        if PACKED:
            if (place & 2) != 0:
                tl.store(final + document * SIZE + of_state, h, in_state)
    if not PACKED:
        if last_block == row_blocks:
            tl.store(final + of_row * SIZE + of_state, h, in_state)
