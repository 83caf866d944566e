"""Short causal convolution of each channel with its own few taps."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_linear.ops import chunked, gpu, reference
from hf_linear.ops.dispatch import (
    Backend,
    check_floating,
    check_packed,
    check_sequence,
    check_shape,
    check_state,
    check_step,
    compute_dtype,
    needs_gradient,
    run,
)

STATE_LAYOUT = "[B, W - 1, D] (packed: [N, W - 1, D])"
IMPLEMENTATIONS = {"reference": reference.short_conv, "chunked": chunked.short_conv}


def short_conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """y_t = act(b + sum_{j < W} w[:, W-1-j] x_{t-j}).

    Args:
        x: [B, T, D]. Token-major, as the projections around it write and read it: W passes over the sequence cost less than
            the transpositions that a channel-major convolution needs.
        w: [D, W]; the last tap multiplies the current token.
        b: [D] or None.
        activation: "silu" or None.
        initial_state: the last W - 1 inputs, oldest first, [B, W - 1, D] in x's dtype, zeros when None; [N, W - 1, D] with
            `cu_seqlens`.
        cu_seqlens: [N + 1] int32 or int64, the boundaries of N documents packed in one row (B = 1).
        backend: "reference" token by token, "chunked" tap by tap, "triton" in one pass on a GPU (bfloat16, float16 or float32,
            W up to 8). "auto" is triton on a GPU that has the kernels, chunked elsewhere. A named backend is used or raises.

    Returns:
        y [B, T, D] in x's dtype, and the final state, shaped and typed as `initial_state`.

    Raises:
        ValueError: a shape, dtype, device, activation or backend is not as above.
    """
    prepare(x, w, b, activation, initial_state, cu_seqlens)
    silu = activation == "silu"
    if gpu.short_conv_chosen(backend, x, w):
        if x.shape[1] == 1 and cu_seqlens is None and not needs_gradient(x, w, b, initial_state):
            state = zero_state(x, w, None) if initial_state is None else initial_state.clone()
            return gpu.short_conv_step(x, w, b, silu, state), state
        return gpu.short_conv(x, w, b, silu, initial_state, cu_seqlens)
    if initial_state is None:
        initial_state = zero_state(x, w, cu_seqlens)
    dtype = compute_dtype(x)
    if backend == "auto":
        backend = "chunked"  # there, one token takes fewer passes than here by its recurrence
    # x and b stay as narrow as they are: what they meet is wide.
    inputs = x, w.to(dtype), b, initial_state, cu_seqlens
    y, state = run(IMPLEMENTATIONS, backend, x.shape[1], *inputs, dtype if silu else x.dtype)
    return (F.silu(y) if silu else y).to(x.dtype), state.to(x.dtype)


def short_conv_step(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    state: Tensor,
    activation: Literal["silu"] | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """`short_conv` on one token, written into the state that the caller holds, without a gradient.

    Args:
        x, w, b, activation: as in `short_conv`, with T = 1.
        state: [B, W - 1, D] in x's dtype, which is written.
        backend: "reference" in PyTorch, "triton" in one launch on a GPU, "auto" for what the op chooses.

    Returns:
        y [B, 1, D] in x's dtype, and `state` itself.

    Raises:
        ValueError: a shape, dtype, device, activation or backend is not as above, or a gradient is wanted.
    """
    prepare(x, w, b, activation, state, None)
    check_step("short_conv", x.shape[1], x, w, b, state)
    if gpu.short_conv_chosen(backend, x, w):
        return gpu.short_conv_step(x, w, b, activation == "silu", state), state
    dtype = compute_dtype(x)
    y, state = run({"reference": in_place}, backend, 1, x, w.to(dtype), b, state)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype), state


def in_place(x: Tensor, w: Tensor, b: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    window = torch.cat([state, x], 1)
    state.copy_(window[:, 1:])
    y = (window * w.T).sum(1, keepdim=True)
    return y if b is None else y + b, state


def prepare(
    x: Tensor, w: Tensor, b: Tensor | None, activation: str | None, state: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    """Check the inputs."""
    check_floating(x=x, w=w, b=b, initial_state=state)
    check_sequence("x", x, "[B, T, D]", dim=1)
    _, T, D = x.shape
    if w.dim() != 2 or w.shape[0] != D or w.shape[1] == 0:
        raise ValueError(
            f"w must be [D, W] with D = {D} channels and W >= 1 taps, got {list(w.shape)}: "
            "squeeze(1) makes it of the weight of a depthwise Conv1d"
        )
    if b is not None:
        check_shape("b", b, "[D]", (D,), "give one number a channel")
    if activation not in (None, "silu"):
        raise ValueError(f'activation must be None or "silu", got {activation!r}: apply others to the output')
    check_packed(cu_seqlens, x, T)
    if state is not None:
        check_state("initial_state", state, STATE_LAYOUT, state_shape(x, w, cu_seqlens), x.dtype)


def state_shape(x: Tensor, w: Tensor, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    return (x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1, w.shape[1] - 1, x.shape[2])


def zero_state(x: Tensor, w: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return x.new_zeros(state_shape(x, w, cu_seqlens))
