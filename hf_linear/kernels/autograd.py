"""The chunk kernels as PyTorch operators: differentiable once, and one node each of a compiled graph.

Eager calls go round the dispatcher: on a small shape it takes longer than the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_linear.kernels import scalar, vector
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


FORWARD, BACKWARD = "hf_linear::chunk_attention", "hf_linear::chunk_attention_backward"
INPUTS = "Tensor q, Tensor k, Tensor v, Tensor g, float scale, Tensor? initial_state, Tensor? cu_seqlens"
torch.library.define(FORWARD, f"({INPUTS}) -> (Tensor, Tensor)")
torch.library.define(
    BACKWARD, f"(Tensor do, Tensor? d_final, {INPUTS}, bool needs_dg) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
torch.library.impl(FORWARD, ("cpu", "cuda"))(forward)
torch.library.impl(BACKWARD, ("cpu", "cuda"))(backward)


@torch.library.register_fake(FORWARD)
def _(q, k, v, g, scale, initial_state, cu_seqlens):
    return empty(v), state_like(q, v, cu_seqlens)


@torch.library.register_fake(BACKWARD)
def _(do, d_final, q, k, v, g, scale, initial_state, cu_seqlens, needs_dg):
    dg = q.new_empty(g.shape if needs_dg else 0, dtype=torch.float32)
    d_initial = q.new_empty(0, dtype=torch.float32) if initial_state is None else state_like(q, v, cu_seqlens)
    return empty(q), empty(k), empty(v), dg, d_initial


def empty(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def state_like(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_empty(rows, q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)


def setup_context(ctx, inputs, output) -> None:
    q, k, v, g, ctx.scale, initial_state, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, g, initial_state, cu_seqlens)
    ctx.set_materialize_grads(False)


def differentiate(backward: Callable, ctx, do: Tensor | None, d_final: Tensor | None):
    """The gradients by `backward`, the function or the operator."""
    q, k, v, g, initial_state, cu_seqlens = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    needs_dg = ctx.needs_input_grad[3]
    dq, dk, dv, dg, d_initial = backward(do, d_final, q, k, v, g, ctx.scale, initial_state, cu_seqlens, needs_dg)
    return dq, dk, dv, dg if needs_dg else None, None, d_initial if ctx.needs_input_grad[5] else None, None


torch.library.register_autograd(
    FORWARD, partial(differentiate, torch.ops.hf_linear.chunk_attention_backward), setup_context=setup_context
)


class ChunkAttention(torch.autograd.Function):
    """The operator without the dispatcher."""

    @staticmethod
    def forward(ctx, *inputs):
        output = forward(*inputs)
        setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(once_differentiable(partial(differentiate, backward)))


def chunk_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    run = torch.ops.hf_linear.chunk_attention if torch.compiler.is_compiling() else ChunkAttention.apply
    return run(q, k, v, g, scale, initial_state, cu_seqlens)
