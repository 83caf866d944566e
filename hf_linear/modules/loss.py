"""The loss of a language model without the logits of all tokens at once."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hf_linear.modules.fused import available, is_bare

HAS_LIGER = importlib.util.find_spec("liger_kernel") is not None  # without importing it
CHUNK = 4096  # tokens whose logits there are at a time
IGNORED = -100


def linear_cross_entropy(
    x: Tensor,
    head: nn.Module,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
) -> Tensor:
    """The cross-entropy of head(x) with the labels that follow, averaged over them or over `num_items_in_batch`.

    Logits of CHUNK tokens at a time, computed a second time in the backward pass; liger-kernel, where it is installed and the
    head is a linear layer and nothing more, takes the gradients with the loss and computes them once.

    Args:
        x: [B, T, D].
        labels: [B, T], of the tokens themselves, IGNORED where none is wanted.
        shift_labels: [B, T], of the tokens that follow, in place of `labels`.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    targets = shift_labels.flatten().to(x.device)
    x = x.flatten(0, 1)
    if HAS_LIGER and available(x) and is_bare(head):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        chunks = max(CHUNK * head.out_features // x.numel(), 1)  # liger's unit: as many numbers of logits as x has
        total = liger_fused_linear_cross_entropy(
            x, head.weight, targets, reduction="sum", accum_dtype=torch.float32, chunk_mem_const=chunks
        )
    else:
        parts = zip(x.split(CHUNK), targets.split(CHUNK), strict=True)
        losses = [checkpoint(chunk_loss, part, head, target, use_reentrant=False) for part, target in parts]
        total = torch.stack(losses).sum()
    if num_items_in_batch is None:
        num_items_in_batch = (targets != IGNORED).sum()
    return total / (num_items_in_batch if isinstance(num_items_in_batch, int) else num_items_in_batch.to(total.device))


def share_of_labels(
    labels: Tensor, num_items_in_batch: Tensor | int | None = None, shift_labels: Tensor | None = None
) -> Tensor | float:
    """The part of a batch's labels that are here: 1 unless it is accumulated, and `num_items_in_batch` counts them all.

    A loss that is no sum over labels is weighted by it, so that it counts once a batch, however many pieces that comes in.
    """
    if num_items_in_batch is None:
        return 1.0
    here = (labels[:, 1:] if shift_labels is None else shift_labels) != IGNORED
    return here.sum() / num_items_in_batch


def chunk_loss(x: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    logits = head(x)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")
