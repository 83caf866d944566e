"""Every recurrence of the zoo, token by token: the oracle that all other implementations are proved against.

B batch, T tokens, H heads, K key dim, V value dim, D channels, W taps, L filter length. Tensors arrive checked and in the
dtype to compute in (see `hf_linear.ops.checks`); float64 in gives float64 out.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from hf_linear.ops.dispatch import check_filter


def by_document(
    recurrence: Callable, sequences: list[Tensor], state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run `recurrence(*sequences, state)`, restarting it at every document of a packed row."""
    if cu_seqlens is None:
        return recurrence(*sequences, state)
    bounds = cu_seqlens.tolist()
    outputs, states = [], []
    for n, (start, end) in enumerate(pairwise(bounds)):
        if start == end:
            states.append(state[n : n + 1])
            continue
        o, final = recurrence(*(x[:, start:end] for x in sequences), state[n : n + 1])
        outputs.append(o)
        states.append(final)
    return torch.cat(outputs, 1), torch.cat(states)


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T,   o_t = scale * S_t^T q_t."""

    def recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        o = []
        for q_t, k_t, v_t, g_t in zip(q.unbind(1), k.unbind(1), v.unbind(1), g.unbind(1), strict=True):
            state = g_t.exp()[..., None] * state + k_t[..., None] * v_t[..., None, :]
            o.append(scale * (q_t[..., None, :] @ state).squeeze(-2))
        return torch.stack(o, 1), state

    return by_document(recurrence, [q, k, v, g], state, cu_seqlens)


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T,   o_t = scale * S_t^T q_t: one decay for all key channels of a head."""
    return gated_linear_attention(q, k, v, g[..., None], scale, state, cu_seqlens)


def short_conv(
    x: Tensor, w: Tensor, b: Tensor | None, state: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """y_t = b + sum_j w[:, W-1-j] x_{t-j} in `dtype`; the state is the last W - 1 inputs, oldest first."""

    def recurrence(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y = []
        for x_t in x.unbind(1):
            window = torch.cat([state, x_t[:, None]], 1)  # [B, W, D]
            y.append((window * w.T).sum(1) if b is None else (window * w.T).sum(1) + b)
            state = window[:, 1:]
        return torch.stack(y, 1).to(dtype), state

    x, state, b = x.to(w.dtype), state.to(w.dtype), None if b is None else b.to(w.dtype)
    return by_document(recurrence, [x], state, cu_seqlens)


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,   y_t = h_t C_t, with h [B, D, N]."""

    def recurrence(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y = []
        for x_t, dt_t, B_t, C_t in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True):
            h = (dt_t[..., None] * A).exp() * h + (dt_t * x_t)[..., None] * B_t[:, None]
            y.append((h @ C_t[..., None]).squeeze(-1))
        return torch.stack(y, 1), h

    return by_document(recurrence, [x, dt, B, C], state, cu_seqlens)


def long_conv(p: Tensor, h: Tensor, history: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """y_t = sum_{s <= t} h[:, t - s] p_s, the history being the p that came before; the state is all p so far."""

    def recurrence(p: Tensor, history: Tensor) -> tuple[Tensor, Tensor]:
        p = torch.cat([history.transpose(1, 2), p], 1)  # [B, P + T, D]
        y = []
        for t in range(history.shape[-1] + 1, p.shape[1] + 1):
            y.append((p[:, :t] * h[:, :t].flip(1).T).sum(1))
        return torch.stack(y, 1), p

    if cu_seqlens is None:
        y, state = recurrence(p.transpose(1, 2), history)
        return y.transpose(1, 2), state.transpose(1, 2)
    documents = [p[..., i:j] for i, j in pairwise(cu_seqlens.tolist()) if i < j]
    check_filter(h, max(document.shape[-1] for document in documents))
    outputs = [recurrence(document.transpose(1, 2), history)[0] for document in documents]
    return torch.cat(outputs, 1).transpose(1, 2), p.clone()
