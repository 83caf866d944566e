"""The selective scan of Mamba-1: a decay a channel, state number and token, made of one step size a channel and token."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_linear.ops import chunked_scan, gpu, reference
from hf_linear.ops.dispatch import (
    Backend,
    check_floating,
    check_packed,
    check_sequence,
    check_shape,
    check_state,
    check_step,
    compute_dtype,
    full_precision,
    needs_gradient,
    readable,
    run,
)

ONE_A_CHANNEL = "give one number a channel"
NO_GROUPS = "give every channel of a row the same B and C; groups of channels are as many calls"
STATE_LAYOUT = "[batch, D, N] (packed: [documents, D, N])"
IMPLEMENTATIONS = {"reference": reference.selective_scan, "chunked": chunked_scan.selective_scan}


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,   y_t = (h_t C_t + D x_t) silu(z_t),   dt_t = softplus(dt_t + dt_bias).

    Args:
        x: [batch, T, D].
        dt: [batch, T, D], the step size, >= 0 once its bias is added; of any sign with `dt_softplus`.
        A: [D, N], <= 0.
        B: [batch, T, N], what all channels write along. Groups of channels with a B and C of their own are left out.
        C: [batch, T, N], what all channels read along.
        D: [D], the weight of the current token, or None.
        z: [batch, T, D], the gate, or None.
        dt_bias: [D] or None.
        dt_softplus: whether the step size is softplus(dt + dt_bias) or dt + dt_bias itself.
        initial_state: [batch, D, N] float32 (float64 for float64 inputs), zeros when None; with `cu_seqlens` one a document,
            [documents, D, N].
        cu_seqlens: [documents + 1] int32 or int64, the boundaries of documents packed in one row (batch = 1); each has its
            own state.
        backend: "reference" token by token, "chunked" in chunks of PyTorch, "triton" in one walk on a GPU (bfloat16, float16 or
            float32, N up to 64). "auto" is triton on a GPU that has the kernels; elsewhere one of the first two, by T. A named
            one is used or raises.

    Returns:
        y [batch, T, D] in x's dtype, and the final state, shaped and typed as `initial_state`.

    Raises:
        ValueError: a shape, dtype, device or backend is not as above; on a CPU also the values of A, dt and `cu_seqlens`.

    Source: Gu and Dao 2023, arXiv 2312.00752, eq. 2 and algorithm 2.
    """
    prepare(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens)
    if gpu.scan_chosen(backend, x, A):
        inputs = x, dt, A, B, C, D, z, dt_bias
        gradient = needs_gradient(*inputs, initial_state)
        if x.shape[1] == 1 and cu_seqlens is None and not gradient:
            state = zero_state(x, A, None) if initial_state is None else initial_state.clone()
            return gpu.selective_scan_step(*inputs, dt_softplus, state), state
        return gpu.selective_scan(*inputs, dt_softplus, initial_state, cu_seqlens, gradient)
    if initial_state is None:
        initial_state = zero_state(x, A, cu_seqlens)
    return by_implementation(
        IMPLEMENTATIONS, backend, x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens
    )  # fmt: skip


def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    state: Tensor,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """`selective_scan` on one token, written into the state that the caller holds, without a gradient.

    Args:
        x, dt, A, B, C, D, z, dt_bias, dt_softplus: as in `selective_scan`, with T = 1.
        state: [batch, D, N] float32 (float64 for float64 inputs), which is written.
        backend: "reference" in PyTorch, "triton" in one launch on a GPU, "auto" for what the op chooses.

    Returns:
        y [batch, 1, D] in x's dtype, and `state` itself.

    Raises:
        ValueError: a shape, dtype, device or backend is not as above, or a gradient is wanted.
    """
    prepare(x, dt, A, B, C, D, z, dt_bias, dt_softplus, state, None)
    check_step("selective_scan", x.shape[1], x, dt, A, B, C, D, z, dt_bias, state)
    if gpu.scan_chosen(backend, x, A):
        return gpu.selective_scan_step(x, dt, A, B, C, D, z, dt_bias, dt_softplus, state), state
    return by_implementation({"reference": in_place}, backend, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state, None)


def prepare(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Check the inputs."""
    check_floating(x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, initial_state=initial_state)
    check_sequence("x", x, "[batch, T, D]", dim=1)
    batch, T, channels = x.shape
    if A.dim() != 2 or A.shape[0] != channels or A.shape[1] == 0:
        raise ValueError(
            f"A must be [D, N] with D = {channels} channels and N >= 1 state numbers, got {list(A.shape)}: "
            "give one row a channel, as -A_log.exp() of a Mamba checkpoint has"
        )
    N = A.shape[1]
    check_shape("dt", dt, "[batch, T, D] as x", (batch, T, channels), "give one step size a channel, of full rank")
    check_shape("B", B, "[batch, T, N]", (batch, T, N), NO_GROUPS)
    check_shape("C", C, "[batch, T, N]", (batch, T, N), NO_GROUPS)
    for name, weight in (("D", D), ("dt_bias", dt_bias)):
        if weight is not None:
            check_shape(name, weight, "[D]", (channels,), ONE_A_CHANNEL)
    if z is not None:
        check_shape("z", z, "[batch, T, D] as x", (batch, T, channels), ONE_A_CHANNEL + " and token")
    check_packed(cu_seqlens, x, T)
    if initial_state is not None:
        check_state("initial_state", initial_state, STATE_LAYOUT, state_shape(x, A, cu_seqlens), compute_dtype(x))
    if readable(A) and A.numel() > 0 and (largest := A.max().item()) > 0:
        raise ValueError(f"A must be <= 0, got values up to {largest:.3g}: take -A_log.exp() of a logarithm A_log")
    if readable(dt) and dt.numel() > 0 and not dt_softplus:
        least = (dt if dt_bias is None else dt + dt_bias).min().item()
        if least < 0:
            raise ValueError(f"dt must be >= 0 once its bias is added, got values down to {least:.3g}: pass dt_softplus=True")


def state_shape(x: Tensor, A: Tensor, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    return (x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1, *A.shape)


def zero_state(x: Tensor, A: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return torch.zeros(state_shape(x, A, cu_seqlens), dtype=compute_dtype(x), device=x.device)


def by_implementation(
    implementations: Mapping[str, Callable],
    backend: str,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run a recurrence of PyTorch on checked inputs, in the dtype to compute in, and what is around it."""
    dtype = compute_dtype(x)
    with full_precision(x):
        x_, dt, A, B, C = (tensor.to(dtype) for tensor in (x, dt, A, B, C))
        dt = dt if dt_bias is None else dt + dt_bias.to(dtype)
        dt = F.softplus(dt) if dt_softplus else dt
        y, state = run(implementations, backend, x.shape[1], x_, dt, A, B, C, state, cu_seqlens)
        y = y if D is None else y + D.to(dtype) * x_
        y = y if z is None else y * F.silu(z.to(dtype))
    return y.to(x.dtype), state


def in_place(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, cu_seqlens: None) -> tuple[Tensor, Tensor]:
    state.mul_((dt.mT * A).exp_()).addcmul_((dt * x).mT, B)
    return (state @ C.mT).mT, state
