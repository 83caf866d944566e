"""The state at the boundaries of blocks, and its gradient there: the one part of the work that goes from block to block.

    forward in time     S <- exp(P_end) S + k^T (exp(P_end - P) v)
    backward in time    dS <- exp(P_end) dS + scale q^T (exp(P) do)

The two are one walk with other names, and independent of each other: one launch does both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_linear.kernels.layout import BLOCK, locate, of_document
from hf_linear.kernels.scalar_decays import FROM_START, TO_END, WIDTH

RUN_TIME = ("scale", "T", "row_blocks", "segment_blocks", "segments", "row_segments", "H", "given", "wanted", "local")


@triton.jit(do_not_specialize=RUN_TIME)
def states_kernel(
    k, v, states, initial, final, q, do, d_states, d_final, d_initial, decays, between, passed, table,
    scale, T, row_blocks, segment_blocks, segments, row_segments, H, given, wanted, local,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PACKED: tl.constexpr, INITIAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a [BK, BV] tile of the state, a segment of a row's blocks in one direction, a head.

    states, d_states [blocks, H, KP, VP]: S that enters, dS of the state that leaves a block. initial, final, d_final and
    d_initial: of rows or documents, [documents, H, K, V] float32; bits of `given` and `wanted` say which there are, 1 for
    those of the walk forward, 2 for those of the walk back.
    A row in several segments is walked twice: a `local` walk leaves what each segment adds in `between` and how much of the
    state before it passes through in `passed`; `scan_kernel` makes of them the state that enters each.
    traffic: k, v once a tile of the other's channels; a state a block and tile.
    """
    directed, h = tl.program_id(1), tl.program_id(2)
    back = directed // segments
    segment = directed % segments
    row = segment // row_segments
    from_block = (segment % row_segments) * segment_blocks
    steps = tl.minimum(from_block + segment_blocks, row_blocks) - from_block
    v_tiles: tl.constexpr = VP // BV
    c = tl.program_id(0) // v_tiles * BK + tl.arange(0, BK)
    v_ = tl.program_id(0) % v_tiles * BV + tl.arange(0, BV)
    i = tl.arange(0, BLOCK)
    of_user = c[:, None] * V + v_[None, :]
    in_k, in_v = (c < K) | (K == KP), (v_ < V) | (V == VP)  # widths without padding need no masks
    in_user = in_k[:, None] & in_v[None, :]
    dtype = states.dtype.element_ty
    a, b = tl.where(back == 0, k, q), tl.where(back == 0, v, do)
    to_states = tl.where(back == 0, states, d_states)
    before, after = tl.where(back == 0, initial, d_final), tl.where(back == 0, final, d_initial)
    has_before, has_after = ((given >> back) & 1) != 0, ((wanted >> back) & 1) != 0
    factor = tl.where(back == 0, 1.0, scale)

    block = row * row_blocks + from_block + back * (steps - 1)
    ahead = 1 - 2 * back
    at_start, at_end = from_block == 0, from_block + steps == row_blocks
    begins, ends = tl.where(back == 0, at_start, at_end), tl.where(back == 0, at_end, at_start)
    at_segment = (directed * H + h).to(tl.int64) * (K * V)
    s = tl.load(between + at_segment + of_user, in_user & (local == 0) & (row_segments > 1), 0.0)
    if not PACKED:
        if begins:
            s = tl.load(before + (row * H + h).to(tl.int64) * (K * V) + of_user, in_user & has_before, 0.0)
    passed_ = 1.0

    to_edge = tl.where(back == 0, TO_END, FROM_START)
    # The pipeliner fetches ahead only what feeds a product; the decays are fetched a step ahead by hand.
    at_decays = decays + (block * H + h).to(tl.int64) * WIDTH
    next_edge, next_whole = tl.load(at_decays + to_edge + i), tl.load(at_decays + FROM_START + BLOCK - 1)
    next_start, next_length = locate(block, T, row_blocks, table, PACKED, 1)
    next_document, next_place = of_document(block, table, PACKED)
    for step in range(0, steps):
        start, length, document, place = next_start, next_length, next_document, next_place
        following = block + tl.where(step + 1 < steps, ahead, 0)
        next_start, next_length = locate(following, T, row_blocks, table, PACKED, 1)
        next_document, next_place = of_document(following, table, PACKED)
        if PACKED:
            at_document = (document * H + h).to(tl.int64) * (K * V)
            begins_here = (place & (1 + back)) != 0
            s = tl.where(begins_here, 0.0, s)
            passed_ = tl.where(begins_here, 0.0, passed_)
            if INITIAL:
                s += tl.load(before + at_document + of_user, in_user & begins_here & has_before, 0.0)
        if local == 0:
            to = to_states + (block * H + h).to(tl.int64) * (KP * VP) + c[:, None] * VP + v_[None, :]
            tl.store(to, s.to(dtype))
        edge, whole = next_edge, next_whole
        at_decays = decays + (following * H + h).to(tl.int64) * WIDTH
        next_edge, next_whole = tl.load(at_decays + to_edge + i), tl.load(at_decays + FROM_START + BLOCK - 1)
        a_t = tl.load(a + (start * H + h) * K + i[None, :] * (H * K) + c[:, None], (i < length)[None, :] & in_k[:, None], 0.0)
        b_ = tl.load(b + (start * H + h) * V + i[:, None] * (H * V) + v_[None, :], (i < length)[:, None] & in_v[None, :], 0.0)
        a_t = (a_t * (edge * factor)[None, :]).to(dtype)
        s = tl.dot(a_t, b_.to(dtype), s * whole, input_precision=PRECISION)
        passed_ *= whole
        if PACKED:
            if ((place & (2 - back)) != 0) & has_after & (local == 0):
                tl.store(after + at_document + of_user, s, in_user)
        block += ahead

    if local != 0:
        tl.store(between + at_segment + of_user, s, in_user)
        tl.store(passed + directed * H + h, passed_)
    elif not PACKED:
        if ends & has_after:
            tl.store(after + (row * H + h).to(tl.int64) * (K * V) + of_user, s, in_user)


@triton.jit(do_not_specialize=["rows", "row_segments", "H"])
def scan_kernel(between, passed, rows, row_segments, H, SIZE: tl.constexpr, TILE: tl.constexpr):
    """From what each segment adds to the state, in place, the state that enters it. One program: a tile, a row, a head."""
    directed, h = tl.program_id(1), tl.program_id(2)
    back = directed // rows
    ahead = 1 - 2 * back
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    state = tl.zeros((TILE,), tl.float32)
    segment = directed * row_segments + back * (row_segments - 1)
    next_passed = tl.load(passed + segment * H + h)
    # Each segment is a place of its own: what later ones added is fetched while the state goes through earlier ones.
    for step in tl.range(row_segments, num_stages=4):
        at = between + (segment * H + h).to(tl.int64) * SIZE + i
        added, passed_ = tl.load(at, i < SIZE, 0.0), next_passed
        following = segment + tl.where(step + 1 < row_segments, ahead, 0)
        next_passed = tl.load(passed + following * H + h)
        tl.store(at, state, i < SIZE)
        state = passed_ * state + added
        segment += ahead
