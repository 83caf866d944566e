"""Gated linear attention: a decay a head, token and key channel."""

from __future__ import annotations

from torch import Tensor

from hf_linear.ops import chunked, reference
from hf_linear.ops.dispatch import Backend, check_log_decay, check_shape
from hf_linear.ops.linear_attention import attend, prepare

IMPLEMENTATIONS = {"reference": reference.gated_linear_attention, "chunked": chunked.gated_linear_attention}


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T,   o_t = scale * S_t^T q_t.

    Args:
        q: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, H, V].
        g: [B, T, H, K], natural log-decay, <= 0.
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

    Source: Yang et al. 2023, arXiv 2312.06635, eq. 3.
    """
    scale = prepare(q, k, v, g, scale, initial_state, cu_seqlens)
    check_shape("g", g, "[B, T, H, K] as k", tuple(k.shape), "expand it, or take linear_attention for one decay a head")
    check_log_decay(g)
    return attend(IMPLEMENTATIONS, backend, q, k, v, g, scale, initial_state, cu_seqlens)
