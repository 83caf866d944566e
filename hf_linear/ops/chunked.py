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

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_linear.ops.dispatch import check_filter, readable

CHUNK = 64
PIECE = 2048  # tokens


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
        """[B, T, H, D] to [N, B, H, C, D]: the chunks first, so that the scan finds the states of one in one piece."""
        if self.packed:
            x = x.new_zeros(1, self.number * self.size, *x.shape[2:]).index_copy(1, self.slot, x)
        elif padding := -self.length % self.size:
            x = F.pad(x, (0, 0, 0, 0, 0, padding))
        return x.unflatten(1, (-1, self.size)).permute(1, 0, 3, 2, 4).contiguous()

    def join(self, x: Tensor) -> Tensor:
        """[N, B, H, C, D] back to [B, T, H, D]."""
        x = x.permute(1, 0, 3, 2, 4).flatten(1, 2)
        return x[:, self.slot] if self.packed else x[:, : self.length]

    def scan(self, decay: Tensor, update: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The state that enters every chunk, [N, B, H, K, V], and the final state, from S_n+1 = decay_n S_n + update_n."""
        if not self.packed:
            return Scan.apply(decay, update, state, None, False)
        # Where the next chunk starts a document, that document's own state takes the place of what this chunk leaves.
        fresh, starts = state[self.document, None], self.starts[:, None, None, None, None]
        reset = torch.cat([torch.where(starts[1:], fresh[1:], update[:-1]), update[-1:]])
        entering, _ = Scan.apply(decay, reset, fresh[0], F.pad(self.starts[1:], (0, 1)), False)
        leaving = update[self.last] + decay[self.last] * entering[self.last]
        return entering, torch.where(self.empty[:, None, None, None], state, leaving[:, 0])


class Scan(torch.autograd.Function):
    """S_n+1 = decay_n S_n + update_n: every S_n that enters a chunk [N, ...], and the last; where cut_n, S_n+1 = update_n.

    Reversed in time, S_n = decay_n S_n+1 + update_n: every S_n+1, and the first. Each is the gradient of the other.
    """

    @staticmethod
    def forward(
        ctx: Any, decay: Tensor, update: Tensor, state: Tensor, cut: Tensor | None, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        N = len(decay)
        states = torch.cat([update, state[None]] if reverse else [state[None], update])
        for n in reversed(range(N)) if reverse else range(N):
            known, wanted = (states[n + 1], states[n]) if reverse else (states[n], states[n + 1])
            if cut is None:
                wanted.addcmul_(decay[n], known)
            else:  # nothing passes from one document to the next, not even NaN
                wanted.add_((decay[n] * known).masked_fill(cut[n], 0.0))
        entering, last = (states[1:], states[0]) if reverse else (states[:-1], states[-1])
        ctx.reverse = reverse
        ctx.save_for_backward(decay, entering, cut)
        return entering, last.clone()

    @staticmethod
    def backward(ctx: Any, d_entering: Tensor, d_last: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        decay, entering, cut = ctx.saved_tensors
        d_update, d_state = Scan.apply(decay, d_entering, d_last, cut, not ctx.reverse)
        d_decay = (d_update * entering).sum_to_size(decay.shape)
        if cut is not None:
            d_decay = d_decay.masked_fill(cut[:, None, None, None, None], 0.0)
        return d_decay, d_update, d_state, None, None


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T,   o_t = scale * S_t^T q_t, with one decay g [B, T, H] a head."""
    chunks = Chunks(q.shape[1], cu_seqlens)
    q, k, v, g = (chunks.split(x) for x in (q * scale, k, v, g[..., None]))
    # between[i, j] = sum of g over (j, i]: the running sum down column j of g_i, begun below the diagonal
    between = g.expand(*g.shape[:-1], chunks.size).tril(-1).cumsum(-2)
    scores = (q @ k.transpose(-1, -2) * between.exp()).tril()
    from_start, to_end = g.cumsum(-2), between[..., -1, :, None]
    return finish(chunks, scores, q * from_start.exp(), k * to_end.exp(), v, from_start[..., -1:, :].exp(), state)


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T,   o_t = scale * S_t^T q_t, with a decay g [B, T, H, K] a key channel."""
    if q.shape[1] > PIECE and readable(q):
        return in_pieces(gated_linear_attention, q, k, v, g, scale, state, cu_seqlens)
    chunks = Chunks(q.shape[1], cu_seqlens)
    q, k, v, g = (chunks.split(x) for x in (q * scale, k, v, g))
    scores, q_in, k_out, decay = DecayedScores.apply(q, k, g)
    return finish(chunks, scores, q_in, k_out, v, decay, state)


def in_pieces(
    op: Callable, q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A long sequence piece by piece, the state carried on: the memory that one piece works in serves the next."""
    outputs, states = [], list(state.split(1)) if cu_seqlens is not None else [state]
    for i, piece in enumerate(zip(*(x.split(PIECE, dim=1) for x in (q, k, v, g)), strict=True)):
        here, bounds = slice(None), None
        if cu_seqlens is not None:
            bounds = (cu_seqlens - i * PIECE).clamp(0, piece[0].shape[1])  # a document elsewhere has no token here
            begins, ends = bounds.diff().nonzero()[[0, -1], 0].tolist()
            here, bounds = slice(begins, ends + 1), bounds[begins : ends + 2]
        o, state = op(*piece, scale, torch.cat(states[here]), bounds)
        states[here] = state.split(1) if cu_seqlens is not None else [state]
        outputs.append(o)
    return torch.cat(outputs, 1), torch.cat(states)


def finish(
    chunks: Chunks, scores: Tensor, q_in: Tensor, k_out: Tensor, v: Tensor, decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs and final state from the scores within chunks, queries decayed from, and keys decayed to, their ends."""
    entering, state = chunks.scan(decay.transpose(-1, -2), k_out.transpose(-1, -2) @ v, state)
    return chunks.join(Outputs.apply(scores, v, q_in, entering)), state


class Outputs(torch.autograd.Function):
    """O = A V + Q S. Its own backward, to lay out the gradient once, in place of once in each of the four products."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, v: Tensor, q_in: Tensor, entering: Tensor) -> Tensor:
        ctx.save_for_backward(scores, v, q_in, entering)
        o = scores @ v
        o.flatten(0, -3).baddbmm_(q_in.flatten(0, -3), entering.flatten(0, -3))
        return o

    @staticmethod
    def backward(ctx: Any, d_o: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scores, v, q_in, entering = ctx.saved_tensors
        d_o = d_o.contiguous()
        return (
            d_o @ v.transpose(-1, -2),
            scores.transpose(-1, -2) @ d_o,
            d_o @ entering.transpose(-1, -2),
            q_in.transpose(-1, -2) @ d_o,
        )


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
        scores = torch.diag_embed((q * k).sum(-1))
        decay = g.exp()
        q_in, k_out = q * decay, k.clone()
        for m, left, right in halvings(decay):
            lower_left(scores, m).copy_(inner(second(q_in, m), first(k_out, m)))
            second(q_in, m).mul_(left)
            first(k_out, m).mul_(right)
            decay = left * right
        ctx.save_for_backward(q, k, g)
        return scores, q_in, k_out, decay.reshape_as(g[..., :1, :])

    @staticmethod
    def backward(ctx: Any, d_scores: Tensor, d_q_in: Tensor, d_k_out: Tensor, d_decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, g = ctx.saved_tensors
        C = g.shape[-2]
        diagonal = d_scores.diagonal(dim1=-2, dim2=-1)[..., None]
        dq, dk = diagonal * k, diagonal * q
        decay = g.exp()
        q_decay, k_decay = decay.clone(), torch.ones_like(g)
        # Fresh memory costs a CPU more than the arithmetic on it: a second derivative aside, two buffers serve all levels.
        buffers = None if torch.is_grad_enabled() else g.new_empty(2, g.numel() // 2)
        for m, left, right in halvings(decay):
            decayed, near = (None, None) if buffers is None else buffers.unflatten(1, first(q, m).shape)
            q_second, k_first = second(q_decay, m), first(k_decay, m)
            d_block = lower_left(d_scores, m)
            earlier = torch.mul(first(k, m), k_first, out=decayed)
            second(dq, m).addcmul_(combine(d_block, earlier, near), q_second)
            later = torch.mul(second(q, m), q_second, out=decayed)
            first(dk, m).addcmul_(combine(d_block.transpose(-1, -2), later, near), k_first)
            q_decay, k_decay = decay_half(q_decay, second, m, left), decay_half(k_decay, first, m, right)
        from_k_out = d_k_out * k_decay
        dq, dk = dq.addcmul_(d_q_in, q_decay), dk.add_(from_k_out)
        # With G the running sum of g, the scores and q_in depend on G_i - G_j, k_out and the decay on G_C - G_j and G_C.
        d_end = (from_k_out * k).sum(-2, keepdim=True) + d_decay * q_decay[..., -1:, :]
        sum_from = torch.ones(C, C, dtype=g.dtype, device=g.device).triu()
        dg = sum_from @ (q * dq).addcmul_(k, dk, value=-1.0) + d_end
        return dq, dk, dg


def halvings(decay: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For m = 1, 2, ..., C / 2: the decays [..., C / 2m, 1, K] of the left and the right half of every block of 2m tokens."""
    m, C = 1, decay.shape[-2]
    while m < C:
        left, right = decay.unflatten(-2, (-1, 2)).split(1, -2)
        yield m, left, right
        decay = (left * right).squeeze(-2)
        m *= 2


def inner(a: Tensor, b: Tensor) -> Tensor:
    """a_i . b_j, [..., m, K] and [..., m, K] to [..., m, m]."""
    return a @ b.transpose(-1, -2) if a.shape[-2] > 1 else (a * b).sum(-1, keepdim=True)


def combine(weights: Tensor, x: Tensor, out: Tensor | None) -> Tensor:
    """sum_j weights_ij x_j; the overhead of a matrix product exceeds the work in blocks of one and two."""
    if x.shape[-2] > 2:
        flat = None if out is None else out.flatten(0, -3)
        return torch.bmm(weights.flatten(0, -3), x.flatten(0, -3), out=flat).view_as(x)
    total = torch.mul(weights[..., :1], x[..., :1, :], out=out)
    return total if x.shape[-2] == 1 else total.addcmul_(weights[..., 1:], x[..., 1:, :])


def decay_half(decay: Tensor, half: Callable[[Tensor, int], Tensor], m: int, more: Tensor) -> Tensor:
    """The decays with those of one half of every block multiplied by `more`; in place, unless autograd needs the old ones."""
    if torch.is_grad_enabled():
        decay = decay.clone()
    half(decay, m).mul_(more)
    return decay


def first(x: Tensor, m: int) -> Tensor:
    """The first half of every block of 2m rows, [..., C, D] to [..., C / 2m, m, D], as a view."""
    return x.unflatten(-2, (-1, 2, m)).select(-3, 0)


def second(x: Tensor, m: int) -> Tensor:
    return x.unflatten(-2, (-1, 2, m)).select(-3, 1)


def lower_left(scores: Tensor, m: int) -> Tensor:
    """The blocks of A [..., C, C] where second halves meet first halves, [..., C / 2m, m, m], as a view."""
    blocks = scores.unflatten(-1, (-1, 2, m)).unflatten(-4, (-1, 2, m))  # [..., row block, half, m, column block, half, m]
    return blocks[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def short_conv(
    x: Tensor, w: Tensor, b: Tensor | None, state: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """y_t = b + sum_k w[:, W-1-k] x_{t-k}, one multiplication of the whole sequence a tap; y in `dtype`."""
    T, W = x.shape[1], w.shape[1]
    if cu_seqlens is None:
        if T == 1:
            window = torch.cat([state, x], 1)
            y = (window * w.T).sum(1, keepdim=True)
            return (y if b is None else y + b).to(dtype), window[:, 1:]
        if not torch.compiler.is_compiling():
            return Taps.apply(x, w, b, state, dtype)
        y, state = taps(x, w, b, state)  # the compiler fuses them itself
        return y.to(dtype), state
    # Documents are laid out one after the other, each behind its own W - 1 inputs of state.
    x, state, cu_seqlens = x.to(w.dtype), state.to(w.dtype), cu_seqlens.long()
    token = torch.arange(T, device=x.device)
    document = torch.searchsorted(cu_seqlens[1:], token, right=True)
    slot = token + (document + 1) * (W - 1)
    before = cu_seqlens[:-1, None] + torch.arange(len(state) * (W - 1), device=x.device).view(len(state), W - 1)
    padded = x.new_zeros(T + before.numel(), x.shape[2])
    padded = padded.index_copy(0, slot, x[0]).index_copy(0, before.flatten(), state.flatten(0, 1))
    y = sum((padded[None, slot - k] * w[:, W - 1 - k] for k in range(W)), x.new_zeros(()) if b is None else b)
    return y.to(dtype), padded[before + cu_seqlens.diff()[:, None]]


def taps(x: Tensor, w: Tensor, b: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    T, W = x.shape[1], w.shape[1]
    padded = torch.cat([state, x], 1).to(w.dtype)
    y = sum((padded[:, j : j + T] * w[:, j] for j in range(W)), x.new_zeros((), dtype=w.dtype) if b is None else b)
    return y, padded[:, T:].clone()  # a view would hold the whole sequence


class Taps(torch.autograd.Function):
    """`taps` in pieces that stay in a cache from tap to tap, keeping its inputs and nothing else.

    dx_t = sum_k w[:, W-1-k] dy_{t+k},   dw[:, W-1-k] = sum_t dy_t x_{t-k},   db = sum_t dy_t,   where x_{-k} is the state's.
    """

    NUMBERS = 1 << 22  # of a piece, 16 MB in float32

    @staticmethod
    def pieces(x: Tensor) -> Iterator[tuple[int, int]]:
        size = max(Taps.NUMBERS // (x.shape[0] * x.shape[2]), 1)
        return ((i, min(i + size, x.shape[1])) for i in range(0, x.shape[1], size))

    @staticmethod
    def behind(x: Tensor, state: Tensor, i: int, j: int, k: int) -> Iterator[tuple[slice, Tensor]]:
        """The tokens k before those from i to j, and which of these they stand before: some of the state, some of x."""
        middle = min(max(i, k), j)
        if i < middle:
            first = state.shape[1] - k
            yield slice(0, middle - i), state[:, first + i : first + middle]
        if middle < j:
            yield slice(middle - i, j - i), x[:, middle - k : j - k]

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, state: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, w, b, state)
        y, W = torch.empty_like(x, dtype=dtype), w.shape[1]
        for i, j in Taps.pieces(x):
            piece = x[:, i:j] * w[:, -1] if b is None else torch.addcmul(b, x[:, i:j], w[:, -1])
            for k in range(1, W):
                for part, earlier in Taps.behind(x, state, i, j, k):
                    piece[:, part].addcmul_(earlier, w[:, W - 1 - k])
            y[:, i:j] = piece
        n = min(x.shape[1], W - 1)
        return y, torch.cat([state[:, n:], x[:, x.shape[1] - n :]], 1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        x, w, b, state = ctx.saved_tensors
        needed = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # for second derivatives, through the plain form
            inputs = [z for z, wanted in zip((x, w, b, state), needed, strict=True) if wanted]
            cotangents = dy.to(w.dtype), dlast.to(w.dtype)
            found = iter(torch.autograd.grad(taps(x, w, b, state), inputs, cotangents, create_graph=True))
            return *(next(found) if wanted else None for wanted in needed), None
        T, W = x.shape[1], w.shape[1]
        n = min(T, W - 1)  # inputs that are in the last state
        dx = torch.empty_like(x) if needed[0] else None
        dw = torch.zeros_like(w) if needed[1] else None
        db = None if b is None or not needed[2] else dy.sum((0, 1), dtype=w.dtype).to(b.dtype)
        for i, j in Taps.pieces(x):
            if dx is not None:
                piece = dy[:, i:j] * w[:, -1]
                for k in range(1, min(W, T - i)):
                    end = min(j, T - k)
                    piece[:, : end - i].addcmul_(dy[:, i + k : end + k], w[:, W - 1 - k])
                if (first := max(i, T - n)) < j:
                    piece[:, first - i :] += dlast[:, first - T + W - 1 : j - T + W - 1]
                dx[:, i:j] = piece
            if dw is not None:
                dy_piece = dy[:, i:j].to(w.dtype)
                for k in range(W):
                    for part, earlier in Taps.behind(x, state, i, j, k):
                        dw[:, W - 1 - k] += (dy_piece[:, part] * earlier).sum((0, 1))
        dstate = None
        if needed[3]:
            dstate = torch.zeros_like(state, dtype=w.dtype)
            dstate[:, n:] = dlast[:, : W - 1 - n]
            for k in range(1, W):
                end = min(k, T)
                dstate[:, W - 1 - k : W - 1 - k + end].addcmul_(dy[:, :end], w[:, W - 1 - k])
            dstate = dstate.to(state.dtype)
        return dx, dw, db, dstate, None


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
