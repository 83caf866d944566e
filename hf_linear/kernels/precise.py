"""Exponentials as precise as the dtype of the products around them."""

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
    return tl.exp(x)
