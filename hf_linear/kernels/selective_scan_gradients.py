"""The gradients of the selective scan: all states of a tile from the one that enters it, then the recurrence backwards.

With g_t = dy_t silu(z_t) and u_t = dt_t x_t:

    dh_t = g_t C_t^T + exp(dt_{t+1} A) dh_{t+1},        e_t = dh_t exp(dt_t A) h_{t-1}
    dA = sum_t dt_t e_t,    d(dt_t) = sum_n A e_t + x_t du_t,    du_t = dh_t B_t,    dx_t = dt_t du_t + D g_t
    dB_t = u_t^T dh_t,      dC_t = g_t^T h_t

The last two are sums over channels, that is over threads, which by shuffles would cost as much as all else together. A product
of matrices sums them instead.
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
    load_tile,
    pick,
    sigmoid,
    step_sizes,
    store_tile,
)


@triton.jit
def store_sums(to, a, b, weights, rows, NS: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, EXACT: tl.constexpr):
    """sum_d a[t, n, d] weights[2 t, d] and sum_d b[t, n, d] weights[2 t + 1, d], to [TILE, NP, 2] of a tile of `rows` tokens.

    tf32 has two digits more than bfloat16, to which the sums are rounded; of other dtypes EXACT, three products for one.
    The product makes those of all pairs of tokens, of which one in TILE is wanted: the tensor cores have nothing else to do.
    """
    v, w = tl.arange(0, TILE * NS * 2), tl.arange(0, TILE * 2)
    both = tl.reshape(tl.permute(tl.join(a, b), (0, 1, 3, 2)), (TILE * NS * 2, BD))
    pairs = tl.dot(both, tl.trans(weights), input_precision="tf32x3" if EXACT else "tf32")
    t = v // (2 * NS)
    at = (to + t * (2 * NP) + v % (2 * NS))[:, None] + tl.zeros((TILE * 2,), tl.int32)[None, :]
    tl.store(at, pairs, ((2 * t + v % 2)[:, None] == w[None, :]) & (t < rows)[:, None])


@triton.jit(do_not_specialize=RUN_TIME, do_not_specialize_on_alignment=UNALIGNED)
def gradient_kernel(
    x, dt, A, BC, D, z, bias, states, dy, d_final, d_initial, dx, ddt, dz, dA, dBC, dD, dbias, carry, table,
    T, row_blocks, segment_blocks, row_segments, given, tokens,
    WIDTH: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, NS: tl.constexpr, BD: tl.constexpr,
    X_STRIDE: tl.constexpr, DT_STRIDE: tl.constexpr, Z_STRIDE: tl.constexpr,
    GATE: tl.constexpr, SOFTPLUS: tl.constexpr, PACKED: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """One program: BD channels, a segment, NS states at a time. Arguments as in `walk_kernel`.

    dy, dx, ddt, dz: [tokens, WIDTH]; d_final, d_initial: [documents, N, WIDTH]. carry: [segments, N, WIDTH], the gradient of
    the state that leaves a segment of several, and from tile to tile that of the state between them. Partial sums, added up by
    the caller, so that every run gives the same bits: dA [segments, N, WIDTH], zeros before; dBC [WIDTH / BD, tokens, NP, 2];
    dD, dbias [segments, WIDTH].
    grid     (WIDTH / BD, segments)
    traffic  x, dt, z, dy, dx, ddt and dz once, and x, dt, z and dy again from the L2: 14 bytes a token and channel in
             bfloat16; of the states 2 at N = 16; of dBC N / 16
    cost     N + 9 special functions a token and channel, about 23 N instructions: what the kernel waits for
    oracle   hf_linear.ops.reference.selective_scan
    """
    segment = tl.program_id(1).to(tl.int64)
    of_row = segment // row_segments
    first_block = (tl.program_id(1) % row_segments) * segment_blocks
    last_block = tl.minimum(first_block + segment_blocks, row_blocks)
    d, i = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, TILE)
    in_d = d < WIDTH
    SIZE: tl.constexpr = N * WIDTH
    D_, bias_ = tl.load(D + d, in_d, 0.0)[None, :], tl.load(bias + d, in_d, 0.0)[None, :]
    dD_, dbias_ = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    carry += segment * SIZE
    for part in range(0, last_block - first_block):
        block = of_row * row_blocks + last_block - 1 - part
        start, length = locate(block, T, row_blocks, table, PACKED, 1)
        document = of_row
        begins, ends = part == last_block - 1, (part == 0) & (last_block == row_blocks)
        if PACKED:
            document, place = tl.load(table + block * FIELDS + 2).to(tl.int64), tl.load(table + block * FIELDS + 3)
            begins, ends = (place & 1) != 0, (place & 2) != 0
        tiles = tl.cdiv(length, TILE)
        for back in range(0, tiles):
            tile = tiles - 1 - back
            first, rows = start + tile * TILE, length - tile * TILE
            dt_ = step_sizes(dt, bias_, first, rows, d, DT_STRIDE, WIDTH, BD, SOFTPLUS, PRECISE)
            x_, g = load_tile(x, first, rows, d, X_STRIDE, WIDTH, BD), load_tile(dy, first, rows, d, WIDTH, WIDTH, BD)
            if GATE:
                z_ = load_tile(z, first, rows, d, Z_STRIDE, WIDTH, BD)
                g *= z_ * sigmoid(z_, PRECISE)
            u = dt_ * x_
            weights = tl.reshape(tl.permute(tl.join(u, g), (0, 2, 1)), (TILE * 2, BD))
            y_, du, ddt_ = D_ * x_, tl.zeros((TILE, BD), tl.float32), tl.zeros((TILE, BD), tl.float32)
            enters = ends & (back == 0)
            behind = tl.where(enters, d_final + document * SIZE, carry)
            known = (given != 0) | (enters == 0)
            for n0 in range(0, NP, NS):
                n = n0 + tl.arange(0, NS)
                of_state, in_state = n[:, None] * WIDTH + d[None, :], (n < N)[:, None] & in_d[None, :]
                A_ = tl.load(A + of_state, in_state, 0.0)
                h = tl.load(states + (block * TILES + tile) * SIZE + of_state, in_state, 0.0).to(tl.float32)
                dh = tl.load(behind + of_state, in_state & known, 0.0)
                at = (first * NP + n0) * 2 + i[:, None] * (2 * NP) + tl.arange(0, 2 * NS)[None, :]
                B_, C_ = tl.split(tl.reshape(tl.load(BC + at), (TILE, NS, 2)))
                B_, C_ = B_[:, :, None], C_[:, :, None]
                decay = decay_of(dt_[:, None, :] * A_[None, :, :], PRECISE)
                added, read = u[:, None, :] * B_, g[:, None, :] * C_
                before, after = tl.zeros((TILE, NS, BD), tl.float32), tl.zeros((TILE, NS, BD), tl.float32)
                grad = tl.zeros((TILE, NS, BD), tl.float32)
                for t in tl.static_range(TILE):
                    here = (i == t)[:, None, None]
                    before = tl.where(here, h[None, :, :], before)
                    h = pick(decay, here, 0) * h + pick(added, here, 0)
                    after = tl.where(here, h[None, :, :], after)
                for t in tl.static_range(TILE):
                    here = (i == TILE - 1 - t)[:, None, None]
                    dh += pick(read, here, 0)
                    grad = tl.where(here, dh[None, :, :], grad)
                    dh *= pick(decay, here, 0)
                tl.store(carry + of_state, dh, in_state)
                tl.store(d_initial + document * SIZE + of_state, dh, in_state & begins & (tile == 0))
                e = grad * decay * before
                for k in tl.static_range(NS):
                    here = (tl.arange(0, NS) == k)[None, :, None]
                    y_ += pick(after * C_, here, 1)
                    du += pick(grad * B_, here, 1)
                    ddt_ += pick(e * A_[None, :, :], here, 1)
                to_dA = dA + segment * SIZE + of_state
                tl.store(to_dA, tl.load(to_dA, in_state, 0.0) + tl.sum(e * dt_[:, None, :], 0), in_state)
                to = dBC + ((tl.program_id(0).to(tl.int64) * tokens + first) * NP + n0) * 2
                store_sums(to, grad, after, weights, rows, NS, NP, BD, x.dtype.element_ty != tl.bfloat16)
            # The inputs again: their registers would be missed above.
            x_ = load_tile(x, first, rows, d, X_STRIDE, WIDTH, BD)
            ddt_ = ddt_ * 0.6931471805599453 + x_ * du
            if SOFTPLUS:
                raw = load_tile(dt, first, rows, d, DT_STRIDE, WIDTH, BD, float("-inf"))
                ddt_ *= sigmoid(raw + bias_, PRECISE)
            else:
                ddt_ = tl.where((i < rows)[:, None], ddt_, 0.0)
            dD_ += tl.sum(g * x_, 0)
            dbias_ += tl.sum(ddt_, 0)
            store_tile(dx, first, rows, d, dt_ * du + D_ * g, WIDTH, WIDTH, BD)
            store_tile(ddt, first, rows, d, ddt_, WIDTH, WIDTH, BD)
            if GATE:
                z_ = load_tile(z, first, rows, d, Z_STRIDE, WIDTH, BD)
                gate = sigmoid(z_, PRECISE)
                slope = gate * (1 + z_ * (1 - gate))
                store_tile(dz, first, rows, d, load_tile(dy, first, rows, d, WIDTH, WIDTH, BD) * y_ * slope, WIDTH, WIDTH, BD)
    tl.store(dD + segment * WIDTH + d, dD_, in_d)
    tl.store(dbias + segment * WIDTH + d, dbias_, in_d)
