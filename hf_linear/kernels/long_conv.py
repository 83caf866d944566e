"""The long convolution between its gates: plans and launches, forward and backward, and the operators of a compiled graph.

Up to 8192 tokens a program holds a row (`long_conv_rows`); longer ones take three passes (`long_conv_columns`). The backward
pass keeps nothing but the inputs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from hf_linear.kernels.autograd import operator
from hf_linear.kernels.launch import cdiv, launch, multiprocessors, on_device, ready
from hf_linear.kernels.long_conv_columns import (
    convolve_middle_kernel,
    differentiate_middle_kernel,
    filter_gradient_kernel,
    filter_gradient_middle_kernel,
    gradients_kernel,
    outputs_kernel,
    spread_kernel,
)
from hf_linear.kernels.long_conv_rows import convolve_rows_kernel, differentiate_rows_kernel, filter_gradient_rows_kernel

# A W tokens in a tile [A, W], by `num_warps` warps. Above 64 rows of A every four warps take their own in wgmma.
TILES = {256: (16, 16, 4), 1024: (64, 16, 4), 2048: (64, 32, 4), 4096: (128, 32, 8), 8192: (128, 64, 8)}
# Products of float32 are three of tf32, and their factors twice the memory.
LONGEST_ROW = {True: 8192, False: 2048}  # by whether the factors are float16
MAX_COLUMN = 128
COLUMN_TILE = 8192  # numbers in a tile of the passes over columns
SCRATCH = 2**29  # bytes, if a channel takes no more: enough for few and large launches


@dataclasses.dataclass(frozen=True)
class Plan:
    """N1 tiles of N2 = A W tokens; N1 = 1 is a row that one program holds."""

    N1: int
    N2: int

    @property
    def P1(self) -> int:
        return 16 if self.N1 <= 16 else MAX_COLUMN  # not every size that would do: fewer kernels to compile and to trust

    @property
    def row(self) -> dict[str, int]:
        A, W, warps = TILES[self.N2]
        return {"A": A, "W": W, "num_warps": warps, "num_stages": 1}

    @property
    def column(self) -> dict[str, int]:
        tile = min(COLUMN_TILE // self.P1, self.N2)
        return {"N2": self.N2, "P1": self.P1, "TILE": tile, "num_warps": 8, "num_stages": 1}

    @property
    def work(self) -> int:
        """Operations of the products of a convolution, up to a factor."""
        A, W, _ = TILES[self.N2]
        return self.N1 * self.N2 * (2 * (A + W) + self.P1)


def make_plan(T: int, half: bool) -> Plan:
    longest = LONGEST_ROW[half]
    if T <= longest:
        return Plan(1, next(N2 for N2 in TILES if N2 >= T))
    plans = [Plan(cdiv(T, N2), N2) for N2 in TILES if 2048 <= N2 <= longest and cdiv(T, N2) <= MAX_COLUMN]
    return min(plans, key=lambda plan: plan.work)


@functools.cache
def transform_matrix(size: int, padded: int, quarter: bool, half: bool, device: torch.device) -> Tensor:
    """exp(-2 pi i n (k - 1/4 or 0) / size) at [k, n], real and imaginary part [2, padded, padded], zero outside `size`."""
    n = torch.arange(size, dtype=torch.float64)
    turns = n * (n[:, None] - quarter / 4) % size
    found = torch.zeros(2, padded, padded, dtype=torch.float64)
    found[0, :size, :size], found[1, :size, :size] = (
        torch.cos(2 * math.pi / size * turns),
        -torch.sin(2 * math.pi / size * turns),
    )
    return found.to(device, torch.float16 if half else torch.float32)


class Convolution:
    """One call's plan, and what all its launches share."""

    def __init__(self, u: Tensor, h: Tensor, skip: Tensor | None, pre: Tensor | None, post: Tensor | None):
        self.B, self.D, self.T = u.shape
        self.half = u.dtype != torch.float32
        self.plan = make_plan(self.T, self.half)
        self.u, self.h = ready(u), ready(h)
        self.skip, self.pre, self.post = (x if x is None else ready(x) for x in (skip, pre, post))
        gates = {"PRE": pre is not None, "POST": post is not None}
        self.common = {"ALIGNED": self.T % 16 == 0, "HALF": self.half}
        self.flags = {**gates, "SKIP": skip is not None, **self.common}
        types = tuple(None if x is None else x.dtype for x in (u, pre, post))
        # All that compiled kernels depend on, besides what a launch adds.
        self.signature = (*types, *self.flags.values(), self.plan.N2, self.plan.P1)
        A, W, _ = TILES[self.plan.N2]
        long = self.plan.N1 > 1
        self.matrices = self.matrix(A, A, not long), self.matrix(W, W, False)
        if long:
            self.columns = self.matrix(self.plan.N1, self.plan.P1, True)

    def matrix(self, size: int, padded: int, quarter: bool) -> Tensor:
        return transform_matrix(size, padded, quarter, self.half, self.u.device)

    def parts(self, most: int) -> tuple[int, int]:
        """Parts of the batch that run beside each other, and rows in each: enough to fill the GPU, at most `most` rows."""
        wanted = min(self.B, max(cdiv(4 * multiprocessors(self.u.device), self.D), cdiv(self.B, most)))
        rows = cdiv(self.B, wanted)
        return cdiv(self.B, rows), rows

    def groups(self, spectra: int) -> tuple[int, list[tuple[int, int]]]:
        """Bytes of scratch for one row, and channels (first, count) that share it, `spectra` rows each."""
        size = self.plan.N1 * 2 * self.plan.N2
        count = max(1, min(self.D, SCRATCH // (4 * size * spectra)))
        return size, [(c0, min(count, self.D - c0)) for c0 in range(0, self.D, count)]

    def forward(self) -> tuple[Tensor, Tensor]:
        y = self.u.new_empty(self.u.shape)
        state = self.u.new_empty(self.u.shape, dtype=torch.float32)
        if self.plan.N1 == 1:
            parts, rows = self.parts(4)
            launch(
                convolve_rows_kernel, (self.D, parts), self.signature,
                (
                    self.u, self.pre, self.post, self.h, self.skip, y, state, *self.matrices,
                    self.T, self.h.shape[1], self.B, self.D, rows,
                ), lambda: {**self.flags, **self.plan.row},
            )  # fmt: skip
            return y, state
        size, groups = self.groups(self.B + 1)
        z, zh = (self.u.new_empty(rows * groups[0][1] * size, dtype=torch.float32) for rows in (self.B, 1))
        for c0, C in groups:
            self.spread(self.u, self.pre, state, z, c0, C)
            self.spread_filter(zh, c0, C)
            launch(
                convolve_middle_kernel, (self.plan.N1, C), self.signature, (z, zh, *self.matrices, self.plan.N1, C, self.B),
                lambda: {"HALF": self.half, **self.plan.row},
            )  # fmt: skip
            launch(
                outputs_kernel, (self.tiles, self.B * C), self.signature,
                (z, state, self.post, self.skip, y, self.columns, self.T, self.D, c0, C, self.plan.N1),
                lambda: {"POST": self.flags["POST"], "SKIP": self.flags["SKIP"], **self.common, **self.plan.column},
            )  # fmt: skip
        return y, state

    @property
    def tiles(self) -> int:
        return self.plan.N2 // self.plan.column["TILE"]

    def spread(self, x: Tensor, gate: Tensor | None, kept: Tensor | None, z: Tensor, c0: int, C: int) -> None:
        flags = {"GATE": gate is not None, "KEEP": kept is not None}
        types = x.dtype, None if gate is None else gate.dtype, kept is None
        launch(
            spread_kernel, (self.tiles, self.B * C), (self.signature, types),
            (x, gate, kept, z, self.columns, self.T, self.T, self.D, c0, C, self.plan.N1),
            lambda: {**flags, **self.common, **self.plan.column},
        )  # fmt: skip

    def spread_filter(self, z: Tensor, c0: int, C: int) -> None:
        common = {"GATE": False, "KEEP": False, "ALIGNED": False, "HALF": self.half}
        launch(
            spread_kernel, (self.tiles, C), (self.half, self.plan.N2, self.plan.P1),
            (self.h, None, None, z, self.columns, self.T, self.h.shape[1], self.D, c0, C, self.plan.N1),
            lambda: {**common, **self.plan.column},
        )  # fmt: skip

    def backward(self, dy: Tensor, dstate: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of u, h, skip, pre and post, None where there is no such input."""
        dy, dstate = ready(dy), None if dstate is None else ready(dstate)
        du = self.u.new_empty(self.u.shape)
        dpre, dpost = (x if x is None else x.new_empty(x.shape) for x in (self.pre, self.post))
        differentiate = self.differentiate_rows if self.plan.N1 == 1 else self.differentiate_columns
        dh, dskip = differentiate(dy, dstate, du, dpre, dpost)
        return du, dh, dskip, dpre, dpost

    def new_filter_gradient(self) -> Tensor:
        """What lies behind the sequence has none."""
        return (self.h.new_empty if self.h.shape[1] == self.T else self.h.new_zeros)(self.h.shape)

    def differentiate_rows(
        self, dy: Tensor, dstate: Tensor | None, du: Tensor, dpre: Tensor | None, dpost: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        parts, rows = self.parts(self.B)
        dh, dskip = self.new_filter_gradient(), None if self.skip is None else self.skip.new_empty(parts, self.D)
        zh, zdh = (self.h.new_empty(parts, self.D, 2, self.plan.N2) for _ in range(2))
        launch(
            differentiate_rows_kernel, (self.D, parts), (self.signature, dstate is None),
            (
                dy, dstate, self.u, self.pre, self.post, self.h, self.skip, du, dpre, dpost, zh, zdh, dskip, *self.matrices,
                self.T, self.h.shape[1], self.B, self.D, rows,
            ), lambda: {**self.flags, "STATE": dstate is not None, **self.plan.row},
        )  # fmt: skip
        launch(
            filter_gradient_rows_kernel, (self.D,), (self.half, self.plan.N2),
            (zdh, dh, *self.matrices, self.T, self.h.shape[1], self.D, parts),
            lambda: {"HALF": self.half, **self.plan.row},
        )  # fmt: skip
        return dh, None if dskip is None else dskip.sum(0)

    def differentiate_columns(
        self, dy: Tensor, dstate: Tensor | None, du: Tensor, dpre: Tensor | None, dpost: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        dh = self.new_filter_gradient()
        dskip = None if self.skip is None else self.skip.new_empty(self.tiles, self.B, self.D)
        size, groups = self.groups(2 * self.B + 2)
        zp, zg, zh, zdh = (self.u.new_empty(rows * groups[0][1] * size, dtype=torch.float32) for rows in (self.B, self.B, 1, 1))
        for c0, C in groups:
            self.spread(self.u, self.pre, None, zp, c0, C)
            self.spread(dy, self.post, None, zg, c0, C)
            self.spread_filter(zh, c0, C)
            launch(
                differentiate_middle_kernel, (self.plan.N1, C), self.signature,
                (zp, zg, zh, zdh, *self.matrices, self.plan.N1, C, self.B),
                lambda: {"POST": self.flags["POST"], "HALF": self.half, **self.plan.row},
            )  # fmt: skip
            launch(
                filter_gradient_middle_kernel, (self.plan.N1, C), (self.half, self.plan.N2),
                (zdh, *self.matrices, self.plan.N1), lambda: {"HALF": self.half, **self.plan.row},
            )  # fmt: skip
            launch(
                gradients_kernel, (self.tiles, self.B * C), (self.signature, dstate is None),
                (
                    zp, zg, dy, dstate, self.u, self.pre, self.post, self.skip, du, dpre, dpost, dskip, self.columns,
                    self.T, self.D, c0, C, self.plan.N1,
                ), lambda: {**self.flags, "STATE": dstate is not None, **self.plan.column},
            )  # fmt: skip
            launch(
                filter_gradient_kernel, (self.tiles, C), (self.half, self.plan.N2, self.plan.P1),
                (zdh, dh, self.columns, self.T, self.h.shape[1], c0, self.plan.N1),
                lambda: {"HALF": self.half, **self.plan.column},
            )  # fmt: skip
        return dh, None if dskip is None else dskip.sum((0, 1))


def forward(u: Tensor, h: Tensor, skip: Tensor | None, pre: Tensor | None, post: Tensor | None) -> tuple[Tensor, Tensor]:
    """y [B, D, T] in u's dtype and the state [B, D, T] float32."""
    with on_device(u):
        return Convolution(u, h, skip, pre, post).forward()


def backward(
    dy: Tensor, dstate: Tensor | None, u: Tensor, h: Tensor, skip: Tensor | None, pre: Tensor | None, post: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of u, h, skip, pre and post; empty where there is no such input."""
    with on_device(u):
        found = Convolution(u, h, skip, pre, post).backward(dy, dstate)
    du, dh, *rest = found
    dskip, dpre, dpost = (u.new_empty(0) if x is None else x for x in rest)
    return du, dh, dskip, dpre, dpost


def fake(u, h, skip, pre, post):
    return u.new_empty(u.shape), u.new_empty(u.shape, dtype=torch.float32)


def fake_backward(dy, dstate, u, h, skip, pre, post):
    return tuple(u.new_empty(0) if x is None else x.new_empty(x.shape) for x in (u, h, skip, pre, post))


def save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def differentiate(backward: Callable, ctx, dy: Tensor | None, dstate: Tensor | None):
    inputs = ctx.saved_tensors
    dy = torch.zeros_like(inputs[0]) if dy is None else dy
    gradients = backward(dy, dstate, *inputs)
    return tuple(None if x is None else gradient for x, gradient in zip(inputs, gradients, strict=True))


long_conv = operator("long_conv", forward, backward, (fake, fake_backward), save, differentiate)
