"""The matrix-state recurrences on a GPU: what `hf_linear.kernels` takes, and when. Triton is imported on the first call."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_K = 256  # two tiles of 128 channels of the state fit in a multiprocessor's registers
CAPABILITY = (9, 0)  # nothing older has run them, and most have less shared memory than the tiles take
HAS_TRITON = importlib.util.find_spec("triton") is not None  # without importing it


def chosen(backend: str, q: Tensor, v: Tensor) -> bool:
    """Whether the kernels run: where named, and by default on a GPU that has them."""
    if backend == "triton" and (reason := refusal(q, v)):
        raise ValueError(f'backend="triton": {reason}')
    return backend == "triton" or (backend == "auto" and v.is_cuda and refusal(q, v) is None)


def refusal(q: Tensor, v: Tensor) -> str | None:
    """Why the kernels do not take these inputs, as "must be ..., got ...: remedy"; None where they do."""
    if v.dtype not in DTYPES:
        return f'v must be bfloat16, float16 or float32, got {v.dtype}: backend="chunked" takes it'
    if q.shape[-1] > MAX_K:
        return f'K must be at most {MAX_K}, got {q.shape[-1]}: use more heads, or backend="chunked"'
    if not HAS_TRITON:
        return 'triton must be installed, got none: pip install triton, or backend="chunked"'
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if v.device.type != "cuda":
        return f'tensors must be on a CUDA device, got {v.device}: move them, or backend="chunked"'
    card = torch.cuda.get_device_properties(v.device)
    found = (card.major, card.minor)
    if found < CAPABILITY:
        return f'the GPU must have compute capability {CAPABILITY} or newer, got {found}: backend="chunked" runs on it'
    return None


def attend(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """o in v's dtype and the final state; g [B, T, H, K] or [B, T, H] chooses the recurrence."""
    from hf_linear.kernels.autograd import chunk_attention

    return chunk_attention(q.to(v.dtype), k.to(v.dtype), v, g.float(), scale, initial_state, cu_seqlens)


def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, state: Tensor) -> Tensor:
    """o of one token, in v's dtype; the state is written. It has no gradient."""
    from hf_linear.kernels.step import step

    return step(q, k, v, g, scale, state)
