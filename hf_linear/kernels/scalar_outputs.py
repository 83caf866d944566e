"""Outputs and gradients, all blocks in parallel, from the states at their boundaries.

    o  = scale (exp(P)         q S     + (D * q k^T)    v )      D_ij = exp(P_i - P_j) for i >= j
    dq = scale (exp(P)        do S^T   + (D * do v^T)   k )
    dk = exp(P_end - P)        v dS^T  + (D * do v^T)^T q * scale
    dv = exp(P_end - P)        k dS    + (D * q k^T)^T  do * scale

Four times the same:  out = from x W + (M * x z^T) y,  causal or, for dk and dv, towards later tokens. dS carries the scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_linear.kernels.layout import BLOCK, locate
from hf_linear.kernels.scalar_decays import FROM_START, TO_END, WIDTH, between


@triton.jit(do_not_specialize=["scale", "T", "row_blocks", "H", "tokens"])
def outputs_kernel(
    x, w, z, y, out, decays, own, far, table, scale, T, row_blocks, H, tokens,
    IN: tl.constexpr, INP: tl.constexpr, OUT: tl.constexpr, OUTP: tl.constexpr,
    ROWS: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
    LATER: tl.constexpr, TRANSPOSED: tl.constexpr, FAR: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: ROWS tokens of a block, a tile of BO of the OUT channels of out and y, a head; x and z have IN channels.

    w: states [blocks, H, INP, OUTP], TRANSPOSED [blocks, H, OUTP, INP]. FAR: far [tiles, tokens, H] float32 receives the sum
    over the tile of own * x W, which the decay's gradient needs.
    float32: accumulators and decays. traffic: x, z and W once a tile, y and out once; x z^T is computed once a tile.
    """
    tile, part, h = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    parts: tl.constexpr = BLOCK // ROWS
    block = part // parts
    at_block = (block * H + h).to(tl.int64)
    start, length = locate(block, T, row_blocks, table, PACKED, 1)
    i = part % parts * ROWS + tl.arange(0, ROWS)
    if part % parts * ROWS >= length:
        return
    j = tl.arange(0, BLOCK)
    o_ = tile * BO + tl.arange(0, BO)
    dtype = w.dtype.element_ty
    acc = tl.zeros((ROWS, BO), tl.float32)
    scores = tl.zeros((ROWS, BLOCK), tl.float32)
    for i0 in range(0, INP, BI):
        i_ = i0 + tl.arange(0, BI)
        at = (start * H + h) * IN + i_[None, :]
        x_ = tl.load(x + at + i[:, None] * (H * IN), (i < length)[:, None] & (i_ < IN)[None, :], 0.0).to(dtype)
        z_ = tl.load(z + at + j[:, None] * (H * IN), (j < length)[:, None] & (i_ < IN)[None, :], 0.0).to(dtype)
        if TRANSPOSED:
            w_ = tl.load(w + at_block * (INP * OUTP) + i_[:, None] + o_[None, :] * INP, (o_ < OUTP)[None, :], 0.0)
        else:
            w_ = tl.load(w + at_block * (INP * OUTP) + i_[:, None] * OUTP + o_[None, :], (o_ < OUTP)[None, :], 0.0)
        acc = tl.dot(x_, w_, acc, input_precision=PRECISION)
        scores = tl.dot(x_, tl.trans(z_), scores, input_precision=PRECISION)

    own_decays = decays + at_block * WIDTH
    at = (start * H + h) * OUT + o_[None, :]
    inside = (i < length)[:, None] & (o_ < OUT)[None, :]
    if LATER:
        acc *= tl.load(own_decays + TO_END + i)[:, None]
    else:
        acc *= tl.load(own_decays + FROM_START + i)[:, None] * scale
    if FAR:
        part_of_sum = tl.sum(tl.load(own + at + i[:, None] * (H * OUT), inside, 0.0) * acc, 1)
        tl.store(far + (tile * tokens + start + i) * H + h, part_of_sum, i < length)
    scores = scores * between(own_decays, i, LATER, PRECISION) * scale
    y_ = tl.load(y + at + j[:, None] * (H * OUT), (j < length)[:, None] & (o_ < OUT)[None, :], 0.0).to(dtype)
    acc = tl.dot(scores.to(dtype), y_, acc, input_precision=PRECISION)
    tl.store(out + at + i[:, None] * (H * OUT), acc.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["scale", "T", "row_blocks", "H"])
def whole_outputs_kernel(
    x, w, z, y, out, decays, table, scale, T, row_blocks, H,
    IN: tl.constexpr, INP: tl.constexpr, OUT: tl.constexpr, OUTP: tl.constexpr, BO: tl.constexpr,
    LATER: tl.constexpr, TRANSPOSED: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same, one program a block and head: x and x z^T are kept while the loop goes over tiles of the OUT channels.

    Its loads run ahead of the products from tile to tile. INP is a power of two. traffic: everything once.
    """
    block, h = tl.program_id(0), tl.program_id(1)
    at_block = (block * H + h).to(tl.int64)
    start, length = locate(block, T, row_blocks, table, PACKED, 1)
    if length == 0:
        return
    i = tl.arange(0, BLOCK)
    i_ = tl.arange(0, INP)
    dtype = w.dtype.element_ty
    at_in = (start * H + h) * IN + i[:, None] * (H * IN) + i_[None, :]
    in_row = (i < length)[:, None] & ((i_ < IN)[None, :] | (IN == INP))
    x_ = tl.load(x + at_in, in_row, 0.0).to(dtype)
    z_ = tl.load(z + at_in, in_row, 0.0).to(dtype)
    own_decays = decays + at_block * WIDTH
    scores = tl.dot(x_, tl.trans(z_), input_precision=PRECISION) * between(own_decays, i, LATER, PRECISION) * scale
    scores = scores.to(dtype)
    if LATER:
        decay = tl.load(own_decays + TO_END + i)[:, None]
    else:
        decay = tl.load(own_decays + FROM_START + i)[:, None] * scale
    for o0 in range(0, OUTP, BO):
        o_ = o0 + tl.arange(0, BO)
        if TRANSPOSED:
            w_ = tl.load(w + at_block * (INP * OUTP) + i_[:, None] + o_[None, :] * INP)
        else:
            w_ = tl.load(w + at_block * (INP * OUTP) + i_[:, None] * OUTP + o_[None, :])
        at = (start * H + h) * OUT + i[:, None] * (H * OUT) + o_[None, :]
        inside = (i < length)[:, None] & ((o_ < OUT)[None, :] | (OUT == OUTP))
        y_ = tl.load(y + at, inside, 0.0).to(dtype)
        acc = tl.dot(x_, w_, input_precision=PRECISION) * decay
        acc = tl.dot(scores, y_, acc, input_precision=PRECISION)
        tl.store(out + at, acc.to(out.dtype.element_ty), inside)
