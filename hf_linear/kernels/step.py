"""One token of either recurrence, the state read and written in place: what decoding does at every layer.

    S <- diag(exp(g)) S + k v^T,        o = scale S^T q

grid     B H V / BV programs, each with a [K, BV] tile of one head's state. It holds all of K, so that o needs no sum across
         programs: one launch. At B = 1, H = 4 that is 64 programs for V = 256 and 128 for V = 512, on the 132 multiprocessors
         of an H100; each asks for its whole tile (8 KB at K = 128) at once, so all of the state is under way together.
dtypes   q, k, v and g as they come, one compiled kernel a combination; the state and all arithmetic float32; o as v.
traffic  the state once in and once out, 8 K V bytes a head. q, k and g, which every tile of a head reads anew, come on top:
         8 K bytes a tile in bfloat16 with a float32 g a channel, 1 / BV of the state's, and from the L2 but for the first.
         A row of a tile is 64 bytes: what DRAM hands over at a time.
oracle   hf_linear.ops.reference.gated_linear_attention and linear_attention, at T = 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BV = 16


@triton.jit(do_not_specialize=["H", "row_stride", "head_stride"])
def step_kernel(
    q, k, v, g, state, o, scale, H, row_stride, head_stride,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """G, the dimensions of g, tells the decays apart: 0 none, 3 one a head, 4 one a key channel.

    The strides are those of a g a head, which may be one row for all the batch.
    """
    tiles: tl.constexpr = tl.cdiv(V, BV)
    head = (tl.program_id(0) // tiles).to(tl.int64)  # counted over the batch
    c, n = tl.arange(0, KP), tl.program_id(0) % tiles * BV + tl.arange(0, BV)
    tile = state + head * (K * V) + c[:, None] * V + n[None, :]
    inside = (c < K)[:, None] & (n < V)[None, :]
    s = tl.load(tile, inside, 0.0)
    q_ = tl.load(q + head * K + c, c < K, 0.0).to(tl.float32)
    k_ = tl.load(k + head * K + c, c < K, 0.0).to(tl.float32)
    v_ = tl.load(v + head * V + n, n < V, 0.0).to(tl.float32)
    # The hardware's exp errs in proportion to |g|, but what it multiplies shrinks by exp(g): |g| exp(g) stays below 1/e.
    if G == 3:
        s *= tl.exp(tl.load(g + head // H * row_stride + head % H * head_stride).to(tl.float32))
    if G == 4:
        s *= tl.exp(tl.load(g + head * K + c, c < K, 0.0).to(tl.float32))[:, None]
    s += k_[:, None] * v_[None, :]
    tl.store(tile, s, inside)
    tl.store(o + head * V + n, (scale * tl.sum(q_[:, None] * s, 0)).to(o.dtype.element_ty), n < V)


# Defined by its schema, as the chunk kernels are (`autograd`). It has no gradient: callers see to it that none is wanted.
STEP = "hf_linear::step"
torch.library.define(STEP, "(Tensor q, Tensor k, Tensor v, Tensor? g, float scale, Tensor(a!) state) -> Tensor")
step = torch.ops.hf_linear.step


@torch.library.impl(STEP, ("cpu", "cuda"))
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, state: Tensor) -> Tensor:
    """o [B, 1, H, V] in v's dtype; state [B, H, K, V] float32 is written. g: None, [B, 1, H] or [B, 1, H, K]."""
    B, _, H, K = q.shape
    V, G = v.shape[-1], 0 if g is None else g.dim()
    q, k, v, held = q.contiguous(), k.contiguous(), v.contiguous(), state.contiguous()
    strides = (g.stride(0), g.stride(2)) if G == 3 else (0, 0)
    o = v.new_empty(v.shape)
    step_kernel[(B * H * triton.cdiv(V, BV),)](
        q, k, v, q if g is None else g.contiguous() if G == 4 else g, held, o, scale, H, *strides,
        K=K, KP=triton.next_power_of_2(K), V=V, BV=BV, G=G,
    )  # fmt: skip
    if held is not state:
        state.copy_(held)
    torch.autograd.graph.increment_version(state)  # so that a graph that kept the state as it was says so
    return o


@torch.library.register_fake(STEP)
def _(q, k, v, g, scale, state):
    return v.new_empty(v.shape)
