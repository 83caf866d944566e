"""One token of the selective scan, the state read and written in place: what decoding does at every layer.

    h <- exp(dt A) h + dt x B^T,        y = (h C + D x) silu(z),        dt = softplus(dt + bias)

grid     (D / BD, batch): one launch, 128 programs for D = 4096 and a batch of one
dtypes   x, dt, B, C and z as they come, one compiled kernel a combination; the state and all arithmetic float32; y as x
traffic  the state once in and once out, 8 N bytes a channel, and A, 4 N
oracle   hf_linear.ops.reference.selective_scan, at T = 1
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_linear.kernels.launch import on_device
from hf_linear.kernels.selective_scan_tiles import sigmoid, softplus

BD = 32
STRIDES = ("x_stride", "dt_stride", "B_stride", "C_stride", "z_stride")


@triton.jit(do_not_specialize=STRIDES)
def step_kernel(
    x, dt, A, B, C, D, z, bias, state, y, x_stride, dt_stride, B_stride, C_stride, z_stride,
    WIDTH: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """One program: BD channels of a row. The strides are those between rows; D, z and bias may be None."""
    row = tl.program_id(1).to(tl.int64)
    d, n = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, NP)
    in_d, in_n = d < WIDTH, n < N
    of_state, in_state = d[:, None] * N + n[None, :], in_d[:, None] & in_n[None, :]
    h = tl.load(state + row * (WIDTH * N) + of_state, in_state, 0.0)
    A_ = tl.load(A + of_state, in_state, 0.0).to(tl.float32)
    x_ = tl.load(x + row * x_stride + d, in_d, 0.0).to(tl.float32)
    dt_ = tl.load(dt + row * dt_stride + d, in_d, 0.0).to(tl.float32)
    if bias is not None:
        dt_ += tl.load(bias + d, in_d, 0.0).to(tl.float32)
    if SOFTPLUS:
        dt_ = softplus(dt_, x.dtype.element_ty == tl.float32)
    B_ = tl.load(B + row * B_stride + n, in_n, 0.0).to(tl.float32)
    C_ = tl.load(C + row * C_stride + n, in_n, 0.0).to(tl.float32)
    h = tl.exp(dt_[:, None] * A_) * h + (dt_ * x_)[:, None] * B_[None, :]
    tl.store(state + row * (WIDTH * N) + of_state, h, in_state)
    y_ = tl.sum(h * C_[None, :], 1)
    if D is not None:
        y_ += tl.load(D + d, in_d, 0.0).to(tl.float32) * x_
    if z is not None:
        z_ = tl.load(z + row * z_stride + d, in_d, 0.0).to(tl.float32)
        y_ *= z_ * sigmoid(z_, x.dtype.element_ty == tl.float32)
    tl.store(y + row * WIDTH + d, y_.to(y.dtype.element_ty), in_d)


# Defined by its schema, as the other kernels are. It has no gradient: callers see to it that none is wanted.
STEP = "hf_linear::selective_scan_triton_step"
torch.library.define(
    STEP,
    "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, "
    "Tensor(a!) state) -> Tensor",
)
step = torch.ops.hf_linear.selective_scan_triton_step


@torch.library.impl(STEP, ("cpu", "cuda"))
def _(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool, state: Tensor,
) -> Tensor:  # fmt: skip
    """y [batch, 1, D] in x's dtype; state [batch, D, N] float32 is written."""
    batch, _, width = x.shape
    N = A.shape[1]
    x, dt, B, C, z = (y if y is None or y.stride(2) == 1 else y.contiguous() for y in (x, dt, B, C, z))
    D, dt_bias = (None if y is None else y.contiguous() for y in (D, dt_bias))
    y, held = x.new_empty(x.shape), state.contiguous()
    strides = (0 if z is None else z.stride(0), *(y.stride(0) for y in (C, B, dt, x)))
    with on_device(x):
        step_kernel[(triton.cdiv(width, BD), batch)](
            x, dt, A.contiguous(), B, C, D, z, dt_bias, held, y, *reversed(strides),
            WIDTH=width, N=N, NP=triton.next_power_of_2(N), BD=BD, SOFTPLUS=dt_softplus,
        )  # fmt: skip
    if held is not state:
        state.copy_(held)
    torch.autograd.graph.increment_version(state)  # so that a graph that kept the state as it was says so
    return y


@torch.library.register_fake(STEP)
def _(x, dt, A, B, C, D, z, dt_bias, dt_softplus, state):
    return x.new_empty(x.shape)
