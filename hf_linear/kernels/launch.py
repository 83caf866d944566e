"""Launching kernels: on the tensors' device, and without asking Triton at every call which of its compilations serves.

Triton reads the type, value and alignment of every argument to find the compiled kernel, which takes the host longer than the
GPU takes for a small shape. Here the caller's `signature` says it: tensors are `ready`, and numbers are not specialised.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

compiled: dict[Hashable, tuple] = {}


def launch(
    kernel: Any, grid: tuple[int, ...], signature: Hashable, args: tuple, constants: Callable[[], dict[str, Any]] = dict
) -> None:
    """kernel[grid](*args, **constants()).

    `signature` fixes the dtypes of `args`, which of them are None, and the constants (num_warps and num_stages among them), so
    that these are looked at only once.
    """
    if not isinstance(kernel, JITFunction):  # the interpreter's
        kernel[grid](*args, **constants())
        return
    grid = (*grid, 1, 1)[:3]
    key = (id(kernel), torch.cuda.current_device(), signature)
    if key in compiled:
        binary, values = compiled[key]
        # Of an address Triton does not ask the driver whose it is.
        binary[grid](*[x.data_ptr() if isinstance(x, Tensor) else x for x in args], *values)
        return
    values = constants()
    binary = kernel[grid](*args, **values)
    names = [parameter.name for parameter in kernel.params][len(args) :]
    compiled[key] = binary, tuple(values[name] for name in names)


def on_device(x: Tensor) -> AbstractContextManager:
    """Kernels start on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def ready(x: Tensor) -> Tensor:
    """Contiguous, and aligned as memory that PyTorch allocates is."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def evenly_spaced(x: Tensor) -> Tensor:
    """x [B, T, D] itself where its tokens are evenly spaced over the whole batch, with their channels side by side."""
    even = x.stride(2) == 1 and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1))
    return (
        x if even else x.clone(memory_format=torch.contiguous_format)
    )  # contiguous() would leave a stride of one token as it is


def product_precision(dtype: torch.dtype) -> str:
    """float32 takes three tf32 products for one; the word concerns no other dtype."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; Triton's own is for kernels, and slow outside them."""
    return -(-a // b)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
