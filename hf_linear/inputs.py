"""What a model is called with: padding masks, positions and the boundaries of packed documents, read and checked."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hf_linear.ops.dispatch import check_packed as check_boundaries

PREFIX = "prefix"  # in the place of attention's mask: new tokens see all cached ones and, of themselves, those before


def padding_mask(attention_mask: Tensor | None, T: int) -> Tensor | None:
    """The new tokens' part of a padding mask [B, past + T], None where nothing is padded."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask must be [B, T] with 0 on padding, got {list(attention_mask.shape)}: "
            "a recurrent layer passes every token on to all later ones and can hide padding only; "
            "tell packed documents apart with cu_seq_lens_q"
        )
    mask = attention_mask[:, -T:]  # padding that came before is none of the new tokens' business
    if not torch.compiler.is_compiling():
        if bool((mask == 1).all()):
            return None
        if bool(((mask != 0) & (mask != 1)).any()):
            raise ValueError(
                f"attention_mask must be 1 on tokens and 0 on padding, got values from {mask.min().item()} to "
                f"{mask.max().item()}: tell packed documents apart with cu_seq_lens_q"
            )
    # With strides of its own: those of a view grow with the mask, and a graph is compiled anew for each.
    return mask.clone(memory_format=torch.contiguous_format)


def follows_prefix(attention_mask: Tensor | None, T: int, past_key_values: Cache | None, layer_idx: int) -> bool:
    """Whether T > 1 new tokens follow others that a growing layer of the cache holds, and none of all these is padding."""
    if torch.compiler.is_compiling():  # a graph cannot ask a mask, and would be another for every number of slices
        return False
    seen = 0 if past_key_values is None else past_key_values.get_seq_length(layer_idx)
    if isinstance(seen, Tensor) or seen == 0 or T == 1:  # a static layer counts in a tensor
        return False
    return attention_mask is None or (attention_mask.dim() == 2 and bool((attention_mask == 1).all()))


def check_window(attention_mask: Tensor | None, past_key_values: Cache | None, window: int) -> None:
    """A sliding window counts places in the cache: with padding inside it, it would reach fewer tokens than it should."""
    if attention_mask is None or past_key_values is None or attention_mask.shape[1] <= window:
        return
    if past_key_values.get_seq_length() == 0 or torch.compiler.is_compiling():
        return
    real = attention_mask != 0
    begun = real.cumsum(1) > 0
    interrupted = (begun & ~real).cumsum(1) > 0
    if bool((interrupted & real).any()):
        raise ValueError(
            f"attention_mask must not have padding inside a sequence longer than sliding_window = {window}, got some: "
            "pad the first call on the left"
        )


def positions(
    x: Tensor, attention_mask: Tensor | dict | None, cu_seqlens: Tensor | None, past_key_values: Cache | None
) -> Tensor:
    """Positions counted inside each document or each row's real tokens, [B or 1, T]."""
    T = x.shape[1]
    steps = torch.arange(T, device=x.device)
    if cu_seqlens is not None:
        starts = cu_seqlens.long()
        return (steps - starts[torch.searchsorted(starts[1:], steps, right=True)])[None]
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -T:]
    return (steps + cached_tokens(past_key_values))[None]


def cached_tokens(past_key_values: Cache | None) -> int | Tensor:
    return 0 if past_key_values is None else past_key_values.get_seq_length()


def check_inputs(x: Tensor, hidden_size: int, position_ids: Tensor | None) -> None:
    if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] != hidden_size:
        raise ValueError(
            f"input_ids must be [B, T] or inputs_embeds [B, T, hidden_size = {hidden_size}] with T >= 1, "
            f"got embeddings of shape {list(x.shape)}: add the missing axis or tokens, or project to hidden_size"
        )
    B, T = x.shape[:2]
    if position_ids is not None and tuple(position_ids.shape) not in ((B, T), (1, T)):
        raise ValueError(
            f"position_ids must be [B or 1, T] = {[B, T]}, got {list(position_ids.shape)}: leave them out to have them counted"
        )


def check_mask(x: Tensor, attention_mask: Tensor | dict | None, past_key_values: Cache | None) -> None:
    """A padding mask covers the tokens in the cache and the new ones; how many a static cache holds, the device knows."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return
    (B, T), seen = x.shape[:2], cached_tokens(past_key_values)
    fits = attention_mask.shape[1] >= T if isinstance(seen, Tensor) else attention_mask.shape[1] == seen + T
    if attention_mask.shape[0] != B or not fits:
        raise ValueError(
            f"attention_mask must cover {seen} cached and {T} new tokens of every row, {[B, seen + T]}, got "
            f"{list(attention_mask.shape)}: concatenate the mask of the earlier calls with that of this one"
        )


def document_boundaries(
    x: Tensor, attention_mask: Tensor | dict | None, position_ids: Tensor | None, kwargs: dict
) -> Tensor | None:
    """cu_seqlens of a packed row, None for one document a row."""
    if kwargs.get("cu_seq_lens_q") is not None:
        return kwargs["cu_seq_lens_q"]
    if position_ids is not None:
        if attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.dim() == 2):
            return packed_boundaries(position_ids, attention_mask, x.shape[0])
        return None  # a prepared mask says itself who sees whom
    for name in ("cu_seq_lens_k", "seq_idx"):
        if kwargs.get(name) is not None:
            raise ValueError(f"packed documents need cu_seq_lens_q or position_ids that restart, got {name} alone: add one")
    return None


def packed_boundaries(position_ids: Tensor, attention_mask: Tensor | None, B: int) -> Tensor | None:
    """cu_seqlens of the documents in a row whose positions restart between two tokens, None for one document a row."""
    T = position_ids.shape[-1]
    if T == 1:
        return None
    restarts = position_ids.diff(dim=-1) != 1
    if attention_mask is not None:
        real = attention_mask[:, -T:] != 0
        restarts = restarts & real[:, 1:] & real[:, :-1]
    if torch.compiler.is_compiling():
        # Boundaries would have a shape that depends on data, which a graph cannot hold.
        torch._assert_async(
            ~restarts.any(),
            "position_ids that restart cannot be compiled: pass cu_seq_lens_q, the documents' boundaries",
        )
        return None
    if not restarts.any():
        return None
    if B != 1:
        raise ValueError(
            f"packed documents (position_ids that restart) need a batch of one row, got B = {B}: "
            "concatenate the rows along the tokens, or pass an attention_mask for a padded batch"
        )
    inner = restarts[0].nonzero().flatten() + 1
    return torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), T)])


def check_packed(x: Tensor, attention_mask: Tensor | dict | None, past_key_values: Cache | None, cu_seqlens: Tensor) -> None:
    check_boundaries(cu_seqlens, x, x.shape[1])
    if attention_mask is not None:
        raise ValueError("attention_mask must be None for packed documents, got a mask: leave their padding out instead")
    if past_key_values is not None:
        raise ValueError("past_key_values must be None for packed documents, got a cache: continue one document at a time")
