"""A decay a head, forward, where rows and heads are many: the state stays in registers, and no state is written.

    z = exp(P_end - P) k,    A = scale D * q k^T            (`pairs_kernel`, chunks of C tokens in parallel)
    o = scale exp(P) q S + A v,    S <- exp(P_end) S + z^T v    (`walk_kernel`, chunk after chunk)

P runs from the start of a chunk. Tensor descriptors fetch the tiles: without pointers the state of 128 values for 256 keys
leaves registers enough. S^T is the left operand of S^T q^T, so its copy in the tensor cores' dtype stays in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_linear.kernels.layout import BLOCK, locate, of_document
from hf_linear.kernels.precise import exp
from hf_linear.kernels.scalar_decays import COARSE, FINE, WIDTH


@triton.jit(do_not_specialize=["scale", "T", "row_blocks", "H"])
def pairs_kernel(
    q, k, z, scores, from_start, decays, table, scale, T, row_blocks, H,
    C: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z [chunks, H, C, KP], scores [chunks, H, C, C] and exp(P) [chunks, H, C] float32. One program: a chunk, a head."""
    chunk, h = tl.program_id(0), tl.program_id(1)
    block, part = chunk // (BLOCK // C), chunk % (BLOCK // C)
    start, length = locate(chunk, T, row_blocks, table, PACKED, BLOCK // C)
    i = tl.arange(0, C)
    inside = (i < length)[:, None]
    dtype = z.dtype.element_ty
    own = decays + (block * H + h).to(tl.int64) * WIDTH + part * C
    coarse, fine = tl.load(own + COARSE + i), tl.load(own + FINE + i)
    coarse_before = tl.load(own + COARSE - 1, part > 0, 0.0)  # the sums up to the chunk
    fine_before = tl.load(own + FINE - 1, part > 0, 0.0)
    coarse_end, fine_end = tl.load(own + COARSE + C - 1), tl.load(own + FINE + C - 1)
    to_end = exp((coarse_end - coarse) + (fine_end - fine), PRECISION)
    at_chunk = (chunk * H + h).to(tl.int64)
    tl.store(from_start + at_chunk * C + i, exp((coarse - coarse_before) + (fine - fine_before), PRECISION))
    pairs = tl.zeros((C, C), tl.float32)
    for c0 in range(0, KP, BK):
        c = c0 + tl.arange(0, BK)
        at = (start * H + h) * K + i[:, None] * (H * K) + c[None, :]
        in_tile = inside & ((c < K) | (K == KP))[None, :]
        q_, k_ = tl.load(q + at, in_tile, 0.0).to(dtype), tl.load(k + at, in_tile, 0.0).to(dtype)
        tl.store(z + at_chunk * (C * KP) + i[:, None] * KP + c[None, :], (k_ * to_end[:, None]).to(dtype))
        pairs = tl.dot(q_, tl.trans(k_), pairs, input_precision=PRECISION)
    between = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    pairs *= tl.where(i[:, None] >= i[None, :], exp(tl.minimum(between, 0.0), PRECISION), 0.0) * scale
    tl.store(scores + at_chunk * (C * C) + i[:, None] * C + i[None, :], pairs.to(dtype))


@triton.jit(do_not_specialize=["scale", "T", "row_blocks", "H", "segment_blocks", "row_segments", "given"])
def walk_kernel(
    q, z, v, scores, from_start, out, entering, initial, final, table,
    scale, T, row_blocks, H, segment_blocks, row_segments, given,
    C: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BV values of the state for all keys, a segment of a row, a head.

    entering [rows * row_segments, H, K, V] float32: the state before any segment but a row's first; initial, if `given`, and
    final [rows, H, K, V]: before and after a row; of packed documents final alone.
    """
    segment, h = tl.program_id(1), tl.program_id(2)
    row = segment // row_segments
    from_block = segment % row_segments * segment_blocks
    parts: tl.constexpr = BLOCK // C
    chunks = row_blocks * parts if PACKED else tl.cdiv(T, C)
    steps = tl.minimum(segment_blocks * parts, chunks - from_block * parts)
    v0 = tl.program_id(0) * BV
    v_, c, i = v0 + tl.arange(0, BV), tl.arange(0, KP), tl.arange(0, C)
    dtype = z.dtype.element_ty
    at_row = row.to(tl.int64) * T * H + h
    first = ((row * row_blocks + from_block) * parts * H + h).to(tl.int64)  # chunks of a head lie H apart
    queries = tl.make_tensor_descriptor(q + at_row * K, [T, K], [H * K, 1], [C, KP])
    values = tl.make_tensor_descriptor(v + at_row * V, [T, V], [H * V, 1], [C, BV])
    outputs = tl.make_tensor_descriptor(out + at_row * V, [T, V], [H * V, 1], [C, BV])
    of_row = (row_blocks - from_block) * H * BLOCK
    keys = tl.make_tensor_descriptor(z + first * (C * KP), [of_row, KP], [KP, 1], [C, KP])
    pairs = tl.make_tensor_descriptor(scores + first * (C * C), [of_row, C], [C, 1], [C, C])

    at_row_state = (row * H + h).to(tl.int64) * (K * V)
    of_user = v_[:, None] + c[None, :] * V
    in_user = ((v_ < V) | (V % BV == 0))[:, None] & ((c < K) | (K == KP))[None, :]
    begins = segment % row_segments == 0
    at_segment = entering + (segment * H + h).to(tl.int64) * (K * V)
    if PACKED:
        s = tl.load(at_segment + of_user, in_user & (row_segments > 1), 0.0)
    else:
        before = tl.where(begins, initial + at_row_state, at_segment)
        s = tl.load(before + of_user, in_user & tl.where(begins, given != 0, True), 0.0)
    at_decays = from_start + first * C
    next_start, next_length = locate(from_block * parts, T, row_blocks, table, PACKED, parts)
    next_document, next_place = of_document(from_block, table, PACKED)
    for step in range(0, steps):
        at, token = step * H * C, from_block * BLOCK + step * C
        if PACKED:  # the table is read a step ahead
            token, length, document, place = next_start.to(tl.int32), next_length, next_document, next_place
            part = (from_block * parts + step) % parts
            following = from_block * parts + tl.minimum(step + 1, steps - 1)
            next_start, next_length = locate(following, T, row_blocks, table, PACKED, parts)
            next_document, next_place = of_document(following // parts, table, PACKED)
            at_document = (document * H + h).to(tl.int64) * (K * V)
            s = tl.where((part == 0) & (place % 2 == 1), 0.0, s)
        decay, whole = tl.load(at_decays + i), tl.load(at_decays + C - 1)  # they come while the first product runs
        at_decays += H * C
        o = tl.dot(s.to(dtype), tl.trans(queries.load([token, 0])), input_precision=PRECISION)
        y_t = tl.trans(values.load([token, v0]))
        if PACKED:  # the next document's tokens
            y_t = tl.where((i < length)[None, :], y_t, 0.0)
        o = tl.dot(y_t, tl.trans(pairs.load([at, 0])), o * (decay * scale)[None, :], input_precision=PRECISION)
        if PACKED:
            to = out + (token.to(tl.int64) * H + h) * V + i[:, None] * (H * V) + v_[None, :]
            tl.store(to, tl.trans(o.to(dtype)), (i < length)[:, None])
        else:
            outputs.store([token, v0], tl.trans(o.to(dtype)))
        s = tl.dot(y_t, keys.load([at, 0]), s * whole, input_precision=PRECISION)
        if PACKED:
            if (part == parts - 1) & (place >= 2):
                tl.store(final + at_document + of_user, s, in_user)
    if not PACKED:
        if segment % row_segments == row_segments - 1:
            tl.store(final + at_row_state + of_user, s, in_user)
