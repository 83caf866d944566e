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

TILE = tl.constexpr(8)  # tokens
LEVELS = tl.constexpr(TILE.value.bit_length() - 1)
TILES = tl.constexpr(BLOCK.value // TILE.value)  # of a block
RUN_TIME = ("T", "row_blocks", "segment_blocks", "row_segments", "given", "tokens")
UNALIGNED = (*("D", "bias", "initial", "final", "edge", "B", "C", "d_final"),)


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
    return found


@triton.jit(do_not_specialize=("tokens", "B_stride", "C_stride"), do_not_specialize_on_alignment=UNALIGNED)
def numbers_kernel(B, C, BC, tokens, B_stride, C_stride, N: tl.constexpr, NP: tl.constexpr, ROWS: tl.constexpr):
    """BC [tokens + TILE, 2, NP] float32 of B and C [tokens, N], zeros where these have nothing. grid (tokens / ROWS,)"""
    token, n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, NP)
    inside = (token < tokens)[:, None] & (n < N)[None, :]
    B_ = tl.load(B + token[:, None] * B_stride + n[None, :], inside, 0.0).to(tl.float32)
    C_ = tl.load(C + token[:, None] * C_stride + n[None, :], inside, 0.0).to(tl.float32)
    to = BC + token[:, None] * (2 * NP) + tl.arange(0, 2 * NP)[None, :]
    tl.store(to, tl.reshape(tl.permute(tl.join(B_, C_), (0, 2, 1)), (ROWS, 2 * NP)), (token < tokens + TILE)[:, None])


@triton.jit
def rows_of(tile, COUNT: tl.constexpr):
    """The rows of a tile [COUNT, BD], [BD] each, in registers of every thread that has the channels, however the tile lay."""
    BD: tl.constexpr = tile.shape[1]
    # Triton would compute what led here anew in every thread, but not a sum.
    parts = (tl.sum(tl.reshape(tile, (COUNT, BD, 1)), 2),)
    for level in tl.static_range(8):
        if COUNT >= 2 ** (level + 1):
            # even and odd rows: so the first step goes through shared memory, with the whole tile, and no other
            even, odd = (), ()
            for k in tl.static_range(2**level):
                two = tl.reshape(parts[k], (COUNT // 2 ** (level + 1), 2, BD))
                a, b = tl.split(tl.permute(two, (0, 2, 1)))
                even, odd = even + (a,), odd + (b,)
            parts = even + odd
    rows = ()
    for k in tl.static_range(COUNT):
        rows = rows + (tl.reshape(parts[k], (BD,)),)
    return rows


@triton.jit
def apart(tiles):
    """The two tiles [R, BD] that lie behind each other in [2 R, BD]."""
    two = tl.reshape(tiles, (2, tiles.shape[0] // 2, tiles.shape[1]))
    return tl.split(tl.permute(two, (1, 2, 0)))


@triton.jit
def behind(a, b):
    return tl.reshape(tl.permute(tl.join(a, b), (2, 0, 1)), (2 * a.shape[0], a.shape[1]))


@triton.jit
def stack(rows, COUNT: tl.constexpr):
    """[COUNT, numbers] of its rows."""
    parts = ()
    for k in tl.static_range(COUNT):
        parts = parts + (tl.reshape(rows[k], (1, rows[k].numel)),)
    for level in tl.static_range(8):
        if COUNT >= 2 ** (level + 1):
            pairs = ()
            for k in tl.static_range(COUNT // 2 ** (level + 1)):
                pairs = pairs + (behind(parts[2 * k], parts[2 * k + 1]),)
            parts = pairs
    return parts[0]


@triton.jit
def tile_of(rows, COUNT: tl.constexpr, GROUPS: tl.constexpr, BD: tl.constexpr):
    """[COUNT, BD] of its rows [GROUPS, BD], summed over groups: warps each have some states of a channel."""
    return over_groups(tl.reshape(stack(rows, COUNT), (COUNT, GROUPS, BD)), GROUPS)


@triton.jit
def side_sums(x, SIDE: tl.constexpr):
    """The sums over a thread's own channels: [GROUPS, NI, BD / SIDE] of x [GROUPS, NI, BD]."""
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // SIDE, SIDE)), 3)


@triton.jit
def sums_over_channels(sums, COUNT: tl.constexpr, NP: tl.constexpr):
    """[COUNT NP] of COUNT times [GROUPS, NI, L]."""
    L: tl.constexpr = sums[0].shape[2]
    total = over_groups(tl.reshape(stack(sums, COUNT), (COUNT * NP, L, 1)), L)
    return tl.reshape(total, (COUNT * NP,))


@triton.jit
def over_groups(x, GROUPS: tl.constexpr):
    """[R, BD] of x [R, GROUPS, BD]: through shared memory once, and summed by one thread, in a fixed order."""
    for _ in tl.static_range(8):
        if x.shape[1] > 1:
            two = tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2, x.shape[2]))
            a, b = tl.split(tl.permute(two, (0, 2, 3, 1)))
            x = a + b
    return tl.reshape(x, (x.shape[0], x.shape[2]))


@triton.jit
def load_group(BC, first, t: tl.constexpr, NI: tl.constexpr, GROUPS: tl.constexpr):
    """B and C of a tile's token t, [GROUPS, NI, 1] each."""
    NP: tl.constexpr = NI * GROUPS
    at = BC + first * (2 * NP) + (t * (2 * NP) + tl.arange(0, NP))
    B_t, C_t = tl.reshape(tl.load(at), (GROUPS, NI)), tl.reshape(tl.load(at + NP), (GROUPS, NI))
    return B_t[:, :, None], C_t[:, :, None]


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
def step_sizes(raw, bias, rows, SOFTPLUS: tl.constexpr, PRECISE: tl.constexpr):
    """softplus(dt + bias) or dt + bias of a tile; 0, a step that changes nothing, where there is no token."""
    steps = raw.to(tl.float32) + bias
    if SOFTPLUS:
        steps = softplus(steps, PRECISE)
    return tl.where((tl.arange(0, TILE) < rows)[:, None], steps, 0.0)
