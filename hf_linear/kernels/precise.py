"""Exponentials and logarithms that keep the digits the hardware's do not."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exp(x, PRECISION: tl.constexpr):
    """exp(x), x <= 60. The hardware's turns x into a power of 2 first, which costs float32 a relative error of |x| 2^-24."""
    if PRECISION == "tf32x3":
        x = tl.maximum(x, -200.0)  # 0 all the same, and never infinity times 0 below
        n = tl.floor(x * 1.4426950408889634 + 0.5)
        # ln 2 in two parts, n times the first of which is exact
        return tl.exp((x - n * 0.693359375) + n * 2.12194440e-4) * tl.exp2(n)
    return tl.exp2(x * 1.4426950408889634)  # tl.exp takes three instructions more, for results below 2^-126


@triton.jit
def log1p(e):
    """log(1 + e) = 2 artanh(e / (2 + e)), 0 <= e <= 1, to a relative error of rounding. The hardware's is absolute."""
    s = e / (2 + e)
    t = s * s
    series = 1 / 15 + t / 17
    series = 1 / 13 + t * series
    series = 1 / 11 + t * series
    series = 1 / 9 + t * series
    series = 1 / 7 + t * series
    series = 1 / 5 + t * series
    series = 1 / 3 + t * series
    return 2 * s * (1 + t * series)


@triton.jit
def expm1(x):
    """exp(x) - 1, x <= 0, to a relative error of rounding."""
    near = tl.maximum(x, -1.0)
    series = 1 + near / 12
    for n in tl.static_range(11, 1, -1):
        series = 1 + near / n * series
    return tl.where(x > -1, near * series, exp(x, "tf32x3") - 1)
