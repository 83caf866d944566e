"""One token of the short convolution, the state read and moved on in place.

    y = act(b + w_0 x + sum_{0 < j < W} w_j state[W - 1 - j]),        state <- (state[1], ..., state[W - 2], x)

grid     (D / 128, batch): one launch, a channel a thread, which reads a place of its state before it writes it
dtypes   x, w and b as they come, the state as x; all arithmetic float32
traffic  x, y, and the state in and out
oracle   hf_linear.ops.reference.short_conv, at T = 1
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_linear.kernels.launch import on_device
from hf_linear.kernels.selective_scan_tiles import sigmoid

BD = 128


@triton.jit(do_not_specialize=["x_stride", "row_stride", "place_stride"])
def step_kernel(
    x, w, b, state, y, x_stride, row_stride, place_stride,
    WIDTH: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One program: BD channels of a row. w: [WIDTH, W]; b may be None."""
    row = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    in_d = d < WIDTH
    held = state + row * row_stride + d
    new = tl.load(x + row * x_stride + d, in_d, 0.0)
    p = tl.load(w + d * W + (W - 1), in_d, 0.0).to(tl.float32) * new.to(tl.float32)
    if b is not None:
        p += tl.load(b + d, in_d, 0.0).to(tl.float32)
    for j in tl.static_range(W - 1):
        old = tl.load(held + j * place_stride, in_d, 0.0)
        p += tl.load(w + d * W + j, in_d, 0.0).to(tl.float32) * old.to(tl.float32)
        if j > 0:
            tl.store(held + (j - 1) * place_stride, old, in_d)
    if W > 1:
        tl.store(held + (W - 2) * place_stride, new, in_d)
    if SILU:
        p *= sigmoid(p, x.dtype.element_ty == tl.float32)
    tl.store(y + row * WIDTH + d, p.to(y.dtype.element_ty), in_d)


# Defined by its schema, as the other kernels are. It has no gradient: callers see to it that none is wanted.
STEP = "hf_linear::short_conv_triton_step"
torch.library.define(STEP, "(Tensor x, Tensor w, Tensor? b, bool silu, Tensor(a!) state) -> Tensor")
step = torch.ops.hf_linear.short_conv_triton_step


@torch.library.impl(STEP, ("cpu", "cuda"))
def _(x: Tensor, w: Tensor, b: Tensor | None, silu: bool, state: Tensor) -> Tensor:
    """y [B, 1, D] in x's dtype; state [B, W - 1, D] is written."""
    B, _, width = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    y, held = x.new_empty(x.shape), state if state.stride(2) == 1 else state.contiguous()
    with on_device(x):
        step_kernel[(triton.cdiv(width, BD), B)](
            x, w.contiguous(), None if b is None else b.contiguous(), held, y, x.stride(0), held.stride(0), held.stride(1),
            WIDTH=width, W=w.shape[1], BD=BD, SILU=silu,
        )  # fmt: skip
    if held is not state:
        state.copy_(held)
    torch.autograd.graph.increment_version(state)  # so that a graph that kept the state as it was says so
    return y


@torch.library.register_fake(STEP)
def _(x, w, b, silu, state):
    return x.new_empty(x.shape)
