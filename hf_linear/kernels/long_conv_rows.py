"""The long convolution of rows that one program holds, T <= 8192: forward, and all gradients.

    p = pre u    c = h * p + skip p    y = post c          * causal, by spectra (`fourier`): C = H P
    g = post dy    dp = h ~ g + skip g + dstate            ~ correlation: conj(H) G
    du = pre dp    dpre = u dp    dpost = dy c    dh = sum over rows of p ~ g    dskip = sum of p g

Grid: (D, parts of the batch). A program transforms its filter once, goes through the rows of its part, and leaves the spectrum
of its filter's gradient; a program a channel adds the parts up and transforms them back, so there are no atomics.
float32: filter, skip, state and all arithmetic; the operands of products as `fourier` says.
Traffic: every input once and every output once, the filter once a part.
Oracle: `hf_linear.ops.reference.long_conv`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_linear.kernels.fourier import load_complex, matrix, real_signal, real_spectrum, store_complex, times


@triton.jit
def load(x, at, inside, GIVEN: tl.constexpr):
    """Numbers of a tensor, as float32; 1 of a gate that is not there."""
    return tl.load(x + at, inside, 0.0).to(tl.float32) if GIVEN else 1.0


@triton.jit
def store(x, at, value, inside):
    tl.store(x + at, value.to(x.dtype.element_ty), inside)


@triton.jit
def tokens(T, ALIGNED: tl.constexpr):
    """T, and that 16 divides it where it does: rows then begin where wide loads may."""
    return T // 16 * 16 if ALIGNED else T


@triton.jit(do_not_specialize=["T", "L", "B", "D", "part_rows"])
def convolve_rows_kernel(
    u, pre, post, h, skip, y, state, outer, inner, T, L, B, D, part_rows,
    A: tl.constexpr, W: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr, SKIP: tl.constexpr,
    ALIGNED: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """u, pre, post, y [B, D, T], h [D, L], skip [D], state [B, D, T]; outer, inner: M of size A and F of size W, A W >= T."""
    d = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * part_rows
    T = tokens(T, ALIGNED)
    n = tl.arange(0, A)[:, None] * W + tl.arange(0, W)[None, :]
    inside = n < T
    mr, mi = matrix(outer, A)
    fr, fi = matrix(inner, W)
    hr, hi = real_spectrum(tl.load(h + d * L + n, inside, 0.0), mr, mi, fr, fi, HALF)
    weight = tl.load(skip + d) if SKIP else 0.0
    for b in range(first, tl.minimum(first + part_rows, B)):
        at = (b * D + d) * T + n
        p = load(u, at, inside, True) * load(pre, at, inside, PRE)
        store(state, at, p, inside)
        re, im = real_spectrum(p, mr, mi, fr, fi, HALF)
        re, im = times(re, im, hr, hi)
        c = real_signal(re, im, mr, mi, fr, fi, HALF) * (1.0 / (A * W))
        if SKIP:  # the inputs are read again, for registers do not hold them
            c += weight * load(u, at, inside, True) * load(pre, at, inside, PRE)
        store(y, at, c * load(post, at, inside, POST), inside)


@triton.jit(do_not_specialize=["T", "L", "B", "D", "part_rows"])
def differentiate_rows_kernel(
    dy, dstate, u, pre, post, h, skip, du, dpre, dpost, zh, zdh, dskip, outer, inner, T, L, B, D, part_rows,
    A: tl.constexpr, W: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr, SKIP: tl.constexpr, STATE: tl.constexpr,
    ALIGNED: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """As above. Spectra [parts, D, 2, A W]: zh of h, read again for every row, for registers do not hold it; zdh of dh, summed
    over the rows of a part, as dskip [parts, D] is."""
    d = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    first = part * part_rows
    T = tokens(T, ALIGNED)
    size: tl.constexpr = A * W
    n = tl.arange(0, A)[:, None] * W + tl.arange(0, W)[None, :]
    inside = n < T
    mr, mi = matrix(outer, A)
    fr, fi = matrix(inner, W)
    zh += (part * D + d) * (2 * size)
    zdh += (part * D + d) * (2 * size)
    re, im = real_spectrum(tl.load(h + d * L + n, inside, 0.0), mr, mi, fr, fi, HALF)
    store_complex(zh, n, re, im, size)
    weight = tl.load(skip + d) if SKIP else 0.0
    weight_gradient = 0.0
    for b in range(first, tl.minimum(first + part_rows, B)):
        tl.debug_barrier()  # what other threads wrote to the spectra is there
        at = (b * D + d) * T + n
        p = load(u, at, inside, True) * load(pre, at, inside, PRE)
        g = load(dy, at, inside, True) * load(post, at, inside, POST)
        if SKIP:
            weight_gradient += tl.sum(tl.sum(p * g, 1), 0)
        pr, pi = real_spectrum(p, mr, mi, fr, fi, HALF)
        if POST:
            hr, hi = load_complex(zh, n, n >= 0, size)
            re, im = times(pr, pi, hr, hi)
            c = real_signal(re, im, mr, mi, fr, fi, HALF) * (1.0 / size) + weight * p
            store(dpost, at, c * load(dy, at, inside, True), inside)
        gr, gi = real_spectrum(g, mr, mi, fr, fi, HALF)
        re, im = times(gr, gi, pr, -pi)
        before_r, before_i = load_complex(zdh, n, b > first, size)
        store_complex(zdh, n, before_r + re, before_i + im, size)
        hr, hi = load_complex(zh, n, n >= 0, size)
        re, im = times(gr, gi, hr, -hi)
        dp = real_signal(re, im, mr, mi, fr, fi, HALF) * (1.0 / size) + weight * g
        if STATE:
            dp += load(dstate, at, inside, True)
        store(du, at, dp * load(pre, at, inside, PRE), inside)
        if PRE:
            store(dpre, at, dp * load(u, at, inside, True), inside)
    if SKIP:
        tl.store(dskip + part * D + d, weight_gradient)


@triton.jit(do_not_specialize=["T", "L", "D", "parts"])
def filter_gradient_rows_kernel(zdh, dh, outer, inner, T, L, D, parts, A: tl.constexpr, W: tl.constexpr, HALF: tl.constexpr):
    """dh [D, L] of a channel from the spectra zdh [parts, D, 2, A W]; what lies behind T is not touched.

    Every part is transformed in the loop: outside of one, tiles of 64 rows come out wrong (triton 3.6; docs/kernels.md).
    """
    d = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, A)[:, None] * W + tl.arange(0, W)[None, :]
    mr, mi = matrix(outer, A)
    fr, fi = matrix(inner, W)
    total = tl.zeros((A, W), tl.float32)
    for part in range(parts):
        re, im = load_complex(zdh + (part * D + d) * (2 * A * W), n, n >= 0, A * W)
        total += real_signal(re, im, mr, mi, fr, fi, HALF)
    tl.store(dh + d * L + n, total * (1.0 / (A * W)), n < T)
