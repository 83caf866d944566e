"""Linear attention by chunks: the operator, whatever the decay."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_linear.kernels import scalar, vector
from hf_linear.kernels.autograd import operator
from hf_linear.kernels.launch import on_device


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] and the final state [N, H, K, V] float32, from q, k and v of one dtype and a float32 g."""
    kernels = vector if g.dim() == 4 else scalar
    with on_device(v):
        return kernels.forward(q, k, v, g, scale, initial_state, cu_seqlens)


def backward(
    do: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    needs_dg: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, g (empty unless needed) and the initial state (empty where there is none)."""
    kernels = vector if g.dim() == 4 else scalar
    with on_device(v):
        dq, dk, dv, dg, d_initial = kernels.backward(do, d_final, q, k, v, g, scale, initial_state, cu_seqlens, needs_dg)
    dg, d_initial = (g.new_empty(0) if x is None else x for x in (dg, d_initial))
    return dq, dk, dv, dg, d_initial


def fake(q, k, v, g, scale, initial_state, cu_seqlens):
    return empty(v), state_like(q, v, cu_seqlens)


def fake_backward(do, d_final, q, k, v, g, scale, initial_state, cu_seqlens, needs_dg):
    dg = q.new_empty(g.shape if needs_dg else 0, dtype=torch.float32)
    d_initial = q.new_empty(0, dtype=torch.float32) if initial_state is None else state_like(q, v, cu_seqlens)
    return empty(q), empty(k), empty(v), dg, d_initial


def empty(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def state_like(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_empty(rows, q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)


def save(ctx, inputs, output) -> None:
    q, k, v, g, ctx.scale, initial_state, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, g, initial_state, cu_seqlens)


def differentiate(backward: Callable, ctx, do: Tensor | None, d_final: Tensor | None):
    q, k, v, g, initial_state, cu_seqlens = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    needs_dg = ctx.needs_input_grad[3]
    dq, dk, dv, dg, d_initial = backward(do, d_final, q, k, v, g, ctx.scale, initial_state, cu_seqlens, needs_dg)
    return dq, dk, dv, dg if needs_dg else None, None, d_initial if ctx.needs_input_grad[5] else None, None


chunk_attention = operator("chunk_attention", forward, backward, (fake, fake_backward), save, differentiate)
