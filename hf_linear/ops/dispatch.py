"""Argument checks and the choice of a backend, shared by every op."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

Backend = Literal["auto", "reference", "chunked", "triton"]
BOUNDARIES = "of documents with these lengths they are F.pad(lengths.cumsum(0), (1, 0))"


def run(implementations: Mapping[str, Callable], backend: str, T: int, *inputs: Any) -> tuple[Tensor, Tensor]:
    """Run the implementation that `backend` names; "auto" takes one token by its recurrence, anything longer in chunks.

    The inputs are in the dtype to compute in, so autocast, which would lower it again, is off.
    """
    if backend == "auto":
        backend = "reference" if T == 1 else "chunked"
    if backend not in implementations:
        raise ValueError(
            f'backend must be "auto" or one of {sorted(implementations)}, got {backend!r}: "auto" takes any inputs'
        )
    with full_precision(inputs[0]):
        return implementations[backend](*inputs)


def full_precision(x: Tensor) -> AbstractContextManager:
    """No autocast on the device of x; the meta device has none to switch off."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def check_step(op: str, T: int, *tensors: Tensor | None) -> None:
    """A step in place takes one token and has no gradient."""
    if T != 1:
        raise ValueError(f"{op}_step must get one token, got T = {T}: for more take {op}")
    if needs_gradient(*tensors):
        raise ValueError(
            f"{op}_step must run without a gradient, got an input that requires one: call it under torch.no_grad(), or {op}"
        )


def check_floating(**tensors: Tensor | None) -> None:
    """Every tensor is floating point and on the device of the first."""
    given = {name: x for name, x in tensors.items() if x is not None}
    main_name, main = next(iter(given.items()))
    for name, x in given.items():
        if not x.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {x.dtype}: convert it with .float()")
        if x.device != main.device:
            raise ValueError(f"{name} must be on {main_name}'s device {main.device}, got {x.device}: move it with .to()")


def check_shape(name: str, x: Tensor, layout: str, wanted: tuple[int, ...], remedy: str) -> None:
    if tuple(x.shape) != wanted:
        raise ValueError(f"{name} must be {layout} = {list(wanted)}, got {list(x.shape)}: {remedy}")


def check_sequence(name: str, x: Tensor, layout: str, dim: int) -> None:
    """`x` has the dimensions that `layout` names, and at least one token along `dim`."""
    if x.dim() != len(layout.split(",")):
        raise ValueError(f"{name} must be {layout}, got a tensor of shape {list(x.shape)}: view or unsqueeze it so")
    if x.shape[dim] == 0:
        raise ValueError(
            f"{name} must hold at least one token, {layout} with T >= 1, got shape {list(x.shape)}: "
            "without tokens there is nothing to call, the state stays as it is"
        )


def readable(x: Tensor) -> bool:
    """Whether a look at the values of x is cheap: on an accelerator it would stall at every call, in a graph end the graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(x, FakeTensor)


def check_log_decay(g: Tensor) -> None:
    if readable(g) and g.numel() > 0 and (largest := g.max().item()) > 0:
        raise ValueError(
            f"g must be a natural log-decay <= 0, got values up to {largest:.3g}: take the log of a decay in (0, 1], "
            "or logsigmoid of anything"
        )


def check_packed(cu_seqlens: Tensor | None, x: Tensor, T: int) -> None:
    """`cu_seqlens` [N + 1] are the boundaries 0 <= ... <= T of the documents packed in the single row of x."""
    if cu_seqlens is None:
        return
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"cu_seqlens must be a 1-D int32 or int64 tensor of N + 1 boundaries, got {cu_seqlens.dtype} "
            f"of shape {list(cu_seqlens.shape)}: {BOUNDARIES}"
        )
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens must be on the inputs' device {x.device}, got {cu_seqlens.device}: move it with .to()")
    if x.shape[0] != 1:
        raise ValueError(
            f"packed documents (cu_seqlens) need a batch of one row, got B = {x.shape[0]}: "
            "concatenate the rows along the tokens, or pass a padding mask instead"
        )
    if readable(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != T or any(i > j for i, j in pairwise(bounds)):
            raise ValueError(f"cu_seqlens must rise from 0 to T = {T} without falling, got {bounds}: {BOUNDARIES}")


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything narrower: the dtype of states and accumulators."""
    return torch.promote_types(x.dtype, torch.float32)


def check_state(name: str, state: Tensor, layout: str, wanted: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(state.shape) != wanted or state.dtype != dtype:
        raise ValueError(
            f"{name} must be {layout} = {list(wanted)} in {dtype}, got {list(state.shape)} in {state.dtype}: "
            "pass what an earlier call on these rows returned, or None to begin"
        )


def check_filter(h: Tensor, tokens: int) -> None:
    if tokens > h.shape[1]:
        raise ValueError(
            f"h must be at least as long as the sequence of {tokens} tokens, its history included, got a filter of "
            f"L = {h.shape[1]}: shorten the sequence, or compute a longer filter"
        )
