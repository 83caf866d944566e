"""RetNet's three views of one recurrence. All take the same arguments and return the same (o, state).

S_t = exp(g) S_{t-1} + k_t v_t^T,   o_t = scale * S_t^T q_t, with one constant log-decay g [H] a head.
Source: Sun et al. 2023, arXiv 2307.08621: parallel eq. 5, recurrent eq. 6, chunkwise eq. 7.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_linear.ops.dispatch import check_log_decay, check_sequence, check_shape, compute_dtype
from hf_linear.ops.linear_attention import ONE_A_HEAD, linear_attention, prepare, zero_state


def retention_decay(num_heads: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """RetNet's log-decays log(1 - 2^(-5 - h)) of head h, [H]."""
    heads = torch.arange(num_heads, device=device, dtype=dtype)
    return torch.log1p(-torch.exp2(-5 - heads))


def check_decay(q: Tensor, g: Tensor) -> None:
    check_sequence("q", q, "[B, T, H, K]", dim=1)
    if g is None:
        raise ValueError("g must be [H], got None: take retention_decay(H), or linear_attention for none")
    check_shape("g", g, "[H]", (q.shape[2],), ONE_A_HEAD)
    check_log_decay(g)


def retention_parallel(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, scale: float | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """o = (scale * q k^T * D) v with D_ij = exp(g (i - j)) for i >= j: quadratic in T, as attention is."""
    check_decay(q, g)
    scale, dtype, T = prepare(q, k, v, g, scale, initial_state, None), compute_dtype(v), q.shape[1]
    state = zero_state(q, v, None) if initial_state is None else initial_state
    qh, kh, vh = (x.to(dtype).transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]
    g = g.to(dtype)[:, None]
    steps = torch.arange(T, device=q.device, dtype=dtype)
    apart = (steps[:, None] - steps).clamp(min=0)
    D = (g[..., None] * apart).exp().tril()
    o = scale * ((qh @ kh.transpose(-1, -2) * D) @ vh + (g * (steps + 1)).exp()[..., None] * (qh @ state))
    decayed = kh * (g * (T - 1 - steps)).exp()[..., None]
    state = (g * T).exp()[..., None] * state + decayed.transpose(-1, -2) @ vh
    return o.transpose(1, 2).to(v.dtype), state


def retention_recurrent(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, scale: float | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token by token: O(1) state, what decoding does."""
    check_decay(q, g)
    return linear_attention(q, k, v, g, scale=scale, initial_state=initial_state, backend="reference")


def retention_chunkwise(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, scale: float | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Parallel within chunks, recurrent between them: linear in T, what training and prefill do."""
    check_decay(q, g)
    return linear_attention(q, k, v, g, scale=scale, initial_state=initial_state, backend="chunked")
