"""The gradients of q, k and g, all pairs of chunks in parallel, from the states that enter and leave each pair.

With S the state entering the pair and dS the gradient of the state leaving it, A the scores within the pair:

    dq = do S^T exp(G),   dk = v dS^T exp(G_end - G),   dA = do v^T,   d exp(G_end) = sum_v S dS

and what dA adds to dq and dk, in the form, mild or exact, that `scores` explains; here over a pair's 128 tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_linear.kernels.layout import PAIR, locate
from hf_linear.kernels.scores import across, exp, scalar_decays, widen


@triton.jit(do_not_specialize=["T", "row_pairs", "H", "tokens", "token_stride", "head_stride"])
def gradient_kernel(
    q, k, v, do, g, total, states, d_states, dq, dk, dg, table,
    scale, mild, T, row_pairs, H, tokens, token_stride, head_stride,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    VECTOR: tl.constexpr, EXACT: tl.constexpr, PACKED: tl.constexpr, DG: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile of BK channels, a pair, a head. In scalar mode dg is [KP / BK, tokens, H], a part a tile."""
    pair, h = tl.program_id(1), tl.program_id(2)
    at_pair = (pair * H + h).to(tl.int64)
    start, length = locate(pair, T, row_pairs, table, PACKED, 1)
    i = tl.arange(0, PAIR)
    row, col = i[:, None], i[None, :]
    c = tl.program_id(0) * BK + tl.arange(0, BK)
    dtype = states.dtype.element_ty
    at_total = total + (2 * pair * H + h).to(tl.int64) * KP + c
    whole = tl.load(at_total) + tl.load(at_total + H * KP)
    if VECTOR:
        if (tl.min(whole, 0) < -mild) != EXACT:
            return

    dq_ = tl.zeros((PAIR, BK), tl.float32)
    dk_ = tl.zeros((PAIR, BK), tl.float32)
    da = tl.zeros((PAIR, PAIR), tl.float32)
    d_decay = tl.zeros((BK,), tl.float32)
    for v0 in range(0, VP, BV):
        v_ = v0 + tl.arange(0, BV)
        state_at = at_pair * (KP * VP) + v_[:, None] * KP + c[None, :]
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
    if VECTOR:
        da = tl.where(row > col, da, 0.0) * scale
        to_start = tl.load(g + at, inside, 0.0).to(tl.float32)
        if EXACT:
            to_end = tl.zeros_like(to_start)
            dq_near = tl.zeros((PAIR, BK), tl.float32)
            dk_near = tl.zeros((PAIR, BK), tl.float32)
            for level in range(7):
                second, decay, later, earlier = across(q_, k_, to_start, to_end, level, dtype, PRECISION)
                meets = (row >> (level + 1) == col >> (level + 1)) & second & ((col >> level) % 2 == 0)
                block = tl.where(meets, da, 0.0).to(dtype)
                dq_near += tl.dot(block, earlier, input_precision=PRECISION) * decay
                dk_near += tl.dot(tl.trans(block), later, input_precision=PRECISION) * decay
                to_start, to_end = widen(to_start, to_end, second, level)
            dq_ = dq_ * (exp(to_start, PRECISION) * scale) + dq_near
            dk_ *= exp(to_end, PRECISION)
        else:
            to_start = tl.cumsum(to_start, 0)
            decay, growth = exp(to_start, PRECISION), exp(-to_start, PRECISION)
            block = da.to(dtype)
            dq_ = tl.dot(block, (k_ * growth).to(dtype), dq_ * scale, input_precision=PRECISION) * decay
            dk_near = tl.dot(tl.trans(block), (q_ * decay).to(dtype), input_precision=PRECISION) * growth
            dk_ *= exp(whole, PRECISION)[None, :] * growth
        if DG:
            # g_t decays what a later token reads from an earlier one or from the state before, what earlier tokens leave in
            # the state, and the state itself. A token's score with itself does not depend on g.
            left, leaving = k_ * dk_, d_decay * exp(whole, PRECISION)
            read = q_ * dq_ - k_ * dk_near
            if EXACT:
                dg_ = tl.cumsum(read, 0, reverse=True) + (tl.cumsum(left, 0) - left) + leaving[None, :]
            else:
                # What earlier tokens leave is all that is left less what later ones leave: a scan less, and where decays are
                # mild the difference loses nothing that low precision had.
                dg_ = tl.cumsum(read - left, 0, reverse=True) + (leaving + tl.sum(left, 0))[None, :]
            tl.store(dg + at, dg_.to(dg.dtype.element_ty), inside)
        dk_ += dk_near
    else:
        between, to_start, to_end, _ = scalar_decays(g, start, length, h, token_stride, head_stride, PAIR, PRECISION)
        block = (tl.where(row > col, da * between, 0.0) * scale).to(dtype)
        dq_far = dq_ * (exp(to_start, PRECISION) * scale)[:, None]
        dq_ = tl.dot(block, k_.to(dtype), dq_far, input_precision=PRECISION)
        dk_ *= exp(to_end, PRECISION)[:, None]
        dk_near = tl.dot(tl.trans(block), q_.to(dtype), input_precision=PRECISION)
        if DG:
            # The same four parts; a sum over masks where a running sum less its own term would cancel.
            left = tl.sum(k_ * dk_, 1)
            dg_ = tl.sum(tl.where(row > col, left[None, :], 0.0), 1) + tl.sum(d_decay * exp(whole, PRECISION), 0)
            if PRECISION == "tf32x3":
                pairs = tl.dot(q_, tl.trans(k_), input_precision=PRECISION) * block
                across_t = tl.where(row > col, tl.cumsum(pairs, 0, reverse=True), 0.0)
                dg_ += tl.cumsum(tl.sum(q_ * dq_far, 1), 0, reverse=True) + tl.sum(across_t, 1)
            else:
                dg_ += tl.cumsum(tl.sum(q_ * dq_ - k_ * dk_near, 1), 0, reverse=True)
            to = dg + (tl.program_id(0) * tokens + start + i) * H + h
            tl.store(to, dg_, i < length)
        dk_ += dk_near
    tl.store(dq + at, (dq_ + diagonal * k_).to(dq.dtype.element_ty), inside)
    tl.store(dk + at, (dk_ + diagonal * q_).to(dk.dtype.element_ty), inside)
