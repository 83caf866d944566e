"""The gradients of q, k and g, all chunks in parallel, from the states that enter and leave each.

With S the state entering the chunk, dS the gradient of the state leaving it and A the scores within the chunk:

    dq = do S^T exp(G),   dk = v dS^T exp(G_end - G),   dA = do v^T,   d exp(G_end) = sum_v S dS

and what dA adds to dq and dk, in the form, mild or exact, that `vector_scores` explains. In the mild form all of it is made of
x = scale q exp(G) and z = k exp(G_end - G), which the scores' kernel left, and of one exponential for each of the two:

    P = do S^T exp(G_end) + dA z,       dq = scale exp(G - G_end) P
    R = v dS^T exp(G_end) + dA^T x,     dk = exp(-G) R,     q dq - k dk = exp(-G_end) (x P - z R)

The last, summed over time, is what dg is made of: most pairs of tokens cancel there, and do because both products are of the
same rounded factors. A token's score with itself is in both, and cancels.

dS is kept of every chunk, S of every block alone: what enters its second chunk is made again, exp(G_end) S + z^T v over the
first. Most of that comes from the L2 cache, which the first chunk's own program has filled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_linear.kernels.layout import locate
from hf_linear.kernels.precise import exp
from hf_linear.kernels.vector_scores import CHUNK, across, widen

FLAGS = tl.constexpr(8)  # chunks a program of the exact form looks after at most: it seldom finds work


@triton.jit
def through_states(
    v, do, z, total, states, d_states, chunk, start, length, h, c, H,
    KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr, DG: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """do S^T, v dS^T, do v^T and, BV summands of it, sum_v S dS.

    S of a second chunk is made of what enters the block, S of a first one likewise, with z = 0 and no decay: one loop for both.
    """
    row = tl.arange(0, CHUNK)[:, None]
    dtype = states.dtype.element_ty
    second = chunk % 2
    at_first = ((chunk - second) * H + h).to(tl.int64)
    decay = exp(tl.load(total + at_first * KP + c, c < second * KP, 0.0), PRECISION)[None, :]
    z_first = tl.load(z + at_first * (CHUNK * KP) + (row * KP + c[None, :]), (c < second * KP)[None, :], 0.0)
    at_state, at_d_state = (chunk // 2 * H + h).to(tl.int64) * (KP * VP), (chunk * H + h).to(tl.int64) * (KP * VP)
    at_v = (start * H + h) * V
    at_v_first = at_v - CHUNK * H * V
    length_first = tl.where(length > 0, second * CHUNK, 0)
    dq = tl.zeros((CHUNK, c.shape[0]), tl.float32)
    dk = tl.zeros((CHUNK, c.shape[0]), tl.float32)
    da = tl.zeros((CHUNK, CHUNK), tl.float32)
    d_decay = tl.zeros((BV, c.shape[0]), tl.float32)
    for v0 in range(0, VP, BV):
        v_ = v0 + tl.arange(0, BV)
        s = tl.load(states + at_state + (v_[:, None] * KP + c[None, :]))
        ds = tl.load(d_states + at_d_state + (v_[:, None] * KP + c[None, :]))
        inside, inside_first = row < length, row < length_first
        if V < VP:
            inside, inside_first = inside & (v_ < V)[None, :], inside_first & (v_ < V)[None, :]
        y = tl.load(v + at_v + (row * (H * V) + v_[None, :]), inside, 0.0).to(dtype)
        y_first = tl.load(v + at_v_first + (row * (H * V) + v_[None, :]), inside_first, 0.0).to(dtype)
        dy = tl.load(do + at_v + (row * (H * V) + v_[None, :]), inside, 0.0).to(dtype)
        s = tl.dot(tl.trans(y_first), z_first, s * decay, input_precision=PRECISION)
        if DG:
            d_decay += s * ds.to(tl.float32)
        dq = tl.dot(dy, s.to(dtype), dq, input_precision=PRECISION)
        dk = tl.dot(y, ds, dk, input_precision=PRECISION)
        da = tl.dot(dy, tl.trans(y), da, input_precision=PRECISION)
    return dq, dk, da, d_decay


@triton.jit
def sums(triangle, x):
    """Running sums over rows, where triangle_ij = 1 for i <= j; x in two parts of the triangle's dtype."""
    high = x.to(triangle.dtype)
    low = (x - high.to(tl.float32)).to(triangle.dtype)
    return tl.dot(tl.trans(triangle), low, tl.dot(tl.trans(triangle), high))


@triton.jit(do_not_specialize=["scale", "T", "row_blocks", "H"])
def mild_gradient_kernel(
    v, do, g, x, z, total, strong, states, d_states, dq, dk, dg, table, scale, T, row_blocks, H,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PACKED: tl.constexpr, DG: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile of BK channels, a chunk, a head."""
    chunk, h = tl.program_id(1), tl.program_id(2)
    at_chunk = (chunk * H + h).to(tl.int64)
    flag = tl.load(strong + at_chunk)
    start, length = locate(chunk, T, row_blocks, table, PACKED, 2)
    c = tl.program_id(0) * BK + tl.arange(0, BK)
    dq_, dk_, da, d_decay = through_states(
        v, do, z, total, states, d_states, chunk, start, length, h, c, H, KP, V, VP, BV, DG, PRECISION
    )
    # Looked at late: it is rarely set, and the loads above do not wait for it. And ptxas makes one product wait for the other
    # where nothing parts the loop from what follows.
    if flag != 0:
        return

    i = tl.arange(0, CHUNK)
    row, col = i[:, None], i[None, :]
    dtype = states.dtype.element_ty
    at_k = (start * H + h) * K
    at = row * (H * K) + c[None, :]
    inside = row < length
    if K < KP:
        inside = inside & (c < K)[None, :]
    at_x = at_chunk * (CHUNK * KP)
    whole = tl.load(total + at_chunk * KP + c)
    x_ = tl.load(x + at_x + (row * KP + c[None, :]))
    z_ = tl.load(z + at_x + (row * KP + c[None, :]))
    da = tl.where(row >= col, da, 0.0)
    near = da.to(dtype)
    rest = (da - near.to(tl.float32)).to(dtype)  # without it the error of dg is above twice chunked PyTorch's
    triangle = tl.where(row <= col, 1.0, 0.0).to(dtype)
    decay = exp(whole, PRECISION)
    if DG:
        through = tl.sum(x_ * dq_ + d_decay * decay[None, :], 0)
    dq_ = tl.dot(rest, z_, tl.dot(near, z_, dq_ * decay[None, :]))
    dk_ = tl.dot(tl.trans(rest), x_, tl.dot(tl.trans(near), x_, dk_ * decay[None, :]))
    if DG:
        # g_t decays the state that enters, for all that is made of it, but what earlier tokens read of it; and so on.
        read = (x_ * dq_ - z_ * dk_) * exp(-whole, PRECISION)[None, :]
        # Products of float16 would overflow where those of gradients do.
        before = (sums(triangle, read) if dtype == tl.bfloat16 else tl.cumsum(read, 0)) - read
        tl.store(dg + at_k + at, (through[None, :] - before).to(dg.dtype.element_ty), inside)
    to_start = sums(triangle, tl.load(g + at_k + at, inside, 0.0).to(tl.float32))
    dq_ *= exp(to_start - whole[None, :], PRECISION) * scale
    dk_ *= exp(-to_start, PRECISION)
    tl.store(dq + at_k + at, dq_.to(dq.dtype.element_ty), inside)
    tl.store(dk + at_k + at, dk_.to(dk.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["scale", "T", "row_blocks", "chunks", "together", "H"])
def exact_gradient_kernel(
    q, k, v, do, g, z, total, strong, states, d_states, dq, dk, dg, table, scale, T, row_blocks, chunks, together, H,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PACKED: tl.constexpr, DG: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile of BK channels, those of `together` chunks that are strong, a head."""
    first, h = tl.program_id(1) * together, tl.program_id(2)
    last = tl.minimum(first + together, chunks)
    those = first + tl.arange(0, FLAGS)
    if tl.max(tl.load(strong + those * H + h, those < last, 0).to(tl.int32), 0) == 0:
        return
    i = tl.arange(0, CHUNK)
    row, col = i[:, None], i[None, :]
    c = tl.program_id(0) * BK + tl.arange(0, BK)
    dtype = states.dtype.element_ty
    for chunk in range(first, last):
        at_chunk = (chunk * H + h).to(tl.int64)
        if tl.load(strong + at_chunk) != 0:
            start, length = locate(chunk, T, row_blocks, table, PACKED, 2)
            dq_, dk_, da, d_decay = through_states(
                v, do, z, total, states, d_states, chunk, start, length, h, c, H, KP, V, VP, BV, DG, PRECISION
            )
            at = (start * H + h) * K + row * (H * K) + c[None, :]
            inside = (row < length) & (c < K)[None, :]
            q_ = tl.load(q + at, inside, 0.0)
            k_ = tl.load(k + at, inside, 0.0)
            diagonal = tl.sum(tl.where(row == col, da, 0.0), 1)[:, None] * scale
            da = tl.where(row > col, da, 0.0) * scale
            to_start = tl.load(g + at, inside, 0.0).to(tl.float32)
            to_end = tl.zeros_like(to_start)
            dq_near = tl.zeros((CHUNK, BK), tl.float32)
            dk_near = tl.zeros((CHUNK, BK), tl.float32)
            read = tl.zeros((CHUNK, BK), tl.float32)
            for level in range(6):
                second, decay, later, earlier = across(q_, k_, to_start, to_end, level, dtype, PRECISION)
                meets = (row >> (level + 1) == col >> (level + 1)) & second & ((col >> level) % 2 == 0)
                near = tl.where(meets, da, 0.0).to(dtype)
                to_later = tl.dot(near, earlier, input_precision=PRECISION)
                to_earlier = tl.dot(tl.trans(near), later, input_precision=PRECISION)
                dq_near += to_later * decay
                dk_near += to_earlier * decay
                read += later * to_later - earlier * to_earlier
                to_start, to_end = widen(to_start, to_end, second, level)
            dq_ *= exp(to_start, PRECISION) * scale
            dk_ *= exp(to_end, PRECISION)
            read += q_ * dq_
            left = k_ * dk_
            tl.store(dq + at, (dq_ + dq_near + diagonal * k_).to(dq.dtype.element_ty), inside)
            tl.store(dk + at, (dk_ + dk_near + diagonal * q_).to(dk.dtype.element_ty), inside)
            if DG:
                # Besides, g_t decays what earlier tokens leave in the state, and the state itself.
                whole = tl.sum(tl.where(row == 0, to_start + to_end, 0.0), 0)
                leaving = tl.sum(d_decay, 0) * exp(whole, PRECISION)
                dg_ = tl.cumsum(read, 0, reverse=True) + (tl.cumsum(left, 0) - left) + leaving[None, :]
                tl.store(dg + at, dg_.to(dg.dtype.element_ty), inside)
