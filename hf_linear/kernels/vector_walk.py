"""The state walks over the chunks, held transposed in registers, and writes outputs as it goes.

Forward in time, with A the scores of the chunk, x and z the decayed queries and keys:

    o = x S + A y,        S <- exp(total) S + z^T y,        y = v

Backward in time the same walk with x and z exchanged, A transposed and y = do gives dv and the gradient of the state. S^T is
the left operand of x S, so its copy in the tensor cores' dtype never leaves the registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_linear.kernels.layout import locate, of_document
from hf_linear.kernels.precise import exp
from hf_linear.kernels.vector_scores import CHUNK


@triton.jit
def load_state(base, v_, c, inside, V: tl.constexpr):
    """S^T [BV, BK] from a state [K, V] as users hold it; zeros outside."""
    return tl.load(base + v_[:, None] + c[None, :] * V, inside, 0.0)


@triton.jit
def store_state(base, state, v_, c, inside, V: tl.constexpr):
    tl.store(base + v_[:, None] + c[None, :] * V, state, inside)


# What is there to read and to write is known at run time only: a constant would make a kernel of its own of every combination.
RUN_TIME = (
    "T", "row_blocks", "segment_blocks", "segments", "H",
    "backwards", "has_states", "has_entering", "has_leaving", "has_passed", "has_initial", "has_final",
)  # fmt: skip


@triton.jit(do_not_specialize=RUN_TIME)
def walk_kernel(
    x, z, y, scores, total, out, states, entering, leaving, passed, initial, final, table,
    T, row_blocks, segment_blocks, segments, H,
    backwards, has_states, has_entering, has_leaving, has_passed, has_initial, has_final,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    BK: tl.constexpr, BLOCKS: tl.constexpr, BV: tl.constexpr,
    PACKED: tl.constexpr, INITIAL: tl.constexpr, OUTPUT: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile of the state, a segment of a row's chunks, a head.

    entering, leaving: the state before and after a segment; initial, final: of the documents of a packed row; passed: the
    segment's total decay. Outputs sum over all of K, so there the tile's one or two blocks of BK channels cover it.
    TRANSPOSED: A is. `states`, which are ours alone, are [VP, KP], padded: one a block forward, one a chunk backward.
    """
    segment, h = tl.program_id(1), tl.program_id(2)
    row = segment // segments
    from_block = (segment % segments) * segment_blocks
    to_block = tl.minimum(from_block + segment_blocks, row_blocks)
    v_tiles: tl.constexpr = VP // BV
    v_tile, k_tile = tl.program_id(0) % v_tiles, tl.program_id(0) // v_tiles
    v_ = v_tile * BV + tl.arange(0, BV)
    c0 = k_tile * (BK * BLOCKS) + tl.arange(0, BK)
    c1 = BK + c0
    own0, own1 = v_[:, None] * KP + c0[None, :], v_[:, None] * KP + c1[None, :]
    # Widths without padding need no masks.
    in_v = ((v_ < V) | (V == VP))[:, None]
    inside0, inside1 = in_v & ((c0 < K) | (K == KP))[None, :], in_v & ((c1 < K) | (K == KP))[None, :]
    i = tl.arange(0, CHUNK)
    dtype = scores.dtype.element_ty

    at_segment = (segment * H + h).to(tl.int64) * (K * V)
    s0 = load_state(entering + at_segment, v_, c0, inside0 & (has_entering != 0), V)
    s1 = s0
    if BLOCKS == 2:
        s1 = load_state(entering + at_segment, v_, c1, inside1 & (has_entering != 0), V)
    passed0 = tl.zeros((BK,), tl.float32)
    passed1 = tl.zeros((BK,), tl.float32)

    steps = 2 * (to_block - from_block)
    chunk = 2 * (row * row_blocks + from_block) + backwards * (steps - 1)
    ahead = 1 - 2 * backwards
    # The pipeliner fetches ahead only what feeds a product; decays and places are fetched a step ahead by hand.
    next0 = tl.load(total + (chunk * H + h).to(tl.int64) * KP + c0)
    next1 = next0
    if BLOCKS == 2:
        next1 = tl.load(total + (chunk * H + h).to(tl.int64) * KP + c1)
    next_start, next_length = locate(chunk, T, row_blocks, table, PACKED, 2)
    next_document, next_place = of_document(chunk // 2, table, PACKED)
    for step in range(0, steps):
        at_chunk = (chunk * H + h).to(tl.int64)
        start, length, document, place = next_start, next_length, next_document, next_place
        following = chunk + tl.where(step + 1 < steps, ahead, 0)
        next_start, next_length = locate(following, T, row_blocks, table, PACKED, 2)
        next_document, next_place = of_document(following // 2, table, PACKED)
        if PACKED:
            at_document = (document * H + h).to(tl.int64) * (K * V)
            begins_here = (place >> backwards & 1 & (1 + chunk + backwards)) != 0
            ends_here = (place >> (1 - backwards) & 1 & (chunk + backwards)) != 0
            passed0, s0 = tl.where(begins_here, float("-inf"), passed0), tl.where(begins_here, 0.0, s0)
            if INITIAL:
                s0 += load_state(initial + at_document, v_, c0, inside0 & begins_here, V)
            if BLOCKS == 2:
                passed1, s1 = tl.where(begins_here, float("-inf"), passed1), tl.where(begins_here, 0.0, s1)
                if INITIAL:
                    s1 += load_state(initial + at_document, v_, c1, inside1 & begins_here, V)
        if (has_states != 0) & ((backwards != 0) | (chunk % 2 == 0)):
            to = states + ((chunk >> (1 - backwards)) * H + h).to(tl.int64) * (KP * VP)
            tl.store(to + own0, s0.to(dtype))
            if BLOCKS == 2:
                tl.store(to + own1, s1.to(dtype))

        total0, total1 = next0, next1
        at_following = (following * H + h).to(tl.int64) * KP
        next0 = tl.load(total + at_following + c0)
        if BLOCKS == 2:
            next1 = tl.load(total + at_following + c1)
        token_v = (start * H + h) * V + i[None, :] * (H * V) + v_[:, None]
        y_t = tl.load(y + token_v, (i < length)[None, :] & in_v, 0.0).to(dtype)
        if OUTPUT:
            x_at = x + at_chunk * (CHUNK * KP) + i[None, :] * KP
            o_t = tl.dot(s0.to(dtype), tl.load(x_at + c0[:, None]), input_precision=PRECISION)
            if BLOCKS == 2:
                o_t = tl.dot(s1.to(dtype), tl.load(x_at + c1[:, None]), o_t, input_precision=PRECISION)
            a_at = scores + at_chunk * (CHUNK * CHUNK)
            if TRANSPOSED:
                a = tl.load(a_at + i[:, None] * CHUNK + i[None, :])
            else:
                a = tl.load(a_at + i[:, None] + i[None, :] * CHUNK)
            o_t = tl.dot(y_t, a, o_t, input_precision=PRECISION)
            tl.store(out + token_v, o_t.to(out.dtype.element_ty), (i < length)[None, :] & in_v)
        z_at = z + at_chunk * (CHUNK * KP) + i[:, None] * KP
        s0 = tl.dot(y_t, tl.load(z_at + c0[None, :]), s0 * exp(total0, PRECISION)[None, :], input_precision=PRECISION)
        passed0 += total0
        if BLOCKS == 2:
            s1 = tl.dot(y_t, tl.load(z_at + c1[None, :]), s1 * exp(total1, PRECISION)[None, :], input_precision=PRECISION)
            passed1 += total1
        if PACKED:
            if (has_final != 0) & ends_here:
                store_state(final + at_document, s0, v_, c0, inside0, V)
                if BLOCKS == 2:
                    store_state(final + at_document, s1, v_, c1, inside1, V)
        chunk += ahead

    if has_leaving != 0:
        store_state(leaving + at_segment, s0, v_, c0, inside0, V)
        if BLOCKS == 2:
            store_state(leaving + at_segment, s1, v_, c1, inside1, V)
    if (has_passed != 0) & (v_tile == 0):
        tl.store(passed + (segment * H + h) * KP + c0, passed0)
        if BLOCKS == 2:
            tl.store(passed + (segment * H + h) * KP + c1, passed1)


@triton.jit(do_not_specialize=["segments", "H", "backwards", "has_initial", "has_final"])
def scan_kernel(
    local, total, initial, final, segments, H, backwards, has_initial, has_final,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From what each segment adds to the state, in place, the state that enters it."""
    row, h = tl.program_id(2) // H, tl.program_id(2) % H
    v_ = tl.program_id(0) * BV + tl.arange(0, BV)
    c = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = (v_ < V)[:, None] & (c < K)[None, :]
    at_row = (row * H + h).to(tl.int64) * (K * V)
    state = load_state(initial + at_row, v_, c, inside & (has_initial != 0), V)
    for step in range(segments):
        segment = row * segments + step + backwards * (segments - 1 - 2 * step)
        at = local + (segment * H + h).to(tl.int64) * (K * V)
        added = load_state(at, v_, c, inside, V)
        store_state(at, state, v_, c, inside, V)
        state = exp(tl.load(total + (segment * H + h) * KP + c), PRECISION)[None, :] * state + added
    if has_final != 0:
        store_state(final + at_row, state, v_, c, inside, V)
