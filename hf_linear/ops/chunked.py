"""The recurrences in chunk-parallel PyTorch: the path for CPUs, `torch.compile` and second derivatives.

A sequence is cut into N chunks of C tokens. Inside a chunk every token reaches every earlier one through a [C, C] matrix of
scores; between chunks only the state travels. Both stages are matrix products, and the cost is linear in T:

    scores    A_ij  = q_i . (k_j * exp(sum of g over (j, i]))             within a chunk, i >= j
    state     S_n+1 = exp(sum of g over the chunk) S_n + sum_j (k_j * exp(sum of g over (j, end])) v_j^T
    output    o_i   = sum_j A_ij v_j + S_n^T (q_i * exp(sum of g over [start, i]))

Every exponent is a sum of log-decays over the tokens between i and j, never a difference of two running sums: nothing
overflows, and a strong decay early in a chunk costs later tokens no precision.
Source: GLA, arXiv 2312.06635, section 4; chunks with scalar decay: Mamba-2, arXiv 2405.21060, section 6.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_linear.ops.dispatch import check_filter

CHUNK = 64


class Chunks:
    """Where T tokens lie in chunks of C; in a packed row each document starts a chunk of its own.

    A packed row of T tokens and N documents gets T // C + N chunks, enough for any lengths, so that no shape depends on the
    values of `cu_seqlens`: no synchronisation with the device, no graph break. Empty slots hold zeros, which neither decay
    the state nor write to it.
    """

    def __init__(self, length: int, cu_seqlens: Tensor | None):
        self.length, self.packed = length, cu_seqlens is not None
        self.size = min(CHUNK, 1 << (length - 1).bit_length())
        if cu_seqlens is None:
            return
        cu_seqlens = cu_seqlens.long()
        counts = (cu_seqlens.diff() + self.size - 1) // self.size  # chunks of each document
        self.number = length // self.size + len(counts)
        ends = counts.cumsum(0)
        begins = ends - counts
        token = torch.arange(length, device=cu_seqlens.device)
        document = torch.searchsorted(cu_seqlens[1:], token, right=True)
        self.slot = begins[document] * self.size + token - cu_seqlens[document]
        chunk = torch.arange(self.number, device=cu_seqlens.device)
        self.document = torch.searchsorted(ends, chunk, right=True).clamp(max=len(counts) - 1)
        self.starts = (chunk == begins[self.document]) & (counts[self.document] > 0)
        self.last, self.empty = (ends - 1).clamp(min=0), counts == 0

    def split(self, x: Tensor) -> Tensor:
        """[B, T, H, D] to [B, H, N, C, D]."""
        if self.packed:
            x = x.new_zeros(1, self.number * self.size, *x.shape[2:]).index_copy(1, self.slot, x)
        else:
            x = F.pad(x, (0, 0, 0, 0, 0, -self.length % self.size))
        return x.unflatten(1, (-1, self.size)).permute(0, 3, 1, 2, 4).contiguous()

    def join(self, x: Tensor) -> Tensor:
        """[B, H, N, C, D] back to [B, T, H, D]."""
        x = x.permute(0, 2, 3, 1, 4).flatten(1, 2)
        return x[:, self.slot] if self.packed else x[:, : self.length]

    def scan(self, decay: Tensor, update: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The state that enters every chunk, [B, H, N, K, V], and the final state, from S_n+1 = decay_n S_n + update_n."""
        entering, leaving = [], []
        current = state[:1] if self.packed else state
        fresh = state[self.document].split(1) if self.packed else ()
        for n, (decay_n, update_n) in enumerate(zip(decay.unbind(2), update.unbind(2), strict=True)):
            if self.packed:
                current = torch.where(self.starts[n], fresh[n], current)
            entering.append(current)
            current = decay_n * current + update_n
            leaving.append(current)
        if self.packed:
            current = torch.where(self.empty[:, None, None, None], state, torch.cat(leaving)[self.last])
        return torch.stack(entering, 2), current


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T,   o_t = scale * S_t^T q_t, with one decay g [B, T, H] a head."""
    chunks = Chunks(q.shape[1], cu_seqlens)
    q, k, v, g = (chunks.split(x) for x in (q * scale, k, v, g[..., None]))
    causal = torch.ones(chunks.size, chunks.size, dtype=torch.bool, device=q.device).tril()
    # between[i, j] = sum of g over (j, i]: the running sum down column j of g_i, begun below the diagonal
    between = torch.where(causal.tril(-1), g, 0.0).cumsum(-2)
    scores = (q @ k.transpose(-1, -2)) * torch.where(causal, between, -torch.inf).exp()
    from_start, to_end = g.cumsum(-2), between[..., -1, :, None]
    return finish(chunks, scores, q * from_start.exp(), k * to_end.exp(), v, from_start[..., -1:, :].exp(), state)


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T,   o_t = scale * S_t^T q_t, with a decay g [B, T, H, K] a key channel."""
    chunks = Chunks(q.shape[1], cu_seqlens)
    q, k, v, g = (chunks.split(x) for x in (q * scale, k, v, g))
    scores, q_in, k_out, decay = DecayedScores.apply(q, k, g)
    return finish(chunks, scores, q_in, k_out, v, decay, state)


def finish(
    chunks: Chunks, scores: Tensor, q_in: Tensor, k_out: Tensor, v: Tensor, decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs and final state from the scores within chunks, queries decayed from, and keys decayed to, their ends."""
    entering, state = chunks.scan(decay.transpose(-1, -2), k_out.transpose(-1, -2) @ v, state)
    return chunks.join(scores @ v + q_in @ entering), state


class DecayedScores(torch.autograd.Function):
    """A_ij = sum_c q_ic k_jc exp(sum of g_c over (j, i]) for i >= j within a chunk, by halving.

    Tokens of the second half of a block reach those of the first through the boundary between them: decay the query back to
    the boundary, the key forward to it, and multiply. Blocks of 2, 4, ..., C tokens cover every pair i > j once, each
    exponent is a sum of decays, and the cost is log2(C) small products in place of a [C, C, K] tensor.

    Returns A [..., C, C], q decayed from the chunk's start, k decayed to its end, and the decay of the whole chunk
    [..., 1, K]. Its own backward, because autograd through the halving takes three times as long.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        C = q.shape[-2]
        scores = torch.diag_embed((q * k).sum(-1))
        for m, q_decay, k_decay in halvings(g):
            if m < C:
                later, earlier = second(q, m) * second(q_decay, m), first(k, m) * first(k_decay, m)
                lower_left(scores, m).copy_(inner(later, earlier))
        ctx.save_for_backward(q, k, g)
        return scores, q * q_decay, k * k_decay, q_decay[..., -1:, :].clone()

    @staticmethod
    def backward(ctx: Any, d_scores: Tensor, d_q_in: Tensor, d_k_out: Tensor, d_decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, g = ctx.saved_tensors
        C = q.shape[-2]
        diagonal = d_scores.diagonal(dim1=-2, dim2=-1)[..., None]
        dq, dk = diagonal * k, diagonal * q
        for m, q_decay, k_decay in halvings(g):
            if m < C:
                later, earlier = second(q, m) * second(q_decay, m), first(k, m) * first(k_decay, m)
                d_block = lower_left(d_scores, m)
                second(dq, m).addcmul_(combine(d_block, earlier), second(q_decay, m))
                first(dk, m).addcmul_(combine(d_block.transpose(-1, -2), later), first(k_decay, m))
        dq, from_k_out = dq + d_q_in * q_decay, d_k_out * k_decay
        dk = dk + from_k_out
        # With G the running sum of g, the scores and q_in depend on G_i - G_j, k_out and the decay on G_C - G_j and G_C.
        d_end = (from_k_out * k).sum(-2, keepdim=True) + d_decay * q_decay[..., -1:, :]
        dg = (q * dq - k * dk).flip(-2).cumsum(-2).flip(-2) + d_end
        return dq, dk, dg


def halvings(g: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For m = 1, 2, ..., C: exp of the sums of g from the start of the block of m through i, and from behind j to its end."""
    q_decay, k_decay, totals = g.exp(), torch.ones_like(g), g
    m, C = 1, g.shape[-2]
    yield m, q_decay, k_decay
    while m < C:
        left, right = totals.unflatten(-2, (-1, 2)).exp().unbind(-2)
        one = torch.ones_like(left)
        q_decay = scale_halves(q_decay, m, one, left)
        k_decay = scale_halves(k_decay, m, right, one)
        totals = totals.unflatten(-2, (-1, 2)).sum(-2)
        m *= 2
        yield m, q_decay, k_decay


def scale_halves(x: Tensor, m: int, by_first: Tensor, by_second: Tensor) -> Tensor:
    """Scale the two halves of every block of 2m rows of x [..., C, D], each by its own row [..., C / 2m, D]."""
    halves = x.unflatten(-2, (-1, 2, m))
    return (halves * torch.stack([by_first, by_second], -2)[..., None, :]).flatten(-4, -2)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """a_i . b_j, [..., m, K] and [..., m, K] to [..., m, m]."""
    return a @ b.transpose(-1, -2) if a.shape[-2] > 1 else (a * b).sum(-1, keepdim=True)


def combine(weights: Tensor, x: Tensor) -> Tensor:
    """sum_j weights_ij x_j; the overhead of a matrix product exceeds the work in blocks of one and two."""
    return weights @ x if x.shape[-2] > 2 else (weights[..., None] * x[..., None, :, :]).sum(-2)


def first(x: Tensor, m: int) -> Tensor:
    """The first half of every block of 2m rows, [..., C, D] to [..., C / 2m, m, D], as a view."""
    return x.unflatten(-2, (-1, 2, m)).select(-3, 0)


def second(x: Tensor, m: int) -> Tensor:
    return x.unflatten(-2, (-1, 2, m)).select(-3, 1)


def lower_left(scores: Tensor, m: int) -> Tensor:
    """The blocks of A [..., C, C] where second halves meet first halves, [..., C / 2m, m, m], as a view."""
    blocks = scores.unflatten(-1, (-1, 2, m)).unflatten(-4, (-1, 2, m))  # [..., row block, half, m, column block, half, m]
    return blocks[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def short_conv(x: Tensor, w: Tensor, b: Tensor | None, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """y_t = b + sum_j w[:, W-1-j] x_{t-j}, one multiplication of the whole sequence a tap."""
    T, W = x.shape[1], w.shape[1]
    if cu_seqlens is None:
        padded = torch.cat([state, x], 1)
        taps = [padded[:, j : j + T] * w[:, j] for j in range(W)]
        state = padded[:, T:].clone()  # a view would hold the whole sequence
    else:
        # Documents are laid out one after the other, each behind its own W - 1 inputs of state.
        cu_seqlens = cu_seqlens.long()
        token = torch.arange(T, device=x.device)
        document = torch.searchsorted(cu_seqlens[1:], token, right=True)
        slot = token + (document + 1) * (W - 1)
        before = cu_seqlens[:-1, None] + torch.arange(len(state) * (W - 1), device=x.device).view(len(state), W - 1)
        padded = x.new_zeros(T + before.numel(), x.shape[2])
        padded = padded.index_copy(0, slot, x[0]).index_copy(0, before.flatten(), state.flatten(0, 1))
        taps = [padded[None, slot - j] * w[:, W - 1 - j] for j in range(W)]
        state = padded[before + cu_seqlens.diff()[:, None]]
    y = sum(taps[1:], taps[0])
    return y if b is None else y + b, state


def long_conv(p: Tensor, h: Tensor, history: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """y_t = sum_{s <= t} h[:, t - s] p_s by FFT, O(T log T), zero-padded to twice the length so that nothing wraps around."""
    if cu_seqlens is None:
        state = torch.cat([history, p], -1)
        return fft_conv(state, h)[..., history.shape[-1] :], state
    convolve = packed_long_conv if torch.compiler.is_compiling() else fft_conv_by_document
    return convolve(p, h, cu_seqlens), p.clone()


def fft_conv(p: Tensor, h: Tensor) -> Tensor:
    T = p.shape[-1]
    h = h[:, :T]
    return torch.fft.irfft(torch.fft.rfft(p, 2 * T) * torch.fft.rfft(h, 2 * T), 2 * T)[..., :T]


def fft_conv_by_document(p: Tensor, h: Tensor, cu_seqlens: Tensor) -> Tensor:
    bounds = cu_seqlens.tolist()
    check_filter(h, max(j - i for i, j in pairwise(bounds)))
    return torch.cat([fft_conv(p[..., i:j], h) for i, j in pairwise(bounds) if i < j], -1)


@torch.library.custom_op("hf_linear::packed_long_conv", mutates_args=())
def packed_long_conv(p: Tensor, h: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`fft_conv_by_document` as one node of a compiled graph, which cannot hold shapes that depend on `cu_seqlens`."""
    return fft_conv_by_document(p, h, cu_seqlens)


@torch.library.custom_op("hf_linear::packed_long_conv_backward", mutates_args=())
def packed_long_conv_backward(dy: Tensor, p: Tensor, h: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Both gradients are convolutions again, backwards in time: rev(dp) = h * rev(dy), rev(dh) = p * rev(dy)."""
    dp, dh = torch.empty_like(p), torch.zeros_like(h)
    for i, j in pairwise(cu_seqlens.tolist()):
        if i < j:
            reverse = dy[..., i:j].flip(-1)
            dp[..., i:j] = fft_conv(reverse, h).flip(-1)
            dh[:, : j - i] += fft_conv(reverse[0], p[0, :, i:j]).flip(-1)
    return dp, dh


@packed_long_conv.register_fake
def _(p: Tensor, h: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.empty_like(p)


@packed_long_conv_backward.register_fake
def _(dy: Tensor, p: Tensor, h: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(p), torch.empty_like(h)


packed_long_conv.register_autograd(
    lambda ctx, dy: (*packed_long_conv_backward(dy, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
