"""One decay a head and token: its sums within a block, and the gradient of it.

The decay from token j to a later one i of the same block is exp(P_i - P_j), P the running sum of g. P is kept as two float32
numbers, the first a multiple of 1/256: its differences are exact, so a weak decay that follows a strong one keeps all its
digits, as it would not in one number.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_linear.kernels.layout import BLOCK, locate
from hf_linear.kernels.precise import exp

LEAST = tl.constexpr(-200.0)  # exp of it is 0 in float32; with it 128 sums stay below 2^15, and exact multiples of 1/256
# Of a block's [4, 128] decays: the two parts of P, exp(P), and exp(P_end - P). exp(P) of the last token is the block's decay.
COARSE, FINE, FROM_START, TO_END = tl.constexpr(0), tl.constexpr(128), tl.constexpr(256), tl.constexpr(384)
WIDTH = tl.constexpr(512)


@triton.jit(do_not_specialize=["T", "row_blocks", "H", "token_stride", "head_stride"])
def decays_kernel(g, decays, table, T, row_blocks, H, token_stride, head_stride, PACKED: tl.constexpr):
    """decays [blocks, H, 4, 128] float32 from g <= 0. One program: a block, a head."""
    block, h = tl.program_id(0), tl.program_id(1)
    start, length = locate(block, T, row_blocks, table, PACKED, 1)
    i = tl.arange(0, BLOCK)
    own = tl.load(g + h * head_stride + (start + i) * token_stride, i < length, 0.0).to(tl.float32)
    own = tl.maximum(own, LEAST).to(tl.float64)
    sums = tl.cumsum(own, 0)
    coarse = tl.floor(sums.to(tl.float32) * 256.0) * 0.00390625
    to = decays + (block * H + h).to(tl.int64) * WIDTH + i
    tl.store(to + COARSE, coarse)
    tl.store(to + FINE, (sums - coarse.to(tl.float64)).to(tl.float32))
    tl.store(to + FROM_START, exp(sums.to(tl.float32), "tf32x3"))
    tl.store(to + TO_END, exp((tl.sum(own, 0) - sums).to(tl.float32), "tf32x3"))


@triton.jit
def between(decays, i, LATER: tl.constexpr, PRECISION: tl.constexpr):
    """exp(P_i - P_j) for rows i and all 128 columns j, 0 where j is later; LATER: exp(P_j - P_i), 0 where j is earlier."""
    row, j = i[:, None], tl.arange(0, BLOCK)
    col = j[None, :]
    total = tl.load(decays + COARSE + i)[:, None] - tl.load(decays + COARSE + j)[None, :]
    total += tl.load(decays + FINE + i)[:, None] - tl.load(decays + FINE + j)[None, :]
    if LATER:
        return tl.where(row <= col, exp(tl.minimum(-total, 0.0), PRECISION), 0.0)
    return tl.where(row >= col, exp(tl.minimum(total, 0.0), PRECISION), 0.0)


@triton.jit(do_not_specialize=["scale", "T", "row_blocks", "H", "tokens"])
def decay_gradient_kernel(
    q, k, v, do, decays, states, d_states, read, left, dg, table, scale, T, row_blocks, H, tokens,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    READ_PARTS: tl.constexpr, LEFT_PARTS: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dg [tokens, H] float32, a block and a head a program.

    g_t decays what token i >= t reads of a token j < t, what it reads of the state before the block (read_i = q_i . dq_i, that
    part of it), what token j < t leaves in the state (left_j = k_j . dk_j, that part of it), and the state itself. All of
    these are added up; none is the difference of two larger sums.
    """
    block, h = tl.program_id(0), tl.program_id(1)
    at_block = (block * H + h).to(tl.int64)
    start, length = locate(block, T, row_blocks, table, PACKED, 1)
    i = tl.arange(0, BLOCK)
    row, col = i[:, None], i[None, :]
    dtype = states.dtype.element_ty
    scores = tl.zeros((BLOCK, BLOCK), tl.float32)
    for c0 in range(0, KP, BK):
        c = c0 + tl.arange(0, BK)
        at = (start * H + h) * K + row * (H * K) + c[None, :]
        inside = (row < length) & (c < K)[None, :]
        q_, k_ = tl.load(q + at, inside, 0.0).to(dtype), tl.load(k + at, inside, 0.0).to(dtype)
        scores = tl.dot(q_, tl.trans(k_), scores, input_precision=PRECISION)
    d_scores = tl.zeros((BLOCK, BLOCK), tl.float32)
    for v0 in range(0, VP, BV):
        v_ = v0 + tl.arange(0, BV)
        at = (start * H + h) * V + row * (H * V) + v_[None, :]
        inside = (row < length) & (v_ < V)[None, :]
        do_, v_ = tl.load(do + at, inside, 0.0).to(dtype), tl.load(v + at, inside, 0.0).to(dtype)
        d_scores = tl.dot(do_, tl.trans(v_), d_scores, input_precision=PRECISION)
    own_decays = decays + at_block * WIDTH
    pairs = scores * d_scores * between(own_decays, i, False, PRECISION) * scale
    pairs = tl.where(row > col, pairs, 0.0)
    across = tl.where(row > col, tl.cumsum(pairs, 0, reverse=True), 0.0)  # over i >= t: [t, j], of which j < t count
    total = tl.sum(across, 1)

    of_state = 0.0
    for n in range(0, KP * VP, 4096):
        at = at_block * (KP * VP) + n + tl.arange(0, 4096)
        of_state += tl.sum(tl.load(states + at).to(tl.float32) * tl.load(d_states + at).to(tl.float32), 0)
    total += of_state * tl.load(own_decays + FROM_START + BLOCK - 1)

    at = (start + i) * H + h
    read_ = tl.zeros((BLOCK,), tl.float32)
    left_ = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(READ_PARTS):
        read_ += tl.load(read + part * tokens * H + at, i < length, 0.0)
    for part in tl.static_range(LEFT_PARTS):
        left_ += tl.load(left + part * tokens * H + at, i < length, 0.0)
    total += tl.cumsum(read_, 0, reverse=True)
    total += tl.sum(tl.where(row > col, tl.zeros_like(pairs) + left_[None, :], 0.0), 1)
    tl.store(dg + at, total, i < length)
