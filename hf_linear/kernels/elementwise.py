"""The passes over activations between a model's products: one kernel a direction each, instead of a kernel an operation.

All read what they need once, compute in float32, and write each result once. A backward kernel takes the inputs of the forward
one and computes anew what lies between; on demand it also writes the forward's result, which then nobody has to keep. Sums over
rows (the gradient of a norm's weight) go by partial sums of a fixed number of programs: no atomics, the same bits every run.
Triton makes two versions of a kernel by whether 16 divides its `size`: only where it does are loads wider than an element.

    norm     y = x / sqrt(mean(x^2) + eps) * weight * silu(gate) over the last dimension; weight and gate or none; x is a sum
             of two, where a residual stream takes up what a layer adds
    swiglu   y = silu(a) b
    decay    g = log(sigmoid(x)) / n, float32
    rotate   channel pairs of [B, T, H, D] turned by an angle a token and pair

Oracles: torch.nn.RMSNorm, torch.nn.functional.silu and logsigmoid, hf_linear.modules.rotary.rotate, in float64.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_linear.kernels.precise import exp, expm1, log1p

TILE = 4096  # elements a program holds at a time
WARPS = 8  # of a program: each thread holds 16 elements, two loads of 16 bytes a tensor in half precision
PROGRAMS = 1024  # of the norm's backward pass: enough to fill a large GPU, and few partial sums


def norm(x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    x, gate = contiguous(x, gate)
    y = torch.empty_like(x, dtype=dtype)
    D, BD = x.shape[-1], triton.next_power_of_2(x.shape[-1])
    rows, ROWS = x.numel() // D, max(TILE // BD, 1)
    launch(norm_kernel, triton.cdiv(rows, ROWS), x, None, None, gate, weight, y, rows, eps, D, ROWS, BD)
    return y


def add_norm(x: Tensor, added: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x + added, in x's dtype, and its norm."""
    x, added = contiguous(x, added)
    total, y = torch.empty_like(x), torch.empty_like(x, dtype=dtype)
    D, BD = x.shape[-1], triton.next_power_of_2(x.shape[-1])
    rows, ROWS = x.numel() // D, max(TILE // BD, 1)
    launch(norm_kernel, triton.cdiv(rows, ROWS), x, added, total, None, weight, y, rows, eps, D, ROWS, BD)
    return total, y


def norm_backward(
    dy: Tensor,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    recompute: bool,
    d_stream: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, gate and weight, and y if it is to be computed anew. d_stream is what x gets from elsewhere."""
    dy, x, gate, d_stream = contiguous(dy, x, gate, d_stream)
    dx, dgate = torch.empty_like(x), None if gate is None else torch.empty_like(gate)
    y = torch.empty_like(x, dtype=dtype) if recompute else None
    D, BD = x.shape[-1], triton.next_power_of_2(x.shape[-1])
    rows, ROWS = x.numel() // D, max(TILE // BD, 1)
    programs = min(triton.cdiv(rows, ROWS), PROGRAMS)
    parts = None if weight is None else x.new_empty(programs, D, dtype=torch.float32)
    launch(norm_backward_kernel, programs, dy, d_stream, x, gate, weight, dx, dgate, parts, y, rows, eps, D, ROWS, BD)
    return dx, dgate, None if weight is None or parts is None else parts.sum(0).to(weight.dtype), y


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    a, b = contiguous(a, b)
    y = torch.empty_like(a)
    launch(swiglu_kernel, triton.cdiv(y.numel(), TILE), a, b, y, y.numel(), TILE)
    return y


def swiglu_backward(dy: Tensor, a: Tensor, b: Tensor, recompute: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of a and b, and y if it is to be computed anew."""
    dy, a, b = contiguous(dy, a, b)
    da, db, y = torch.empty_like(a), torch.empty_like(b), torch.empty_like(a) if recompute else None
    launch(swiglu_backward_kernel, triton.cdiv(a.numel(), TILE), dy, a, b, da, db, y, a.numel(), TILE)
    return da, db, y


def decay(x: Tensor, n: float) -> Tensor:
    (x,) = contiguous(x)
    g = torch.empty_like(x, dtype=torch.float32)
    launch(decay_kernel, triton.cdiv(g.numel(), TILE), x, g, n, g.numel(), TILE)
    return g


def decay_backward(dg: Tensor, g: Tensor, n: float, dtype: torch.dtype) -> Tensor:
    dg, g = contiguous(dg, g)
    dx = torch.empty_like(g, dtype=dtype)
    launch(decay_backward_kernel, triton.cdiv(g.numel(), TILE), dg, g, dx, n, g.numel(), TILE)
    return dx


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x: [B, T, H, D]; cos, sin: [B or 1, T, R / 2] float32. Channels from R on stay as they are."""
    x, cos, sin = contiguous(x, cos, sin)
    B, T, H, D = x.shape
    y = torch.empty_like(x)
    half = cos.shape[-1]
    ROWS = max(TILE // triton.next_power_of_2(D), 1)
    options = (D, half, interleaved, ROWS, triton.next_power_of_2(half), triton.next_power_of_2(max(D - 2 * half, 1)))
    angle_rows = T if cos.shape[0] == 1 else B * T
    launch(rotate_kernel, triton.cdiv(B * T * H, ROWS), x, cos, sin, y, B * T * H, H, angle_rows, *options)
    return y


def launch(kernel: Any, programs: int, x: Tensor, *args: Any) -> None:
    """On the device of x, which need not be the current one."""
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        kernel[(programs,)](x, *args, num_warps=WARPS)


def contiguous(*tensors: Tensor | None) -> list:
    return [x if x is None else x.contiguous() for x in tensors]


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def normed(b_x, D: tl.constexpr, eps):
    """x / sqrt(mean(x^2) + eps) of float32 rows [ROWS, BD], and the reciprocal of the root [ROWS]."""
    b_r = 1 / tl.sqrt(tl.sum(b_x * b_x, axis=1) / D + eps)
    return b_x * b_r[:, None], b_r


@triton.jit(do_not_specialize=["rows"])
def norm_kernel(
    x, added, total, gate, weight, y, rows, eps, D: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """y = x / sqrt(mean(x^2) + eps) * weight * silu(gate), total = x + added first and then in the place of x.

    grid     (rows / ROWS,)
    in, out  x, added, total, gate, y: [rows, D]; weight: [D]; added with total, gate and weight may be None
    traffic  reads x, added and gate, writes total and y: bound by memory
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BD)
    m = (row < rows)[:, None] & (column < D)[None, :]
    place = row[:, None] * D + column[None, :]
    b_x = tl.load(x + place, mask=m, other=0.0).to(tl.float32)
    if added is not None:
        b_total = (b_x + tl.load(added + place, mask=m, other=0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + place, b_total, mask=m)
        b_x = b_total.to(tl.float32)  # rounded, as the backward pass will read it
    b_y, _ = normed(b_x, D, eps)
    if weight is not None:
        b_y *= tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    if gate is not None:
        b_gate = tl.load(gate + place, mask=m, other=0.0).to(tl.float32)
        b_y *= b_gate * sigmoid(b_gate)
    tl.store(y + place, b_y, mask=m)


@triton.jit(do_not_specialize=["rows"])
def norm_backward_kernel(
    dy, d_stream, x, gate, weight, dx, dgate, parts, y, rows, eps, D: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """With n = x r, r = 1 / sqrt(mean(x^2) + eps), s = silu(gate) and u = dy weight s:

        dx = r (u - n mean(n u)) + d_stream,  dgate = dy n weight silu'(gate),  dweight = sum over rows of dy n s

    grid     (programs,): a program takes every programs-th tile of rows and adds up its part of dweight
    in, out  as the forward's; parts: [programs, D] float32
    traffic  reads dy, d_stream, x and gate, writes dx, dgate and, where wanted, y: bound by memory
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BD)
    b_w = tl.full([BD], 1.0, tl.float32)
    if weight is not None:
        b_w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    b_part = tl.zeros([BD], tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), programs):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        m = (row < rows)[:, None] & (column < D)[None, :]
        place = row[:, None] * D + column[None, :]
        b_n, b_r = normed(tl.load(x + place, mask=m, other=0.0).to(tl.float32), D, eps)
        b_dy = tl.load(dy + place, mask=m, other=0.0).to(tl.float32)
        b_ds = b_dy * b_n * b_w[None, :]
        b_y = b_n * b_w[None, :]
        if gate is not None:
            b_gate = tl.load(gate + place, mask=m, other=0.0).to(tl.float32)
            b_sigmoid = sigmoid(b_gate)
            b_silu = b_gate * b_sigmoid
            tl.store(dgate + place, b_ds * (b_sigmoid + b_silu * (1 - b_sigmoid)), mask=m)
            b_dy *= b_silu
            b_y *= b_silu
        if y is not None:
            tl.store(y + place, b_y, mask=m)
        b_part += tl.sum(b_dy * b_n, axis=0)
        b_u = b_dy * b_w[None, :]
        b_dx = b_r[:, None] * (b_u - b_n * (tl.sum(b_n * b_u, axis=1) / D)[:, None])
        if d_stream is not None:
            b_dx += tl.load(d_stream + place, mask=m, other=0.0).to(tl.float32)
        tl.store(dx + place, b_dx, mask=m)
    if weight is not None:
        tl.store(parts + program * D + column, b_part, mask=column < D)


@triton.jit
def swiglu_kernel(a, b, y, size, TILE: tl.constexpr):
    """y = silu(a) b.   grid (size / TILE,);   reads a and b, writes y."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    m = place < size
    b_a, b_b = tl.load(a + place, mask=m).to(tl.float32), tl.load(b + place, mask=m).to(tl.float32)
    tl.store(y + place, b_a * sigmoid(b_a) * b_b, mask=m)


@triton.jit
def swiglu_backward_kernel(dy, a, b, da, db, y, size, TILE: tl.constexpr):
    """da = dy b silu'(a), db = dy silu(a).   grid (size / TILE,);   reads dy, a and b, writes da, db and, where wanted, y."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    m = place < size
    b_a, b_b = tl.load(a + place, mask=m).to(tl.float32), tl.load(b + place, mask=m).to(tl.float32)
    b_dy = tl.load(dy + place, mask=m).to(tl.float32)
    b_sigmoid = sigmoid(b_a)
    b_silu = b_a * b_sigmoid
    tl.store(da + place, b_dy * b_b * (b_sigmoid + b_silu * (1 - b_sigmoid)), mask=m)
    tl.store(db + place, b_dy * b_silu, mask=m)
    if y is not None:
        tl.store(y + place, b_silu * b_b, mask=m)


@triton.jit
def decay_kernel(x, g, n, size, TILE: tl.constexpr):
    """g = log(sigmoid(x)) / n = (min(x, 0) - log(1 + exp(-|x|))) / n.   grid (size / TILE,);   reads x, writes g float32."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    m = place < size
    b_x = tl.load(x + place, mask=m, other=0.0).to(tl.float32)
    b_log = log1p(exp(-tl.abs(b_x), "tf32x3"))
    tl.store(g + place, (tl.minimum(b_x, 0.0) - b_log) / n, mask=m)


@triton.jit
def decay_backward_kernel(dg, g, dx, n, size, TILE: tl.constexpr):
    """dx = dg sigmoid(-x) / n = -dg (exp(n g) - 1) / n: g alone, which the recurrence keeps, is enough.

    grid (size / TILE,);   reads dg and g float32, writes dx.
    """
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    m = place < size
    b_dg, b_x = tl.load(dg + place, mask=m, other=0.0), n * tl.load(g + place, mask=m, other=0.0)
    tl.store(dx + place, -b_dg * expm1(b_x) / n, mask=m)


@triton.jit(do_not_specialize=["rows", "angle_rows"])
def rotate_kernel(
    x, cos, sin, y,
    rows, H, angle_rows,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr, BHALF: tl.constexpr, BREST: tl.constexpr,
):  # fmt: skip
    """(a, b) -> (a cos - b sin, b cos + a sin) for the channel pairs (i, i + HALF), or (2 i, 2 i + 1) if INTERLEAVED.

    grid     (rows / ROWS,) with rows = B T H
    in, out  x, y: [rows, D]; cos, sin: [angle_rows, HALF] float32, angle_rows being T or B T
    traffic  reads x, writes y; the angles stay in the cache
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, BHALF)
    m = (row < rows)[:, None] & (i < HALF)[None, :]
    angle = ((row // H) % angle_rows)[:, None] * HALF + i[None, :]
    b_cos, b_sin = tl.load(cos + angle, mask=m, other=0.0), tl.load(sin + angle, mask=m, other=0.0)
    first = row[:, None] * D + (2 * i if INTERLEAVED else i)[None, :]
    second = first + (1 if INTERLEAVED else HALF)
    b_a, b_b = tl.load(x + first, mask=m).to(tl.float32), tl.load(x + second, mask=m).to(tl.float32)
    tl.store(y + first, b_a * b_cos - b_b * b_sin, mask=m)
    tl.store(y + second, b_b * b_cos + b_a * b_sin, mask=m)
    if 2 * HALF < D:
        rest = 2 * HALF + tl.arange(0, BREST)
        m = (row < rows)[:, None] & (rest < D)[None, :]
        place = row[:, None] * D + rest[None, :]
        tl.store(y + place, tl.load(x + place, mask=m), mask=m)
