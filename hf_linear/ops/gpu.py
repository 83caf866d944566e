"""Recurrences and long convolutions on a GPU: what `hf_linear.kernels` takes, and when. Triton is imported on first use."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_K = 256  # two tiles of 128 channels of the state fit in a multiprocessor's registers
CAPABILITY = (9, 0)  # nothing older has run them, and most have less shared memory than the tiles take
HAS_TRITON = importlib.util.find_spec("triton") is not None  # without importing it
MAX_STATES = 64  # of a channel: they are the registers of a thread
MAX_TAPS = 8  # of a short convolution: its loops over them are written out
MAX_CONV = {torch.bfloat16: 2**20, torch.float16: 2**20, torch.float32: 2**18}  # tokens of a row that a long convolution takes


def chosen(backend: str, q: Tensor, v: Tensor) -> bool:
    """Whether the kernels run: where named, and by default on a GPU that has them."""
    return serves(backend, v, refusal(q, v))


def scan_chosen(backend: str, x: Tensor, A: Tensor) -> bool:
    """As `chosen`, for `selective_scan`."""
    return serves(backend, x, refusal_of_dtype("x", x) or too_many("N", A.shape[1], MAX_STATES) or no_kernels(x.device))


def short_conv_chosen(backend: str, x: Tensor, w: Tensor) -> bool:
    """As `chosen`, for `short_conv`."""
    return serves(backend, x, refusal_of_dtype("x", x) or too_many("W", w.shape[1], MAX_TAPS) or no_kernels(x.device))


def long_conv_chosen(
    backend: str, u: Tensor, gates: list[Tensor], initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> bool:
    """As `chosen`, for `long_conv`."""
    return serves(backend, u, long_conv_refusal(u, gates, initial_state, cu_seqlens))


def serves(backend: str, x: Tensor, reason: str | None) -> bool:
    if backend == "triton" and reason:
        raise ValueError(f'backend="triton": {reason}')
    return backend == "triton" or (backend == "auto" and x.is_cuda and reason is None)


def refusal(q: Tensor, v: Tensor) -> str | None:
    """Why the kernels do not take these inputs, as "must be ..., got ...: remedy"; None where they do."""
    if reason := refusal_of_dtype("v", v):
        return reason
    if q.shape[-1] > MAX_K:
        return f'K must be at most {MAX_K}, got {q.shape[-1]}: use more heads, or backend="chunked"'
    return no_kernels(v.device)


def long_conv_refusal(u: Tensor, gates: list[Tensor], initial_state: Tensor | None, cu_seqlens: Tensor | None) -> str | None:
    for x in (u, *gates):
        if x.dtype not in DTYPES:
            return f'u and the gates must be bfloat16, float16 or float32, got {x.dtype}: backend="chunked" takes it'
    if initial_state is not None and initial_state.shape[-1] > 0:
        return f'initial_state must be None, got {initial_state.shape[-1]} tokens: backend="chunked" continues a sequence'
    if cu_seqlens is not None:
        return f'cu_seqlens must be None, got {len(cu_seqlens)} boundaries: pad the documents to rows, or backend="chunked"'
    if u.shape[-1] > MAX_CONV[u.dtype]:
        return (
            f"T must be at most {MAX_CONV[u.dtype]} in {u.dtype}, got {u.shape[-1]}: "
            'take bfloat16 or float16 up to 1048576, or backend="chunked"'
        )
    return no_kernels(u.device)


def refusal_of_dtype(name: str, x: Tensor) -> str | None:
    if x.dtype in DTYPES:
        return None
    return f'{name} must be bfloat16, float16 or float32, got {x.dtype}: backend="chunked" takes it'


def too_many(name: str, found: int, most: int) -> str | None:
    return None if found <= most else f'{name} must be at most {most}, got {found}: backend="chunked" takes it'


def no_kernels(device: torch.device) -> str | None:
    """Why this machine or device runs no kernels."""
    if not HAS_TRITON:
        return 'triton must be installed, got none: pip install triton, or backend="chunked"'
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f'tensors must be on a CUDA device, got {device}: move them, or backend="chunked"'
    card = torch.cuda.get_device_properties(device)
    found = (card.major, card.minor)
    if found < CAPABILITY:
        return f'the GPU must have compute capability {CAPABILITY} or newer, got {found}: backend="chunked" runs on it'
    return None


def attend(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """o in v's dtype and the final state; g [B, T, H, K] or [B, T, H] chooses the recurrence."""
    from hf_linear.kernels.chunk_attention import chunk_attention

    return chunk_attention(q.to(v.dtype), k.to(v.dtype), v, g.float(), scale, initial_state, cu_seqlens)


def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, state: Tensor) -> Tensor:
    """o of one token, in v's dtype; the state is written. It has no gradient."""
    from hf_linear.kernels.step import step

    return step(q, k, v, g, scale, state)


def long_conv(
    u: Tensor, h: Tensor, skip: Tensor | None, pre_gate: Tensor | None, post_gate: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y in u's dtype, and all pre_gate * u in float32."""
    from hf_linear.kernels.long_conv import long_conv

    return long_conv(u, h.float(), None if skip is None else skip.float(), pre_gate, post_gate)


def selective_scan(*inputs: Any) -> tuple[Tensor, Tensor]:
    """y in x's dtype and the final state: see `hf_linear.kernels.selective_scan.selective_scan`."""
    from hf_linear.kernels.selective_scan import selective_scan

    return selective_scan(*inputs)


def selective_scan_step(*inputs: Any) -> Tensor:
    """y of one token, in x's dtype; the state, which comes last, is written. It has no gradient."""
    from hf_linear.kernels.selective_scan_step import step

    return step(*inputs)


def short_conv(
    x: Tensor, w: Tensor, b: Tensor | None, silu: bool, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y and the final state in x's dtype."""
    from hf_linear.kernels.short_conv import short_conv

    return short_conv(x, w, b, silu, initial_state, cu_seqlens)


def short_conv_step(x: Tensor, w: Tensor, b: Tensor | None, silu: bool, state: Tensor) -> Tensor:
    """y of one token, in x's dtype; the state is written. It has no gradient."""
    from hf_linear.kernels.short_conv_step import step

    return step(x, w, b, silu, state)
