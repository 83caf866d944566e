"""Outputs and gradients, all blocks in parallel, from the states at their boundaries.

    A  = scale D * q k^T      dA = scale D * do v^T      D_ij = exp(P_i - P_j) for i >= j
    o  = scale exp(P)  q S     + A v
    dq = scale exp(P) do S^T   + dA k
    dk = exp(P_end - P) v dS^T + dA^T q
    dv = exp(P_end - P) k dS   + A^T do

A and dA are made once, not for every tile of channels. The rest is one kernel, out = from x W + M y; dS carries the scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_linear.kernels.layout import BLOCK, locate
from hf_linear.kernels.scalar_decays import FROM_START, TO_END, WIDTH, between


@triton.jit(do_not_specialize=["scale", "T", "row_blocks", "H"])
def pairs_kernel(
    x, z, pairs, decays, table, scale, T, row_blocks, H,
    IN: tl.constexpr, INP: tl.constexpr, BI: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """pairs [blocks, H, 128, 128]: scale D * x z^T. One program: a block, a head. x and z have IN channels."""
    block, h = tl.program_id(0), tl.program_id(1)
    at_block = (block * H + h).to(tl.int64)
    start, length = locate(block, T, row_blocks, table, PACKED, 1)
    i = tl.arange(0, BLOCK)
    row, col = i[:, None], i[None, :]
    dtype = pairs.dtype.element_ty
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for i0 in range(0, INP, BI):
        i_ = i0 + tl.arange(0, BI)
        at = (start * H + h) * IN + row * (H * IN) + i_[None, :]
        inside = (row < length) & (i_ < IN)[None, :]
        x_, z_ = tl.load(x + at, inside, 0.0).to(dtype), tl.load(z + at, inside, 0.0).to(dtype)
        acc = tl.dot(x_, tl.trans(z_), acc, input_precision=PRECISION)
    acc *= between(decays + at_block * WIDTH, i, False, PRECISION) * scale
    tl.store(pairs + (at_block * BLOCK + row) * BLOCK + col, acc.to(dtype))


@triton.jit(do_not_specialize=["scale", "T", "row_blocks", "H", "tokens"])
def outputs_kernel(
    x, w, pairs, y, out, decays, own, far, table, scale, T, row_blocks, H, tokens,
    IN: tl.constexpr, INP: tl.constexpr, OUT: tl.constexpr, OUTP: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
    LATER: tl.constexpr, TRANSPOSED: tl.constexpr, FAR: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a block, a tile of BO of the OUT channels of out and y, a head; x has IN channels.

    w: states [blocks, H, INP, OUTP], TRANSPOSED [blocks, H, OUTP, INP]. LATER: M is the transpose of `pairs`. FAR: far [tiles,
    tokens, H] float32 receives the sum over the tile of own * x W, which the decay's gradient needs.
    float32: accumulators and decays. traffic: x, W and M once a tile, y and out once.
    """
    tile, block, h = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at_block = (block * H + h).to(tl.int64)
    start, length = locate(block, T, row_blocks, table, PACKED, 1)
    if length == 0:
        return
    i = tl.arange(0, BLOCK)
    o_ = tile * BO + tl.arange(0, BO)
    dtype = w.dtype.element_ty
    acc = tl.zeros((BLOCK, BO), tl.float32)
    for i0 in range(0, INP, BI):
        i_ = i0 + tl.arange(0, BI)
        x_at = x + (start * H + h) * IN + i[:, None] * (H * IN) + i_[None, :]
        x_ = tl.load(x_at, (i < length)[:, None] & (i_ < IN)[None, :], 0.0).to(dtype)
        if TRANSPOSED:
            w_ = tl.load(w + at_block * (INP * OUTP) + i_[:, None] + o_[None, :] * INP, (o_ < OUTP)[None, :], 0.0)
        else:
            w_ = tl.load(w + at_block * (INP * OUTP) + i_[:, None] * OUTP + o_[None, :], (o_ < OUTP)[None, :], 0.0)
        acc = tl.dot(x_, w_, acc, input_precision=PRECISION)
    own_decays = decays + at_block * WIDTH
    if LATER:
        acc *= tl.load(own_decays + TO_END + i)[:, None]
    else:
        acc *= tl.load(own_decays + FROM_START + i)[:, None] * scale
    at = (start * H + h) * OUT + i[:, None] * (H * OUT) + o_[None, :]
    inside = (i < length)[:, None] & (o_ < OUT)[None, :]
    if FAR:
        part_of_sum = tl.sum(tl.load(own + at, inside, 0.0) * acc, 1)
        tl.store(far + (tile * tokens + start + i) * H + h, part_of_sum, i < length)
    for j0 in range(0, BLOCK, BI):
        j = j0 + tl.arange(0, BI)
        if LATER:
            m_ = tl.load(pairs + (at_block * BLOCK + j[None, :]) * BLOCK + i[:, None])
        else:
            m_ = tl.load(pairs + (at_block * BLOCK + i[:, None]) * BLOCK + j[None, :])
        y_at = y + (start * H + h) * OUT + j[:, None] * (H * OUT) + o_[None, :]
        y_ = tl.load(y_at, (j < length)[:, None] & (o_ < OUT)[None, :], 0.0).to(dtype)
        acc = tl.dot(m_, y_, acc, input_precision=PRECISION)
    tl.store(out + at, acc.to(out.dtype.element_ty), inside)
