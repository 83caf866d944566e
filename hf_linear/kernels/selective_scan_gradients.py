"""The gradients of the selective scan: all states of a tile from the one that enters it, then the recurrence backwards.

With g_t = dy_t silu(z_t) and u_t = dt_t x_t:

    dh_t = g_t C_t^T + exp(dt_{t+1} A) dh_{t+1},        e_t = dh_t exp(dt_t A) h_{t-1}
    dA = sum_t dt_t e_t,    d(dt_t) = sum_n A e_t + x_t du_t,    du_t = dh_t B_t,    dx_t = dt_t du_t + D g_t
    dB_t = u_t^T dh_t,      dC_t = g_t^T h_t

The last two are sums over channels: first over those of a thread, then through shared memory, a tile at a time.
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
    apart,
    behind,
    decay_of,
    load_group,
    load_tile,
    rows_of,
    side_sums,
    sigmoid,
    step_sizes,
    store_tile,
    sums_over_channels,
    tile_of,
)


@triton.jit
def add_to(total, lost, x, PRECISE: tl.constexpr):
    """total + x, and PRECISE what the sums so far lost by rounding."""
    if PRECISE:
        x -= lost
        new = total + x
        return new, (new - total) - x
    else:
        return total + x, lost


@triton.jit(do_not_specialize=RUN_TIME, do_not_specialize_on_alignment=UNALIGNED)
def gradient_kernel(
    x, dt, A, BC, D, z, bias, states, dy, d_final, d_initial, dx, ddt, dz, dA, dBC, dD, dbias, carry, table,
    T, row_blocks, segment_blocks, row_segments, given, tokens,
    WIDTH: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, GROUPS: tl.constexpr, SIDE: tl.constexpr, BD: tl.constexpr,
    X_STRIDE: tl.constexpr, DT_STRIDE: tl.constexpr, Z_STRIDE: tl.constexpr,
    GATE: tl.constexpr, SOFTPLUS: tl.constexpr, PACKED: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """One program: BD channels, a segment. Arguments as in `walk_kernel`.

    dy, dx, ddt, dz: [tokens, WIDTH]; d_final, d_initial: [documents, N, WIDTH]. carry: [segments, N, WIDTH], the gradient of
    the state that leaves a segment of several. Partial sums, added up by the caller, so that every run gives the same bits:
    dA [segments, N, WIDTH]; dBC [2, WIDTH / BD, tokens, NP], dD, dbias [segments, WIDTH].
    grid     (WIDTH / BD, segments)
    traffic  x, dt, z, dy, dx, ddt and dz once, and x, dt, z and dy again from the L2: 14 bytes a token and channel in
             bfloat16; of the states 4 at N = 16; of dB and dC 2 N / BD floats
    oracle   hf_linear.ops.reference.selective_scan
    """
    segment = tl.program_id(1).to(tl.int64)
    of_row = segment // row_segments
    first_block = (tl.program_id(1) % row_segments) * segment_blocks
    last_block = tl.minimum(first_block + segment_blocks, row_blocks)
    NI: tl.constexpr = NP // GROUPS
    d, i = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, TILE)
    n = tl.arange(0, GROUPS)[:, None, None] * NI + tl.arange(0, NI)[None, :, None]
    in_d = d < WIDTH
    SIZE: tl.constexpr = N * WIDTH
    of_state, in_state = n * WIDTH + tl.max_contiguous(d, SIDE)[None, None, :], (n < N) & in_d[None, None, :]
    A_ = tl.load(A + of_state, in_state, 0.0)
    D_, bias_ = tl.load(D + d, in_d, 0.0)[None, :], tl.load(bias + d, in_d, 0.0)[None, :]
    dA_ = tl.zeros((GROUPS, NI, BD), tl.float32)
    dD_, dbias_ = tl.zeros((TILE, BD), tl.float32), tl.zeros((TILE, BD), tl.float32)
    lost_A, lost_D, lost_bias = dA_, dD_, dbias_
    dh = tl.load(carry + segment * SIZE + of_state, in_state & (row_segments > 1), 0.0)
    if not PACKED:
        if last_block == row_blocks:
            dh = tl.load(d_final + of_row * SIZE + of_state, in_state & (given != 0), 0.0)
    for part in range(0, last_block - first_block):
        block = of_row * row_blocks + last_block - 1 - part
        start, length = locate(block, T, row_blocks, table, PACKED, 1)
        if PACKED:
            document, place = tl.load(table + block * FIELDS + 2).to(tl.int64), tl.load(table + block * FIELDS + 3)
            if (place & 2) != 0:
                dh = tl.load(d_final + document * SIZE + of_state, in_state & (given != 0), 0.0)
        tiles = tl.cdiv(length, TILE)
        last = tl.maximum(tiles - 1, 0)
        next_h = tl.load(states + (block * TILES + last) * SIZE + of_state, in_state, 0.0)
        next_x = load_tile(x, start + last * TILE, length - last * TILE, d, X_STRIDE, WIDTH, BD)
        next_dt = load_tile(dt, start + last * TILE, length - last * TILE, d, DT_STRIDE, WIDTH, BD)
        next_dy = load_tile(dy, start + last * TILE, length - last * TILE, d, WIDTH, WIDTH, BD)
        if GATE:
            next_z = load_tile(z, start + last * TILE, length - last * TILE, d, Z_STRIDE, WIDTH, BD)
        for back in range(0, tiles):
            tile = tiles - 1 - back
            first, rows = start + tile * TILE, length - tile * TILE
            h = next_h.to(tl.float32)
            dt_ = step_sizes(next_dt, bias_, rows, SOFTPLUS, PRECISE)
            x_, g = next_x.to(tl.float32), next_dy.to(tl.float32)
            if GATE:
                z_ = next_z.to(tl.float32)
                g *= z_ * sigmoid(z_, PRECISE)
            # Under way while this tile is walked over.
            ahead = tl.maximum(tile - 1, 0)
            next_h = tl.load(states + (block * TILES + ahead) * SIZE + of_state, in_state, 0.0)
            next_x = load_tile(x, start + ahead * TILE, length - ahead * TILE, d, X_STRIDE, WIDTH, BD)
            next_dt = load_tile(dt, start + ahead * TILE, length - ahead * TILE, d, DT_STRIDE, WIDTH, BD)
            next_dy = load_tile(dy, start + ahead * TILE, length - ahead * TILE, d, WIDTH, WIDTH, BD)
            if GATE:
                next_z = load_tile(z, start + ahead * TILE, length - ahead * TILE, d, Z_STRIDE, WIDTH, BD)
            both = rows_of(behind(dt_, dt_ * x_), 2 * TILE)
            decays, states_ = (), ()
            for t in tl.static_range(TILE):
                B_t, _ = load_group(BC, first, t, NI, GROUPS)
                decay = decay_of(both[t][None, None, :] * A_, PRECISE)
                decays, states_ = decays + (decay,), states_ + (h,)
                h = decay * h + both[TILE + t][None, None, :] * B_t
            read = rows_of(g, TILE)
            tl.debug_barrier()  # or B would be kept in registers from above
            ys, dus, ddts, dBs, dCs = (), (), (), (), ()
            own = tl.zeros((GROUPS, NI, BD), tl.float32) if PRECISE else dA_  # added up apart, for fewer roundings
            for s in tl.static_range(TILE):
                step, u = both[TILE - 1 - s][None, None, :], both[2 * TILE - 1 - s][None, None, :]
                g_ = read[TILE - 1 - s][None, None, :]
                B_t, C_t = load_group(BC, first, TILE - 1 - s, NI, GROUPS)
                ys, dCs = (tl.sum(h * C_t, 1),) + ys, (side_sums(g_ * h, SIDE),) + dCs
                dh += g_ * C_t
                dus, dBs = (tl.sum(dh * B_t, 1),) + dus, (side_sums(u * dh, SIDE),) + dBs
                dh *= decays[TILE - 1 - s]
                h = states_[TILE - 1 - s]
                own += dh * h * step
                ddts = (tl.sum(dh * h * A_, 1),) + ddts
            # The inputs again: their registers would be missed above.
            x_, raw = load_tile(x, first, rows, d, X_STRIDE, WIDTH, BD), load_tile(dt, first, rows, d, DT_STRIDE, WIDTH, BD)
            g = load_tile(dy, first, rows, d, WIDTH, WIDTH, BD)
            if GATE:
                z_ = load_tile(z, first, rows, d, Z_STRIDE, WIDTH, BD)
            if PRECISE:
                dA_, lost_A = add_to(dA_, lost_A, own, PRECISE)
            else:
                dA_ = own
            k, R = tl.arange(0, 2 * TILE * NP), TILE * NP
            apart_ = tl.num_programs(0).to(tl.int64) * tokens * NP
            to = dBC + (tl.program_id(0).to(tl.int64) * tokens + first) * NP + k // R * apart_ + k % R
            tl.store(to, sums_over_channels(dBs + dCs, 2 * TILE, NP), k % R < rows * NP)
            du, ddt_ = apart(tile_of(dus + ddts, 2 * TILE, GROUPS, BD))
            y_ = tile_of(ys, TILE, GROUPS, BD)
            x_, g = x_.to(tl.float32), g.to(tl.float32)
            ddt_ = ddt_ * 0.6931471805599453 + x_ * du
            if SOFTPLUS:
                ddt_ *= sigmoid(raw.to(tl.float32) + bias_, PRECISE)
            ddt_ = tl.where((i < rows)[:, None], ddt_, 0.0)
            if GATE:
                z_ = z_.to(tl.float32)
                gate = sigmoid(z_, PRECISE)
                slope = gate * (1 + z_ * (1 - gate))
                store_tile(dz, first, rows, d, g * (y_ + D_ * x_) * slope, WIDTH, WIDTH, BD)
                g *= z_ * gate
            dD_, lost_D = add_to(dD_, lost_D, g * x_, PRECISE)
            dbias_, lost_bias = add_to(dbias_, lost_bias, ddt_, PRECISE)
            store_tile(dx, first, rows, d, dt_ * du + D_ * g, WIDTH, WIDTH, BD)
            store_tile(ddt, first, rows, d, ddt_, WIDTH, WIDTH, BD)
        if PACKED:
            if (place & 1) != 0:
                tl.store(d_initial + document * SIZE + of_state, dh, in_state)
    if not PACKED:
        if first_block == 0:
            tl.store(d_initial + of_row * SIZE + of_state, dh, in_state)
    tl.store(dA + segment * SIZE + of_state, dA_, in_state)
    tl.store(dD + segment * WIDTH + d, tl.sum(dD_, 0), in_d)
    tl.store(dbias + segment * WIDTH + d, tl.sum(dbias_, 0), in_d)
