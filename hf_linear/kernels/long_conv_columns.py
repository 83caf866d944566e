"""The long convolution of rows longer than a program holds, in three passes over complex scratch: forward, and all gradients.

N = N1 N2 >= T, t = n1 N2 + n2, k = k1 + N1 k2:    X = (R * (M x)) F with M of size N1 and F of size N2, as in `fourier`
  spread     columns: R * (M x) of u, of g = post dy and of the filter -> scratch
  middle     rows: times F, times the filter's spectrum or conjugate, and back, in place; there the filter's gradient is summed
             over the batch by the one program that has its row. The gradients need three spectra at once: they lie in scratch
  collect    columns: the way back of R and M, then gates and skip

N1 <= 128 is any integer, padded with zeros to P1, a power of two, in the products. Scratch [rows, N1, 2, N2] float32, real and
imaginary parts apart, holds the batch of some channels, row b C + c: every pass serves `C` channels from `c0` on.
Traffic of one transform: scratch four times, 32 bytes a token, most of it.
float32: filter, skip, state, scratch and all arithmetic; the operands of products as `fourier` says.
Oracle: `hf_linear.ops.reference.long_conv`; equations of the gradients: `long_conv_rows`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_linear.kernels.fourier import (
    factor,
    largest,
    load_complex,
    matrix,
    product,
    root,
    signal,
    spectrum,
    store_complex,
    times,
)
from hf_linear.kernels.long_conv_rows import load, store, tokens


@triton.jit
def turn(n1_rows, n2, N1, N2):
    """R [k1, n2] for the rows n1_rows = k1 [P1, 1] and the columns n2 [1, tile]."""
    return root((n2 * (4 * n1_rows - 1)).to(tl.float32), 1.5707963267948966 / (N1 * N2).to(tl.float32))


@triton.jit(do_not_specialize=["T", "L", "D", "c0", "C", "N1"])
def spread_kernel(
    x, gate, kept, out, table, T, L, D, c0, C, N1,
    N2: tl.constexpr, P1: tl.constexpr, TILE: tl.constexpr, GATE: tl.constexpr, KEEP: tl.constexpr,
    ALIGNED: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Program: TILE columns of one row. x, gate and kept = gate x: [B, D, L], of which the first T count."""
    n2 = tl.program_id(0) * TILE + tl.arange(0, TILE)[None, :]
    row = tl.program_id(1).to(tl.int64)
    n1 = tl.arange(0, P1)[:, None]
    T, L = tokens(T, ALIGNED), tokens(L, ALIGNED)
    n = n1 * N2 + n2
    inside = (n < T) & (n1 < N1)
    at = (row // C * D + c0 + row % C) * L + n
    value = load(x, at, inside, True) * load(gate, at, inside, GATE)
    if KEEP:
        store(kept, at, value, inside)
    mr, mi = matrix(table, P1)
    size = largest(value, HALF)
    value = factor(value / size, HALF)
    zero = tl.zeros((P1, TILE), tl.float32)
    cos, sin = turn(n1, n2, N1, N2)
    re, im = times(product(mr, value, zero, HALF), product(mi, value, zero, HALF), cos * size, sin * size)
    to = out + (row * N1 + n1) * (2 * N2) + n2
    tl.store(to, re, n1 < N1)
    tl.store(to + N2, im, n1 < N1)


@triton.jit
def collect(z, row, n1, n2, table, N1, N2: tl.constexpr, P1: tl.constexpr, TILE: tl.constexpr, HALF: tl.constexpr):
    """The real signal [P1, TILE], rows n1 and columns n2, of a row of scratch."""
    at = z + (row * N1 + n1) * (2 * N2) + n2
    re, im = tl.load(at, n1 < N1, 0.0), tl.load(at + N2, n1 < N1, 0.0)
    mr, mi = matrix(table, P1)
    size = tl.maximum(largest(re, HALF), largest(im, HALF))
    cos, sin = turn(n1, n2, N1, N2)
    re, im = times(re / size, im / size, cos, -sin)
    x = product(tl.trans(mr), factor(re, HALF), tl.zeros((P1, TILE), tl.float32), HALF)
    x = product(tl.trans(mi), factor(im, HALF), x, HALF)
    return x * (size / (N1 * N2).to(tl.float32))


@triton.jit(do_not_specialize=["N1", "C", "B"])
def convolve_middle_kernel(z, zh, outer, inner, N1, C, B, A: tl.constexpr, W: tl.constexpr, HALF: tl.constexpr):
    """Program: row k1 of a channel, all of the batch. z [B C, N1, 2, A W] of p becomes that of h * p; zh [C, ...] is h's."""
    k1, c = tl.program_id(0), tl.program_id(1).to(tl.int64)
    size: tl.constexpr = A * W
    n = tl.arange(0, A)[:, None] * W + tl.arange(0, W)[None, :]
    every = n >= 0
    mr, mi = matrix(outer, A)
    fr, fi = matrix(inner, W)
    re, im = load_complex(zh + (c * N1 + k1) * (2 * size), n, every, size)
    hr, hi = spectrum(re, im, mr, mi, fr, fi, HALF)
    for b in range(B):
        row = z + ((b * C + c) * N1 + k1) * (2 * size)
        re, im = load_complex(row, n, every, size)
        re, im = spectrum(re, im, mr, mi, fr, fi, HALF)
        re, im = times(re, im, hr, hi)
        re, im = signal(re, im, mr, mi, fr, fi, HALF)
        store_complex(row, n, re, im, size)


@triton.jit(do_not_specialize=["N1", "C", "B"])
def differentiate_middle_kernel(
    z, outer, inner, N1, C, B, A: tl.constexpr, W: tl.constexpr, POST: tl.constexpr, HALF: tl.constexpr
):
    """As above, with all rows of the channels in z [2 B + 2, C, N1, 2, A W]: those of p become those of h * p (POST alone needs
    them), of g those of h ~ g, that of h its spectrum, and the last is that of sum p ~ g. All spectra are made first, in place,
    and read back: registers hold one transform."""
    k1, c = tl.program_id(0), tl.program_id(1).to(tl.int64)
    size: tl.constexpr = A * W
    n = tl.arange(0, A)[:, None] * W + tl.arange(0, W)[None, :]
    every = n >= 0
    mr, mi = matrix(outer, A)
    fr, fi = matrix(inner, W)
    step = C.to(tl.int64) * N1 * (2 * size)
    z += (c * N1 + k1) * (2 * size)
    zh = z + 2 * B * step
    for i in range(2 * B + 1):
        re, im = load_complex(z + i * step, n, every, size)
        re, im = spectrum(re, im, mr, mi, fr, fi, HALF)
        tl.debug_barrier()  # all threads have read what the next line overwrites
        store_complex(z + i * step, n, re, im, size)
    tl.debug_barrier()  # what other threads wrote is there
    re = tl.zeros((A, W), tl.float32)
    im = tl.zeros((A, W), tl.float32)
    for b in range(B):
        pr, pi = load_complex(z + b * step, n, every, size)
        gr, gi = load_complex(z + (B + b) * step, n, every, size)
        gr, gi = times(gr, gi, pr, -pi)
        re += gr
        im += gi
    re, im = signal(re, im, mr, mi, fr, fi, HALF)
    store_complex(zh + step, n, re, im, size)
    for i in range(0 if POST else B, 2 * B):
        hr, hi = load_complex(zh, n, every, size)
        re, im = load_complex(z + i * step, n, every, size)
        re, im = times(re, im, hr, tl.where(i < B, hi, -hi))
        re, im = signal(re, im, mr, mi, fr, fi, HALF)
        tl.debug_barrier()  # as above
        store_complex(z + i * step, n, re, im, size)


@triton.jit(do_not_specialize=["T", "D", "c0", "C", "N1"])
def outputs_kernel(
    z, p, post, skip, y, table, T, D, c0, C, N1,
    N2: tl.constexpr, P1: tl.constexpr, TILE: tl.constexpr, POST: tl.constexpr, SKIP: tl.constexpr,
    ALIGNED: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """y = post (c + skip p) of TILE columns of a row; p is the state that the spreading kept."""
    n2 = tl.program_id(0) * TILE + tl.arange(0, TILE)[None, :]
    row = tl.program_id(1).to(tl.int64)
    n1 = tl.arange(0, P1)[:, None]
    T = tokens(T, ALIGNED)
    inside = (n1 * N2 + n2 < T) & (n1 < N1)
    d = c0 + row % C
    at = (row // C * D + d) * T + n1 * N2 + n2
    c = collect(z, row, n1, n2, table, N1, N2, P1, TILE, HALF)
    if SKIP:
        c += tl.load(skip + d) * load(p, at, inside, True)
    store(y, at, c * load(post, at, inside, POST), inside)


@triton.jit(do_not_specialize=["T", "D", "c0", "C", "N1"])
def gradients_kernel(
    zp, zg, dy, dstate, u, pre, post, skip, du, dpre, dpost, dskip, table, T, D, c0, C, N1,
    N2: tl.constexpr, P1: tl.constexpr, TILE: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr, SKIP: tl.constexpr,
    STATE: tl.constexpr, ALIGNED: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """All gradients but the filter's, of TILE columns of a row; dskip [tiles, B, D] is the sum over them."""
    n2 = tl.program_id(0) * TILE + tl.arange(0, TILE)[None, :]
    row = tl.program_id(1).to(tl.int64)
    n1 = tl.arange(0, P1)[:, None]
    T = tokens(T, ALIGNED)
    inside = (n1 * N2 + n2 < T) & (n1 < N1)
    d = c0 + row % C
    at = (row // C * D + d) * T + n1 * N2 + n2
    dp = collect(zg, row, n1, n2, table, N1, N2, P1, TILE, HALF)
    u_, pre_, dy_ = load(u, at, inside, True), load(pre, at, inside, PRE), load(dy, at, inside, True)
    p, g = u_ * pre_, dy_ * load(post, at, inside, POST)
    weight = tl.load(skip + d) if SKIP else 0.0
    dp += weight * g
    if STATE:
        dp += load(dstate, at, inside, True)
    store(du, at, dp * pre_, inside)
    if PRE:
        store(dpre, at, dp * u_, inside)
    if POST:
        c = collect(zp, row, n1, n2, table, N1, N2, P1, TILE, HALF) + weight * p
        store(dpost, at, c * dy_, inside)
    if SKIP:
        rows = tl.num_programs(1) // C
        tl.store(dskip + (tl.program_id(0) * rows + row // C) * D + d, tl.sum(tl.sum(p * g, 1), 0))


@triton.jit(do_not_specialize=["T", "L", "c0", "N1"])
def filter_gradient_kernel(
    z, dh, table, T, L, c0, N1, N2: tl.constexpr, P1: tl.constexpr, TILE: tl.constexpr, HALF: tl.constexpr
):
    """dh [D, L] of TILE columns of a channel; what lies behind T is not touched."""
    n2 = tl.program_id(0) * TILE + tl.arange(0, TILE)[None, :]
    row = tl.program_id(1).to(tl.int64)
    n1 = tl.arange(0, P1)[:, None]
    n = n1 * N2 + n2
    value = collect(z, row, n1, n2, table, N1, N2, P1, TILE, HALF)
    tl.store(dh + (c0 + row) * L + n, value, (n < T) & (n1 < N1))
