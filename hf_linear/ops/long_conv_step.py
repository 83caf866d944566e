"""One token of a long convolution: relaxed (online) convolution, exact, from a buffer of inputs and of sums ahead of them."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_linear.ops.dispatch import check_filter, check_shape, check_state, compute_dtype, full_precision, needs_gradient

BLOCK = 32  # within a block direct products are cheaper than FFTs of a few points


def long_conv_ahead(h: Tensor, state: Tensor, t: int) -> Tensor:
    """Bring the sums ahead of token t up to date; call it before `long_conv_step`, once a token.

    Columns s < t of the state are inputs p_s, columns s >= t sums over earlier inputs of h[:, s - r] p_r. A full state, t = C,
    doubles: all its inputs are convolved into the C columns that follow. So i = t - C / 2 tokens have come since, and whenever
    BLOCK divides i the last U inputs, U the lowest set bit of i, are convolved into the next U columns. Every pair of an
    input and a later token meets once: in a doubling, in a tile, or within a block of BLOCK tokens, where `long_conv_step`
    adds each input to the columns ahead.

    Args:
        h: [D, L], the filter; L >= 2 t, or all that the sequence will ever need.
        state: [B, D, C] float32 or float64, t <= C <= 2 t: what `long_conv` or this function returned. It is written.
        t: the tokens so far.

    Returns:
        the state, of 2 C columns where it was full.

    Cost: O(log^2 T) a channel and token on average, O(T log T) for a token that doubles the state.
    Source: van der Hoeven 2002 (relaxed multiplication); Oncescu et al. 2024, arXiv 2410.12982.
    """
    C = state.shape[-1]
    if not 0 < t <= C <= 2 * t:
        raise ValueError(f"t must count the tokens of the state, C / 2 to C = {C}, got {t}: pass what long_conv returned")
    if needs_gradient(h, state):
        raise ValueError("long_conv_ahead must run without a gradient, got an input that requires one: take long_conv")
    check_state("state", state, "[B, D, C]", (state.shape[0], h.shape[0], C), compute_dtype(state))
    if t == C:
        return torch.cat([state, contributions(state, h)], -1)
    i = t - C // 2
    if i > 0 and i % BLOCK == 0:
        U = i & -i
        end = min(t + U, C)
        state[..., t:end] += contributions(state[..., t - U : t], h)[..., : end - t]
    return state


def contributions(p: Tensor, h: Tensor) -> Tensor:
    """What U inputs add to the U outputs behind them; a cyclic convolution of 2 U points wraps around onto the first U only."""
    U = p.shape[-1]
    with full_precision(p):
        spectrum = torch.fft.rfft(p, 2 * U) * torch.fft.rfft(h[:, : 2 * U].to(p.dtype), 2 * U)
        return torch.fft.irfft(spectrum, 2 * U)[..., U:]


def long_conv_step(u: Tensor, h: Tensor, skip: Tensor, gate: Tensor, state: Tensor, t: int) -> Tensor:
    """p_t = gate * u,   y_t = sum_{s <= t} h[:, t - s] p_s + skip * p_t: `long_conv` for one token, in place.

    Args:
        u: [B, D].
        h: [D, L], L > t.
        skip: [D].
        gate: [B, D].
        state: [B, D, C] float32 (float64 for float64 inputs), from `long_conv_ahead` for this token. p_t is written into it,
            and what it adds to the columns ahead in its block.
        t: the tokens before this one.

    Returns:
        y [B, D] in u's dtype.

    Cost: O(BLOCK) a channel. Source: as `long_conv_ahead`.
    """
    C = state.shape[-1]
    check_shape("gate", gate, "[B, D] as u", tuple(u.shape), "give one gate a channel")
    check_state("state", state, "[B, D, C]", (*u.shape, C), compute_dtype(u))
    check_filter(h, t + 1)
    if not C // 2 <= t < C:
        raise ValueError(f"t must lie in the second half of the state's C = {C} columns, got {t}: call long_conv_ahead first")
    if needs_gradient(u, h, skip, gate, state):
        raise ValueError("long_conv_step must run without a gradient, got an input that requires one: take long_conv")
    p, ahead = u.to(state.dtype) * gate, state[..., t]
    y = torch.addcmul(torch.addcmul(ahead, p, h[:, 0]), p, skip)
    ahead.copy_(p)
    end = min(t + BLOCK - (t - C // 2) % BLOCK, C)
    if t + 1 < end:
        state[..., t + 1 : end].addcmul_(p[..., None], h[:, 1 : end - t])
    return y.to(u.dtype)
