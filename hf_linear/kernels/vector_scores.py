"""What tokens of a chunk are to each other: decayed scores, and decays to the chunk's two ends.

A decay a key channel needs exp(sum of g_c over (j, i]) for every pair of tokens and channel. Two forms:

mild:   while no channel decays by more than exp(-MILD) over the chunk, k_j exp(-G_j) cannot overflow, and one product of
        q_i exp(G_i) with it gives all pairs.
exact:  by halving. The second half of a block of 2m tokens reaches the first through the boundary between them: decay the
        query back to it and the key forward to it, and multiply; m = 1, 2, 4, ... covers every pair of tokens once. Each
        exponent is a sum of log-decays over the tokens in between, never a difference of running sums, and so <= 0.

Both kernels are launched; a chunk's flag says which of them has work to do. One flag a chunk and head, set by the mild one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_linear.kernels.layout import locate
from hf_linear.kernels.precise import exp

CHUNK = tl.constexpr(64)  # tokens; two make a block

# exp(MILD) is far from the largest number of the dtype, and 1 / exp(MILD) far from the smallest. In float32 a difference of
# running sums would be the largest error there is: always exact.
MILD = {torch.bfloat16: 60.0, torch.float16: 8.0, torch.float32: 0.0}


@triton.jit
def across(q, k, to_start, to_end, level, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Queries of second halves and keys of first halves of blocks of 2m rows, m = 2^level, decayed to their boundaries."""
    second = (tl.arange(0, to_start.shape[0])[:, None] >> level) % 2 == 1
    decay = exp(tl.where(second, to_start, to_end), PRECISION)
    later = tl.where(second, q * decay, 0.0).to(dtype)
    earlier = tl.where(second, 0.0, k * decay).to(dtype)
    return second, decay, later, earlier


@triton.jit
def widen(to_start, to_end, second, level):
    """From blocks of m rows, m = 2^level, to blocks of 2m: sums of g from the block's start through a row, and from behind it
    to the end. The two add up to the block's total, which the partner half needs."""
    row = tl.arange(0, to_start.shape[0])[:, None] + tl.zeros_like(to_start).to(tl.int32)
    partner = tl.gather(to_start + to_end, row ^ (1 << level), 0)
    return to_start + tl.where(second, partner, 0.0), to_end + tl.where(second, 0.0, partner)


@triton.jit(do_not_specialize=["scale", "mild", "T", "row_blocks", "H"])
def scores_kernel(
    q, k, g, x, z, scores, total, strong, table, scale, mild, T, row_blocks, H,
    K: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scores_ij = scale sum_c q_ic k_jc exp(sum of g_c over (j, i]); x, z: q decayed from the start, k to the end.

    x, z, scores and total lie chunk by chunk, padded to whole chunks and KP channels, so that the walk needs no masks.
    """
    chunk, h = tl.program_id(0), tl.program_id(1)
    at_chunk = (chunk * H + h).to(tl.int64)
    if EXACT:
        if tl.load(strong + at_chunk) == 0:
            return
    start, length = locate(chunk, T, row_blocks, table, PACKED, 2)
    i = tl.arange(0, CHUNK)
    row, col = i[:, None], i[None, :]
    dtype = scores.dtype.element_ty
    acc = tl.zeros((CHUNK, CHUNK), tl.float32)
    strongest = 0.0
    for c0 in range(0, KP, BK):
        c = c0 + tl.arange(0, BK)
        inside = (row < length) & (c < K)[None, :]
        at = (start * H + h) * K + row * (H * K) + c[None, :]
        q_ = tl.load(q + at, inside, 0.0)
        k_ = tl.load(k + at, inside, 0.0)
        g_ = tl.load(g + at, inside, 0.0).to(tl.float32)
        if EXACT:
            to_start, to_end = g_, tl.zeros_like(g_)
            acc += tl.where(row == col, tl.dot(q_.to(dtype), tl.trans(k_.to(dtype)), input_precision=PRECISION), 0.0)
            for level in range(6):
                second, _, later, earlier = across(q_, k_, to_start, to_end, level, dtype, PRECISION)
                block = tl.dot(later, tl.trans(earlier), input_precision=PRECISION)
                acc += tl.where(row >> (level + 1) == col >> (level + 1), block, 0.0)
                to_start, to_end = widen(to_start, to_end, second, level)
            whole = tl.sum(tl.where(row == 0, to_start + to_end, 0.0), 0)
            x_ = q_ * exp(to_start, PRECISION)
            z_ = k_ * exp(to_end, PRECISION)
        else:
            to_start = tl.cumsum(g_, 0)
            whole = tl.sum(g_, 0)
            strongest = tl.minimum(strongest, tl.min(whole, 0))
            x_ = q_ * exp(to_start, PRECISION)
            # Not rounded to the inputs' dtype: the scores are, which is error enough.
            undecayed = tl.trans(k_ * exp(-to_start, PRECISION))
            acc = tl.dot(x_, undecayed, acc, input_precision="tf32x3" if dtype == tl.float16 else "tf32")
            z_ = k_ * exp(whole[None, :] - to_start, PRECISION)
        to = (at_chunk * CHUNK + row) * KP + c[None, :]
        tl.store(x + to, (x_ * scale).to(dtype))
        tl.store(z + to, z_.to(dtype))
        tl.store(total + at_chunk * KP + c, whole)
    acc = tl.where(row >= col, acc, 0.0) * scale
    tl.store(scores + (at_chunk * CHUNK + row) * CHUNK + col, acc.to(dtype))
    if not EXACT:
        tl.store(strong + at_chunk, (strongest < -mild).to(tl.int8))
