"""Linear attention with no decay, a decay a head, or a decay a head and token."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hf_linear.ops import chunked, gpu, reference
from hf_linear.ops.dispatch import (
    Backend,
    check_floating,
    check_log_decay,
    check_packed,
    check_sequence,
    check_shape,
    check_state,
    compute_dtype,
    needs_gradient,
    run,
)

GROUPED = "give every query head a key and a value, with repeat_interleave(groups, dim=2) where heads share them"
ONE_A_HEAD = "give one log-decay a head"
STATE_LAYOUT = "[B, H, K, V] (packed: [N, H, K, V])"
IMPLEMENTATIONS = {"reference": reference.linear_attention, "chunked": chunked.linear_attention}


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T,   o_t = scale * S_t^T q_t.

    Args:
        q: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, H, V].
        g: natural log-decay, <= 0: None (no decay), [H] (RetNet) or [B, T, H] (Mamba-2).
        scale: K ** -0.5 when None.
        initial_state: [B, H, K, V] float32 (float64 for float64 inputs), zeros when None; [N, H, K, V] with `cu_seqlens`.
        cu_seqlens: [N + 1] int32 or int64, the boundaries of N documents packed in one row (B = 1); each has its own state.
        backend: "reference" token by token, "chunked" in chunks of PyTorch, "triton" in chunks on a GPU (one token without a
            gradient by its recurrence). "auto" is triton on a GPU that has the kernels; elsewhere one of the first two, by T.
            A named one is used or raises.

    Returns:
        o [B, T, H, V] in v's dtype, and the final state, shaped and typed as `initial_state`.

    Raises:
        ValueError: a shape, dtype, device or backend is not as above; on a CPU also the values of g and `cu_seqlens`.

    Source: Katharopoulos et al. 2020, arXiv 2006.16236, eq. 16-18; RetNet, arXiv 2307.08621, eq. 6;
    Mamba-2, arXiv 2405.21060, eq. 16.
    """
    scale = prepare(q, k, v, g, scale, initial_state, cu_seqlens)
    B, T, H, _ = q.shape
    if g is None:
        g = q.new_zeros(H)
    elif g.dim() == 1:
        check_shape("g", g, "[H]", (H,), ONE_A_HEAD)
    else:
        check_shape("g", g, "[H] or [B, T, H]", (B, T, H), "a decay a key channel is for gated_linear_attention")
    check_log_decay(g)
    return attend(IMPLEMENTATIONS, backend, q, k, v, g.expand(B, T, H), scale, initial_state, cu_seqlens)


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> float:
    """Check what the matrix-state ops have in common; returns the scale."""
    check_floating(q=q, k=k, v=v, g=g, initial_state=initial_state)
    check_sequence("q", q, "[B, T, H, K]", dim=1)
    B, T, H, K = q.shape
    check_shape("k", k, "[B, T, H, K] as q", (B, T, H, K), GROUPED)
    check_sequence("v", v, "[B, T, H, V]", dim=1)
    V = v.shape[-1]
    check_shape("v", v, "[B, T, H, V] as q", (B, T, H, V), GROUPED)
    check_packed(cu_seqlens, q, T)
    if initial_state is not None:
        check_state("initial_state", initial_state, STATE_LAYOUT, state_shape(q, v, cu_seqlens), compute_dtype(v))
    return K**-0.5 if scale is None else scale


def state_shape(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    return (q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1, q.shape[2], q.shape[3], v.shape[3])


def zero_state(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return torch.zeros(state_shape(q, v, cu_seqlens), dtype=compute_dtype(v), device=q.device)


def attend(
    implementations: Mapping[str, Callable],
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run a recurrence on checked inputs. The kernels take them as they are, PyTorch in the dtype to compute in."""
    if gpu.chosen(backend, q, v):
        if q.shape[1] == 1 and cu_seqlens is None and not needs_gradient(q, k, v, g, initial_state):
            state = zero_state(q, v, None) if initial_state is None else initial_state.clone()
            return gpu.step(q, k, v, g, scale, state), state
        return gpu.attend(q, k, v, g, scale, initial_state, cu_seqlens)
    dtype = compute_dtype(v)
    if initial_state is None:
        initial_state = zero_state(q, v, cu_seqlens)
    q, k, v_, g = (x.to(dtype) for x in (q, k, v, g))
    o, state = run(implementations, backend, q.shape[1], q, k, v_, g, scale, initial_state, cu_seqlens)
    return o.to(v.dtype), state
