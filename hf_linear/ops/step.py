"""One token of either recurrence, written into the state that the caller holds."""

from __future__ import annotations

from torch import Tensor

from hf_linear.ops import gpu
from hf_linear.ops.dispatch import Backend, check_shape, needs_gradient, run
from hf_linear.ops.linear_attention import prepare


def recurrent_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    *,
    scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """S <- diag(exp(g)) S + k v^T,   o = scale * S^T q: the ops on one token, in place and without a gradient.

    Args:
        q: [B, 1, H, K].
        k: [B, 1, H, K].
        v: [B, 1, H, V].
        g: natural log-decay, <= 0: None, [H] or [B, 1, H] as `linear_attention` takes it, [B, 1, H, K] as
            `gated_linear_attention` does.
        state: [B, H, K, V] float32 (float64 for float64 inputs), which is written.
        scale: K ** -0.5 when None.
        backend: "reference" in PyTorch, "triton" in one launch on a GPU, "auto" for what the ops choose.

    Returns:
        o [B, 1, H, V] in v's dtype, and `state` itself.

    Raises:
        ValueError: a shape, dtype, device or backend is not as above, or a gradient is wanted.
    """
    scale = prepare(q, k, v, g, scale, state, None)
    B, T, H, K = q.shape
    if T != 1:
        raise ValueError(f"recurrent_step must get one token, got T = {T}: for more take linear_attention or its gated form")
    if g is not None:
        wanted = {1: (H,), 3: (B, 1, H)}.get(g.dim(), (B, 1, H, K))
        check_shape("g", g, "[H], [B, 1, H] or [B, 1, H, K]", wanted, "give one decay a head or a key channel, or None")
        g = g.expand(B, 1, H) if g.dim() == 1 else g
    if needs_gradient(q, k, v, g, state):
        raise ValueError(
            "recurrent_step must run without a gradient, got an input that requires one: "
            "call it under torch.no_grad(), or linear_attention or gated_linear_attention"
        )
    if gpu.chosen(backend, q, v):
        return gpu.step(q, k, v, g, scale, state), state
    q_, k_, v_ = (x.to(state.dtype).transpose(1, 2) for x in (q, k, v))  # [B, H, 1, K or V]
    o, state = run({"reference": in_place}, backend, 1, q_, k_, v_, g, scale, state)
    return o.transpose(1, 2).to(v.dtype), state


def in_place(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, state: Tensor) -> tuple[Tensor, Tensor]:
    if g is not None:
        state.mul_(g.to(state.dtype).exp().reshape(*state.shape[:2], -1, 1))
    state.addcmul_(k.mT, v)
    return scale * (q @ state), state
