"""What the kernels of the selective scan share: tiles of 16 tokens, whose rows are registers of one thread.

A thread has one channel. What concerns a channel alone (softplus, SiLU) is computed once, and a sum over states is a thread's
own. For Triton to lay tensors out so, it must not know that channels could be read several at a time: pointers that are indexed
by channels are not specialised on their alignment (`UNALIGNED`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_linear.kernels.layout import BLOCK
from hf_linear.kernels.precise import exp

TILE = tl.constexpr(16)  # tokens
TILES = tl.constexpr(BLOCK.value // TILE.value)  # of a block
CHANNELS = 128  # of a program, one a thread
RUN_TIME = ("T", "row_blocks", "segment_blocks", "row_segments", "given", "tokens")
UNALIGNED = (
    *("x", "v", "dt", "A", "D", "z", "bias", "y", "initial", "final", "states", "edge", "added", "total", "entering"),
    *("dy", "d_final", "d_initial", "dx", "ddt", "dz", "dA", "dD", "dbias", "carry", "B", "C"),
)


@triton.jit
def pick(tile, here, axis: tl.constexpr):
    """The slice of a tile that the mask says, along an axis whose places are registers of one thread.

    Summed as integers, for which 0 + x is x: nothing is left of it in the compiled kernel.
    """
    return tl.sum(tl.where(here, tile.to(tl.int32, bitcast=True), 0), axis).to(tl.float32, bitcast=True)


@triton.jit
def tile_at(x, first, d, STRIDE: tl.constexpr):
    """Where a tile's tokens lie, from the first one on. In this order what tells the rows apart is constant."""
    return (x + first * STRIDE + d)[None, :] + (tl.arange(0, TILE) * STRIDE)[:, None]


@triton.jit
def load_tile(x, first, rows, d, STRIDE: tl.constexpr, WIDTH: tl.constexpr, BD: tl.constexpr, other: tl.constexpr = 0.0):
    """A tile of which `rows` are tokens; `other` where there are none, or no channels.

    Most tiles are full, and their masks would cost as many instructions as the loads with their conversion.
    """
    at = tile_at(x, first, d, STRIDE)
    if is_full(rows, WIDTH, BD):
        found = tl.load(at)
    else:
        found = tl.load(at, (tl.arange(0, TILE) < rows)[:, None] & (d < WIDTH)[None, :], other)
    return found.to(tl.float32)


@triton.jit(do_not_specialize=("tokens", "B_stride", "C_stride"), do_not_specialize_on_alignment=UNALIGNED)
def numbers_kernel(B, C, BC, tokens, B_stride, C_stride, N: tl.constexpr, NP: tl.constexpr, ROWS: tl.constexpr):
    """BC [tokens + TILE, NP, 2] float32 of B and C [tokens, N], zeros where these have nothing. grid (tokens / ROWS,)"""
    token, n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, NP)
    inside = (token < tokens)[:, None] & (n < N)[None, :]
    B_ = tl.load(B + token[:, None] * B_stride + n[None, :], inside, 0.0).to(tl.float32)
    C_ = tl.load(C + token[:, None] * C_stride + n[None, :], inside, 0.0).to(tl.float32)
    to = BC + token[:, None] * (2 * NP) + tl.arange(0, 2 * NP)[None, :]
    tl.store(to, tl.reshape(tl.join(B_, C_), (ROWS, 2 * NP)), (token < tokens + TILE)[:, None])


@triton.jit
def load_numbers(BC, first, t: tl.constexpr, NP: tl.constexpr):
    """B and C of a tile's token t, [NP] each: 16 bytes at a time."""
    return tl.split(tl.reshape(tl.load(BC + first * (2 * NP) + (t * (2 * NP) + tl.arange(0, 2 * NP))), (NP, 2)))


@triton.jit
def store_tile(x, first, rows, d, value, STRIDE: tl.constexpr, WIDTH: tl.constexpr, BD: tl.constexpr):
    at = tile_at(x, first, d, STRIDE)
    if is_full(rows, WIDTH, BD):
        tl.store(at, value.to(x.dtype.element_ty))
    else:
        tl.store(at, value.to(x.dtype.element_ty), (tl.arange(0, TILE) < rows)[:, None] & (d < WIDTH)[None, :])


@triton.jit
def is_full(rows, WIDTH: tl.constexpr, BD: tl.constexpr):
    return (rows >= TILE) & (tl.program_id(0) * BD + BD <= WIDTH)


@triton.jit
def exp_of(x, PRECISE: tl.constexpr):
    """exp(x), x <= 0, to a relative error of |x| 2^-24 at the least, or PRECISE."""
    if PRECISE:
        return exp(x, "tf32x3")
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def decay_of(x, PRECISE: tl.constexpr):
    """2^x, x <= 0. Where decays are near 1, tokens add up what an exponential errs to one side: PRECISE does not."""
    found = tl.exp2(x)
    if PRECISE:
        y = x * 0.6931471805599453
        near = 1 + y * (1 + y * (1 / 2 + y * (1 / 6 + y * (1 / 24 + y / 120))))
        found = tl.where(y > -0.125, near, found)
    return found


@triton.jit
def sigmoid(x, PRECISE: tl.constexpr):
    """1 / (1 + exp(-x)); by two of the hardware's functions, where a division would take five instructions, or PRECISE."""
    if PRECISE:
        e = exp_of(-tl.abs(x), PRECISE)
        return tl.where(x < 0, e, 1.0) / (1 + e)
    root = tl.rsqrt(1 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def softplus(x, PRECISE: tl.constexpr):
    """max(x, 0) + log(1 + e), e = exp(-|x|): the logarithm by a polynomial that errs by 2e-8 of it, however small e is."""
    e = exp_of(-tl.abs(x), PRECISE)
    series = -0.00446621159 * e + 0.0252240543
    series = series * e - 0.066757725
    series = series * e + 0.115618454
    series = series * e - 0.158475657
    series = series * e + 0.198541062
    series = series * e - 0.249865262
    series = series * e + 0.333328419
    series = series * e - 0.49999997
    return series * (e * e) + (e + tl.maximum(x, 0.0))


@triton.jit
def step_sizes(
    dt, bias, first, rows, d, STRIDE: tl.constexpr, WIDTH: tl.constexpr, BD: tl.constexpr, SOFTPLUS: tl.constexpr,
    PRECISE: tl.constexpr,
):  # fmt: skip
    """softplus(dt + bias) or dt + bias of a tile; 0, a step that changes nothing, where there is no token."""
    if SOFTPLUS:
        return softplus(load_tile(dt, first, rows, d, STRIDE, WIDTH, BD, float("-inf")) + bias, PRECISE)
    return tl.where((tl.arange(0, TILE) < rows)[:, None], load_tile(dt, first, rows, d, STRIDE, WIDTH, BD) + bias, 0.0)
