"""Short causal convolution of each channel with its own few taps."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from hf_linear.ops import chunked, reference
from hf_linear.ops.dispatch import (
    Backend,
    check_floating,
    check_packed,
    check_sequence,
    check_shape,
    check_state,
    compute_dtype,
    run,
)

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
        backend: "reference" token by token, "chunked" tap by tap, which is "auto". A named backend is used or raises.

    Returns:
        y [B, T, D] in x's dtype, and the final state, shaped and typed as `initial_state`.

    Raises:
        ValueError: a shape, dtype, device, activation or backend is not as above.
    """
    check_floating(x=x, w=w, b=b, initial_state=initial_state)
    check_sequence("x", x, "[B, T, D]", dim=1)
    B, T, D = x.shape
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
    rows = B if cu_seqlens is None else len(cu_seqlens) - 1
    shape = (rows, w.shape[1] - 1, D)
    if initial_state is None:
        initial_state = x.new_zeros(shape)
    check_state("initial_state", initial_state, "[B, W - 1, D] (packed: [N, W - 1, D])", shape, x.dtype)
    dtype = compute_dtype(x)
    if backend == "auto":
        backend = "chunked"  # there, one token takes fewer passes than here by its recurrence
    # x and b stay as narrow as they are: what they meet is wide.
    inputs = x, w.to(dtype), b, initial_state, cu_seqlens
    y, state = run(IMPLEMENTATIONS, backend, T, *inputs, x.dtype if activation is None else dtype)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype), state.to(x.dtype)
