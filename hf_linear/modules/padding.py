"""Padding: what a padded token must not do to the state of the sequence around it."""

from __future__ import annotations

import torch
from torch import Tensor


def zero_padding(mask: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Zero what padded tokens hold. tensors: [B, T, ...], mask: [B, T] with 0 on padding.

    A key of zero writes nothing to the state, a log-decay of zero leaves it as it is.
    """
    if mask is None:
        return tensors
    return tuple(x * mask.view(*mask.shape, *[1] * (x.dim() - 2)).to(x.dtype) for x in tensors)


def right_align(mask: Tensor, past: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Past and new tokens of every row without gaps: zeros for its padding first, then the past, then its real tokens.

    Convolutions count distances in tokens, so padding may stand before a sequence but not inside it.

    Args:
        mask: [B, T] with 0 on padding.
        past: [B, P, D].
        x: [B, T, D].

    Returns:
        the aligned sequence [B, P + T, D], and the place [B, T] where each token of x went.
    """
    (x,) = zero_padding(mask, x)
    kept = torch.cat([mask.new_ones(past.shape[:2]), mask], 1).to(torch.int8)
    order = kept.argsort(dim=1, stable=True)
    sequence = take(torch.cat([past, x], 1), order)
    return sequence, order.argsort(dim=1)[:, past.shape[1] :]


def take(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, t]] for x [B, T, D] and index [B, T']."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
