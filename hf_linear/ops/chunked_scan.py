"""The selective scan chunk by chunk: what `chunked` is to the recurrences with a matrix for a state."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hf_linear.ops import reference


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,   y_t = h_t C_t.

    A decay a channel and state number leaves no matrix product to gain from, and a scan in parallel would double the
    arithmetic. So the tokens of a chunk are decayed, written and read together, and their states follow one another by a
    single operation a token, on memory that stays in a cache from chunk to chunk.
    """
    y, state, _ = scan_chunks(x, dt, A, B, C, state, cu_seqlens)
    return y, state


class States:
    """The states of a chunk of tokens, h [tokens, B, N, D]: channels last, as x and dt, for long runs in memory."""

    NUMBERS = 1 << 18  # of a buffer, 1 MB in float32

    def __init__(self, x: Tensor, A: Tensor, state: Tensor, cu_seqlens: Tensor | None):
        bounds = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
        size = self.tokens(x, A)
        # The document and the tokens of every chunk.
        self.chunks = [
            (n, slice(i, min(i + size, end)))
            for n, (start, end) in enumerate(pairwise(bounds))
            for i in range(start, end, size)
        ]
        # The rows of the state that a chunk carries on: all of a batch, or those of its document.
        self.rows = [slice(None) if cu_seqlens is None else slice(n, n + 1) for n in range(len(bounds) - 1)]
        self.A = A.T.contiguous()
        self.decays, self.h, self.work = A.new_empty(3, size, x.shape[0], *self.A.shape)

    @staticmethod
    def tokens(x: Tensor, A: Tensor) -> int:
        """Of a chunk: few enough for a cache, enough for the states that enter the chunks to be no larger than x."""
        return min(max(States.NUMBERS // (x.shape[0] * A.numel()), 16), 64, x.shape[1])

    def fill(self, dt: Tensor, u: Tensor, B: Tensor, entering: Tensor) -> tuple[Tensor, Tensor]:
        """exp(dt_t A) and h_t of every token of a chunk."""
        decays, h = self.decays[: len(dt)], self.h[: len(dt)]
        torch.mul(dt[:, :, None], self.A, out=decays).exp_()
        torch.mul(u[:, :, None], B[..., None], out=h)
        for h_t, decay in zip(h.unbind(), decays.unbind(), strict=True):
            entering = h_t.addcmul_(decay, entering)
        return decays, h


@torch.library.custom_op("hf_linear::selective_scan", mutates_args=())
def scan_chunks(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the state that enters every chunk: all that the backward pass keeps beside its inputs.

    One node of a compiled graph, which would otherwise grow with the tokens.
    """
    chunks = States(x, A, state, cu_seqlens)
    y, last, entering = torch.empty_like(x), state.transpose(1, 2).clone(memory_format=torch.contiguous_format), []
    x, dt, B, C = (z.transpose(0, 1) for z in (x, dt, B, C))
    for n, tokens in chunks.chunks:
        h_0 = last[chunks.rows[n]]
        entering.append(h_0.clone())
        _, h = chunks.fill(dt[tokens], dt[tokens] * x[tokens], B[tokens], h_0)
        y.transpose(0, 1)[tokens] = (C[tokens][:, :, None] @ h).squeeze(-2)
        h_0.copy_(h[-1])
    return y, last.transpose(1, 2).contiguous(), torch.stack(entering)


@torch.library.custom_op("hf_linear::selective_scan_backward", mutates_args=())
def scan_chunks_backward(
    dy: Tensor,
    d_last: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    entering: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The recurrence backwards, dh_t = dy_t C_t^T + exp(dt_{t+1} A) dh_{t+1}, on the states of one chunk after the other.

    With u_t = dt_t x_t, du_t = dh_t B_t and e_t = dh_t exp(dt_t A) h_{t-1}:
    dA = sum_t dt_t e_t,   d(dt_t) = sum_n A e_t + x_t du_t,   dx_t = dt_t du_t.
    """
    chunks = States(x, A, state, cu_seqlens)
    dx, ddt, dB, dC = (torch.empty_like(z, memory_format=torch.contiguous_format).transpose(0, 1) for z in (x, dt, B, C))
    dA, d_state = torch.zeros_like(chunks.A), d_last.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    x, dt, B, C, dy = (z.transpose(0, 1) for z in (x, dt, B, C, dy))
    for (n, tokens), h_0 in zip(reversed(chunks.chunks), entering.flip(0), strict=True):
        x_, dt_, B_, dy_ = x[tokens], dt[tokens], B[tokens], dy[tokens]
        u, carried = dt_ * x_, d_state[chunks.rows[n]]
        decays, h = chunks.fill(dt_, u, B_, h_0)
        dC[tokens] = (h @ dy_[..., None]).squeeze(-1)
        dh = torch.mul(dy_[:, :, None], C[tokens][..., None], out=chunks.work[: len(h)])
        dh[-1] += carried
        backwards = zip(reversed(dh.unbind()), reversed(decays.unbind()), strict=True)
        for (later, decay), (dh_t, _) in pairwise(backwards):
            dh_t.addcmul_(decay, later)
        torch.mul(decays[0], dh[0], out=carried)
        dB[tokens] = (dh @ u[..., None]).squeeze(-1)
        du = (B_[:, :, None] @ dh).squeeze(-2)
        e = decays.mul_(dh)
        e[1:] *= h[:-1]
        e[0] *= h_0
        dA += torch.mul(e, dt_[:, :, None], out=h).sum((0, 1))
        dx[tokens], ddt[tokens] = dt_ * du, torch.mul(e, chunks.A, out=h).sum(-2).addcmul_(x_, du)
    dx, ddt, dB, dC = (z.transpose(0, 1) for z in (dx, ddt, dB, dC))
    return dx, ddt, dA.T.contiguous(), dB, dC, d_state.transpose(1, 2).contiguous()


@scan_chunks.register_fake
def _(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if cu_seqlens is None:
        chunks: int | torch.SymInt = -(-x.shape[1] // States.tokens(x, A))
    else:
        chunks = torch.library.get_ctx().new_dynamic_size()
    return torch.empty_like(x), torch.empty_like(state), x.new_empty(chunks, x.shape[0], A.shape[1], A.shape[0])


@scan_chunks_backward.register_fake
def _(
    dy: Tensor,
    d_last: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    entering: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, dt, A, B, C, state = (torch.empty_like(z, memory_format=torch.contiguous_format) for z in (x, dt, A, B, C, state))
    return x, dt, A, B, C, state


def keep_for_gradients(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[2])


def scan_gradients(ctx: Any, dy: Tensor, d_last: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, dt, A, B, C, state, cu_seqlens, entering = ctx.saved_tensors
    if not torch.is_grad_enabled():
        return (*scan_chunks_backward(dy, d_last, x, dt, A, B, C, state, entering, cu_seqlens), None)
    # For second derivatives, through the recurrence.
    wanted = [z for z, needed in zip((x, dt, A, B, C, state), ctx.needs_input_grad, strict=False) if needed]
    outputs = reference.selective_scan(x, dt, A, B, C, state, cu_seqlens)
    found = iter(torch.autograd.grad(outputs, wanted, (dy, d_last), create_graph=True))
    return (*(next(found) if needed else None for needed in ctx.needs_input_grad[:6]), None)


scan_chunks.register_autograd(scan_gradients, setup_context=keep_for_gradients)
