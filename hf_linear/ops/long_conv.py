"""Long causal convolution: a filter as long as the sequence, with multiplicative gates around it."""

from __future__ import annotations

from torch import Tensor

from hf_linear.ops import chunked, gpu, reference
from hf_linear.ops.dispatch import (
    Backend,
    check_filter,
    check_floating,
    check_packed,
    check_sequence,
    check_shape,
    check_state,
    compute_dtype,
    run,
)

IMPLEMENTATIONS = {"reference": reference.long_conv, "chunked": chunked.long_conv}


def long_conv(
    u: Tensor,
    h: Tensor,
    skip: Tensor | None = None,
    *,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """p = pre_gate * u,   y_t = post_gate_t * (sum_{s <= t} h[:, t - s] p_s + skip * p_t).

    Args:
        u: [B, D, T], channel-major: the convolution runs along the last, contiguous dimension.
        h: [D, L], the filter; L must reach as far as the sequence and its history together.
        skip: [D], the weight of the input itself, or None.
        pre_gate: [B, D, T] or None.
        post_gate: [B, D, T] or None.
        initial_state: [B, D, P] float32 (float64 for float64 inputs), the p of P earlier tokens; none when None.
        cu_seqlens: [N + 1] int32 or int64, the boundaries of N documents packed in one row (B = 1). The convolution restarts
            at each of them; `initial_state` must then be None.
        backend: "triton" (bfloat16, float16 or float32 on a GPU, no history, no documents; up to 1048576 tokens, 262144 in
            float32), "chunked" by FFT, "reference" by direct sums; "auto" takes the first that serves. A named backend is
            used or raises.

    Returns:
        y [B, D, T] in u's dtype, and the state [B, D, P + T]: every p so far (packed: the p of this row, as it is packed).

    Raises:
        ValueError: the sequence is longer than the filter, or a shape, dtype, device or backend is not as above.

    Source: Poli et al. 2023, arXiv 2302.10866, section 3.
    """
    check_floating(u=u, h=h, skip=skip, pre_gate=pre_gate, post_gate=post_gate, initial_state=initial_state)
    check_sequence("u", u, "[B, D, T]", dim=2)
    B, D, T = u.shape
    if h.dim() != 2 or h.shape[0] != D:
        raise ValueError(f"h must be [D, L] with D = {D} channels, got {list(h.shape)}: transpose or expand it")
    for name, gate in (("pre_gate", pre_gate), ("post_gate", post_gate)):
        if gate is not None:
            check_shape(name, gate, "[B, D, T] as u", (B, D, T), "the tokens come last, transpose(1, 2) puts them there")
    if skip is not None:
        check_shape("skip", skip, "[D]", (D,), "give one number a channel")
    check_packed(cu_seqlens, u, T)
    dtype = compute_dtype(u)
    if initial_state is None:
        initial_state = u.new_zeros(B, D, 0, dtype=dtype)
    elif cu_seqlens is not None:
        raise ValueError("initial_state must be None with cu_seqlens, got a tensor: continue one document at a time")
    if initial_state.dim() != 3:
        raise ValueError(
            f"initial_state must be [B, D, P], got {list(initial_state.shape)}: pass what an earlier call returned"
        )
    P = initial_state.shape[-1]
    check_state("initial_state", initial_state, "[B, D, P]", (B, D, P), dtype)
    if cu_seqlens is None:
        check_filter(h, P + T)
    gates = [gate for gate in (pre_gate, post_gate) if gate is not None]
    if gpu.long_conv_chosen(backend, u, gates, initial_state, cu_seqlens):
        return gpu.long_conv(u, h, skip, pre_gate, post_gate)
    p, h = u.to(dtype), h.to(dtype)
    if pre_gate is not None:
        p = p * pre_gate.to(dtype)
    y, state = run(IMPLEMENTATIONS, backend, T, p, h, initial_state, cu_seqlens)
    if skip is not None:
        y = y + skip.to(dtype)[:, None] * p
    if post_gate is not None:
        y = y * post_gate.to(dtype)
    return y.to(u.dtype), state
