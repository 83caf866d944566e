"""Discrete Fourier transforms of a tile as matrix products, and the right-angle convolution that they serve.

A signal x of N numbers is evaluated at the N points z_k = exp(-2 pi i (k - 1/4) / N), where z^N = i:

    X_k = sum_t x_t z_k^t        x_t = 1/N sum_k X_k z_k^-t

The product of two such spectra belongs to a convolution in which what runs over the end comes back times i. Of real signals
the real part is therefore exactly the causal convolution or, with one factor conjugated, the correlation: a transform of N
numbers for N tokens, no zero padding.

N = A B, t = a B + b, k = j + A l:    X = (R * (M x)) F
    M [j, a] = exp(-2 pi i a (j - 1/4) / A)    R [j, b] = exp(-2 pi i b (j - 1/4) / N)    F [b, l] = exp(-2 pi i b l / B)

A spectrum stays in the order in which it comes out, [j, l]; all its readers agree. Without the quarter (SHIFT = 0, M = F) this
is the plain transform that longer signals take as their inner part.

Half precision multiplies float16 numbers. A tile is divided by its largest number first, so that neither overflow nor rounding
depends on the scale of the inputs. float32 takes three tf32 products for one. All between the products is float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def root(turns, step):
    """exp(-i x), x = turns * step in [0, 2 pi] or a little outside. `turns` is an exact integer, so x is off by rounding alone.

    With y = x / 2 - pi / 2 it is S^2 - 1 + i S C, S = sqrt(2) sin y, C = sqrt(2) cos y, by polynomials good to 3e-7 for
    |y| <= 1.8: Triton does not offer the hardware's sine, and its library's has branches.
    """
    y = turns * (0.5 * step) - 1.5707963267948966
    t = y * y
    s = 0.011783741172966893 + t * (-0.0002796241087090046 + t * 3.5928858031686767e-06)
    s = y * (1.4142134345879729 + t * (-0.23570146963655594 + t * s))
    c = 0.058915820375016 + t * (-0.0019557063388463284 + t * 3.2042776087916855e-05)
    c = 1.4142133083766426 + t * (-0.7071028507451627 + t * c)
    return s * s - 1.0, s * c


@triton.jit
def rotation(A: tl.constexpr, B: tl.constexpr, SHIFT: tl.constexpr, zero):
    """R [A, B]. `zero` depends on the row that is transformed: else the compiler keeps R in registers from row to row."""
    j, b = tl.arange(0, A).to(tl.float32)[:, None], tl.arange(0, B).to(tl.float32)[None, :]
    return root((b + zero) * (4 * j - SHIFT), 1.5707963267948966 / (A * B))


@triton.jit
def matrix(table, SIZE: tl.constexpr):
    """The real and the imaginary part of a matrix of `long_conv.transform_matrix`."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    return tl.load(table + at), tl.load(table + SIZE * SIZE + at)


@triton.jit
def load_complex(x, n, inside, SIZE: tl.constexpr):
    """Real and imaginary part of a spectrum that lies [2, SIZE] in memory; 0 where it is not read."""
    return tl.load(x + n, inside, 0.0), tl.load(x + SIZE + n, inside, 0.0)


@triton.jit
def store_complex(x, n, re, im, SIZE: tl.constexpr):
    tl.store(x + n, re)
    tl.store(x + SIZE + n, im)


@triton.jit
def factor(x, HALF: tl.constexpr):
    return x.to(tl.float16) if HALF else x


@triton.jit
def product(x, y, acc, HALF: tl.constexpr):
    """x y + acc of factors; float32 as three tf32 products."""
    return tl.dot(x, y, acc) if HALF else tl.dot(x, y, acc, input_precision="tf32x3")


@triton.jit
def times(xr, xi, yr, yi):
    return xr * yr - xi * yi, xr * yi + xi * yr


@triton.jit
def largest(x, HALF: tl.constexpr):
    """What a tile is divided by before it becomes a factor."""
    size = tl.max(tl.max(tl.abs(x), 1), 0) if HALF else 1.0
    return tl.where(size > 0, size, 1.0)


@triton.jit
def along_columns(re, im, mr, mi, HALF: tl.constexpr):
    """M x."""
    zero = tl.zeros(re.shape, tl.float32)
    re, im = factor(re, HALF), factor(im, HALF)
    return product(mr, re, zero, HALF) - product(mi, im, zero, HALF), product(mi, re, product(mr, im, zero, HALF), HALF)


@triton.jit
def along_rows(re, im, fr, fi, HALF: tl.constexpr):
    """x F."""
    zero = tl.zeros(re.shape, tl.float32)
    re, im, minus = factor(re, HALF), factor(im, HALF), factor(-im, HALF)
    return product(minus, fi, product(re, fr, zero, HALF), HALF), product(im, fr, product(re, fi, zero, HALF), HALF)


@triton.jit
def real_spectrum(x, mr, mi, fr, fi, HALF: tl.constexpr):
    """X of a real x [A, B], with the quarter."""
    size = largest(x, HALF)
    zero = tl.zeros(x.shape, tl.float32)
    x = factor(x / size, HALF)
    cos, sin = rotation(x.shape[0], x.shape[1], 1, size * 0.0)
    re, im = times(product(mr, x, zero, HALF), product(mi, x, zero, HALF), cos, sin)
    re, im = along_rows(re, im, fr, fi, HALF)
    return re * size, im * size


@triton.jit
def real_signal(re, im, mr, mi, fr, fi, HALF: tl.constexpr):
    """The real part of the signal x [A, B] with the spectrum X, with the quarter, A B times."""
    size = tl.maximum(largest(re, HALF), largest(im, HALF))
    zero = tl.zeros(re.shape, tl.float32)
    cos, sin = rotation(re.shape[0], re.shape[1], 1, size * 0.0)
    re, im = along_rows(re / size, -im / size, fr, fi, HALF)  # the way back is the way there of the conjugate
    re, im = times(re, im, cos, sin)
    x = product(tl.trans(mr), factor(re, HALF), zero, HALF)
    return product(tl.trans(mi), factor(-im, HALF), x, HALF) * size


@triton.jit
def spectrum(re, im, mr, mi, fr, fi, HALF: tl.constexpr):
    """X of a complex x [A, B], without the quarter."""
    size = tl.maximum(largest(re, HALF), largest(im, HALF))
    cos, sin = rotation(re.shape[0], re.shape[1], 0, size * 0.0)
    re, im = along_columns(re / size, im / size, mr, mi, HALF)
    re, im = times(re, im, cos, sin)
    re, im = along_rows(re, im, fr, fi, HALF)
    return re * size, im * size


@triton.jit
def signal(re, im, mr, mi, fr, fi, HALF: tl.constexpr):
    """The signal x [A, B] with the spectrum X, without the quarter, A B times."""
    size = tl.maximum(largest(re, HALF), largest(im, HALF))
    cos, sin = rotation(re.shape[0], re.shape[1], 0, size * 0.0)
    re, im = along_rows(re / size, -im / size, fr, fi, HALF)
    re, im = times(re, im, cos, sin)
    re, im = along_columns(re, im, mr, mi, HALF)
    return re * size, -im * size
