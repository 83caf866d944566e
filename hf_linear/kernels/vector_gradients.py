"""The gradients of q, k and g, all blocks in parallel, from the states that enter and leave each.

With S the state entering the block and dS the gradient of the state leaving it, A the scores within the block:

    dq = do S^T exp(G),   dk = v dS^T exp(G_end - G),   dA = do v^T,   d exp(G_end) = sum_v S dS

and what dA adds to dq and dk, in the form, mild or exact, that `vector_scores` explains; here over 128 tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_linear.kernels.layout import BLOCK, locate
from hf_linear.kernels.precise import exp
from hf_linear.kernels.vector_scores import across, widen


@triton.jit(do_not_specialize=["scale", "mild", "T", "row_blocks", "H"])
def gradient_kernel(
    q, k, v, do, g, total, states, d_states, dq, dk, dg, table,
    scale, mild, T, row_blocks, H,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    EXACT: tl.constexpr, PACKED: tl.constexpr, DG: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile of BK channels, a block, a head."""
    block, h = tl.program_id(1), tl.program_id(2)
    at_block = (block * H + h).to(tl.int64)
    start, length = locate(block, T, row_blocks, table, PACKED, 1)
    i = tl.arange(0, BLOCK)
    row, col = i[:, None], i[None, :]
    c = tl.program_id(0) * BK + tl.arange(0, BK)
    dtype = states.dtype.element_ty
    at_total = total + (2 * block * H + h).to(tl.int64) * KP + c
    whole = tl.load(at_total) + tl.load(at_total + H * KP)
    if (tl.min(whole, 0) < -mild) != EXACT:
        return

    dq_ = tl.zeros((BLOCK, BK), tl.float32)
    dk_ = tl.zeros((BLOCK, BK), tl.float32)
    da = tl.zeros((BLOCK, BLOCK), tl.float32)
    d_decay = tl.zeros((BK,), tl.float32)
    for v0 in range(0, VP, BV):
        v_ = v0 + tl.arange(0, BV)
        state_at = at_block * (KP * VP) + v_[:, None] * KP + c[None, :]
        s = tl.load(states + state_at)
        ds = tl.load(d_states + state_at)
        v_at = (start * H + h) * V + row * (H * V) + v_[None, :]
        v_inside = (row < length) & (v_ < V)[None, :]
        y = tl.load(v + v_at, v_inside, 0.0).to(dtype)
        dy = tl.load(do + v_at, v_inside, 0.0).to(dtype)
        dq_ = tl.dot(dy, s, dq_, input_precision=PRECISION)
        dk_ = tl.dot(y, ds, dk_, input_precision=PRECISION)
        da = tl.dot(dy, tl.trans(y), da, input_precision=PRECISION)
        if DG:
            d_decay += tl.sum(s.to(tl.float32) * ds.to(tl.float32), 0)

    at = (start * H + h) * K + row * (H * K) + c[None, :]
    inside = (row < length) & (c < K)[None, :]
    q_ = tl.load(q + at, inside, 0.0)
    k_ = tl.load(k + at, inside, 0.0)
    diagonal = tl.sum(tl.where(row == col, da, 0.0), 1)[:, None] * scale
    da = tl.where(row > col, da, 0.0) * scale
    to_start = tl.load(g + at, inside, 0.0).to(tl.float32)
    # `read` is what g_t takes of later tokens' reading: the difference of sums over pairs of tokens, most of which cancel. It
    # is made of the factors as the products round them, so that they do cancel.
    if EXACT:
        to_end = tl.zeros_like(to_start)
        dq_near = tl.zeros((BLOCK, BK), tl.float32)
        dk_near = tl.zeros((BLOCK, BK), tl.float32)
        read = tl.zeros((BLOCK, BK), tl.float32)
        for level in range(7):
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
        dq_ += dq_near
        dk_ += dk_near
    else:
        to_start = tl.cumsum(to_start, 0)
        near = da.to(dtype)
        later, earlier = (q_ * exp(to_start, PRECISION)).to(dtype), (k_ * exp(-to_start, PRECISION)).to(dtype)
        to_later = tl.dot(near, earlier, input_precision=PRECISION)
        dq_ *= exp(to_start, PRECISION) * scale
        read = q_ * dq_ + later * to_later
        dq_ += to_later * exp(to_start, PRECISION)
        to_earlier = tl.dot(tl.trans(near), later, input_precision=PRECISION)
        dk_ *= exp(whole[None, :] - to_start, PRECISION)
        read -= earlier * to_earlier
        left = k_ * dk_
        dk_ += to_earlier * exp(-to_start, PRECISION)
    tl.store(dq + at, (dq_ + diagonal * k_).to(dq.dtype.element_ty), inside)
    tl.store(dk + at, (dk_ + diagonal * q_).to(dk.dtype.element_ty), inside)
    if DG:
        # Besides, g_t decays what earlier tokens leave in the state, and the state itself. A token's score with itself does
        # not depend on g.
        leaving = d_decay * exp(whole, PRECISION)
        if EXACT:
            dg_ = tl.cumsum(read, 0, reverse=True) + (tl.cumsum(left, 0) - left) + leaving[None, :]
        else:
            # What earlier tokens leave is all that is left less what later ones leave: a scan less, and where decays are
            # mild the difference loses nothing that low precision had.
            dg_ = tl.cumsum(read - left, 0, reverse=True) + (leaving + tl.sum(left, 0))[None, :]
        tl.store(dg + at, dg_.to(dg.dtype.element_ty), inside)
