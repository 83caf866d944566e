"""The selective scan: the launches, forward and backward, and the PyTorch operators they make.

The forward pass is one walk over the tokens; where a gradient is wanted it leaves the state before every tile of 16 tokens, 2
bytes a token and channel at N = 16 in bfloat16. The backward pass starts every tile from there. Rows that are few and long are
cut into segments, at the price of a second walk (`selective_scan_segments`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
import triton
from torch import Tensor

from hf_linear.kernels.autograd import operator
from hf_linear.kernels.launch import cdiv, evenly_spaced, launch, on_device
from hf_linear.kernels.layout import make_layout, row_segments
from hf_linear.kernels.selective_scan_gradients import gradient_kernel
from hf_linear.kernels.selective_scan_segments import between_kernel, segment_kernel
from hf_linear.kernels.selective_scan_tiles import CHANNELS, TILE, TILES, numbers_kernel
from hf_linear.kernels.selective_scan_walk import walk_kernel

LOG2_E = 1.4426950408889634
STATES = 2  # that the gradients take at a time: what the registers of a thread hold of a tile
ROWS, PART = 64, 1024
OPTIONS = {"num_warps": CHANNELS // 32, "num_stages": 1}


class Scan:
    """One call's tensors and launches."""

    def __init__(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        dt_bias: Tensor | None, dt_softplus: bool, cu_seqlens: Tensor | None,
    ):  # fmt: skip
        self.batch, self.T, self.width = x.shape
        self.N, self.NP = A.shape[1], max(triton.next_power_of_2(A.shape[1]), STATES)
        self.x, self.dt, self.z = evenly_spaced(x), evenly_spaced(dt), None if z is None else evenly_spaced(z)
        self.A = torch.mul(A.float().T, LOG2_E, out=A.new_empty(self.N, self.width, dtype=torch.float32))
        self.BC = side_by_side(B, C, self.NP)
        self.D, self.bias = (self.A.new_zeros(self.width) if y is None else y.float().contiguous() for y in (D, dt_bias))
        self.layout = make_layout(self.batch, self.T, cu_seqlens)
        self.blocks = cdiv(self.width, CHANNELS)
        self.parts, self.segment_blocks = row_segments(self.layout, self.layout.rows * self.blocks, x.device)
        self.segments = self.layout.rows * self.parts
        self.shape = {"WIDTH": self.width, "N": self.N, "NP": self.NP, "BD": CHANNELS}
        # All that compiled kernels depend on, besides what a launch adds.
        self.common = {
            **self.shape, "DT_STRIDE": self.dt.stride(1), "Z_STRIDE": 0 if self.z is None else self.z.stride(1),
            "SOFTPLUS": dt_softplus, "PACKED": self.layout.packed,
            "PRECISE": x.dtype == torch.float32, **OPTIONS,
        }  # fmt: skip
        self.signature = (self.x.dtype, self.dt.dtype, None if self.z is None else self.z.dtype, *self.common.values())

    def sizes(self, given: Tensor | None) -> tuple[int, ...]:
        return self.T, self.layout.row_blocks, self.segment_blocks, self.parts, int(given is not None)

    def launch(self, kernel: Callable, signature: Hashable, args: tuple, **constants: int | bool | str) -> None:
        grid = (self.blocks, self.segments)
        launch(
            kernel, grid, (self.signature, signature, *constants.values()), args, lambda: {**self.common, **constants}
        )  # fmt: skip

    def new_state(self, like: Tensor | None) -> Tensor:
        return self.layout.new_state(like, self.x, self.N, self.width)

    def new_parts(self, *shape: int) -> Tensor:
        return self.x.new_empty(self.segments, *shape, dtype=torch.float32)

    def between(self, back: bool, v: Tensor, edge: Tensor | None) -> Tensor:
        """[segments, N, D]: of several segments a row, the state that enters each, or the gradient of that which leaves it."""
        added = self.new_parts(self.N, self.width)
        if self.parts > 1:
            total = self.new_parts(self.width)
            self.launch(
                segment_kernel, v.dtype,
                (v, self.dt, self.A, self.BC, self.z, self.bias, absent(edge, added), added, total, self.layout.table,
                 *self.sizes(edge)),
                V_STRIDE=v.stride(1), BACK=back, GATE=back and self.z is not None,
            )  # fmt: skip
            launch(
                between_kernel, (cdiv(added[0].numel(), PART), self.layout.rows), (self.width, self.N, back),
                (self.A, added, total, self.parts), lambda: {"WIDTH": self.width, "N": self.N, "PART": PART, "BACK": back},
            )  # fmt: skip
        return added

    def forward(self, initial: Tensor | None, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
        y, final = self.x.new_empty(self.x.shape), self.new_state(initial)
        states = new_states(self.x, self.N, self.layout.blocks if keep else 0)
        self.launch(
            walk_kernel, None,
            (
                self.x, self.dt, self.A, self.BC, self.D, self.z, self.bias, y, absent(initial, final), final,
                self.between(False, self.x, initial), states, self.layout.table, *self.sizes(initial),
            ),
            X_STRIDE=self.x.stride(1), GATE=self.z is not None, KEEP=keep,
        )  # fmt: skip
        return y, final, states

    def backward(self, dy: Tensor, d_final: Tensor | None, states: Tensor) -> tuple[Tensor, ...]:
        """The gradients of x, dt, A, B, C, D, z, the bias and the initial state."""
        dy = dy.contiguous()
        dx, ddt = self.x.new_empty(self.x.shape), self.dt.new_empty(self.dt.shape)
        dz = dx if self.z is None else self.z.new_empty(self.z.shape)
        d_initial, tokens = self.new_state(d_final), self.batch * self.T
        dA = self.new_parts(self.N, self.width).zero_()
        dD, dbias = self.new_parts(self.width), self.new_parts(self.width)
        dBC = self.x.new_empty(self.blocks, tokens, self.NP, 2, dtype=torch.float32)
        self.launch(
            gradient_kernel, (dy.dtype, states.dtype),
            (
                self.x, self.dt, self.A, self.BC, self.D, self.z, self.bias, states, dy, absent(d_final, d_initial),
                d_initial, dx, ddt, dz, dA, dBC, dD, dbias, self.between(True, dy, d_final), self.layout.table,
                *self.sizes(d_final), tokens,
            ),
            NS=STATES, X_STRIDE=self.x.stride(1), GATE=self.z is not None,
        )  # fmt: skip
        dB, dC = dBC.sum(0).view(self.batch, self.T, self.NP, 2)[..., : self.N, :].unbind(-1)
        return dx, ddt, dA.sum(0).T, dB, dC, dD.sum(0), dz, dbias.sum(0), d_initial


def side_by_side(B: Tensor, C: Tensor, NP: int) -> Tensor:
    """[tokens + TILE, NP, 2] float32, zeros from N on."""
    B, C, (batch, T, N) = evenly_spaced(B), evenly_spaced(C), B.shape
    BC = B.new_empty(batch * T + TILE.value, NP, 2, dtype=torch.float32)
    launch(
        numbers_kernel, (cdiv(len(BC), ROWS),), (B.dtype, C.dtype, N),
        (B, C, BC, batch * T, B.stride(1), C.stride(1)), lambda: {"N": N, "NP": NP, "ROWS": ROWS},
    )  # fmt: skip
    return BC


def absent(x: Tensor | None, instead: Tensor) -> Tensor:
    """A pointer that is never followed, for a tensor that is not there."""
    return instead if x is None else x


def new_states(x: Tensor, N: int, blocks: int) -> Tensor:
    """The state before every tile. float16, which has no larger numbers, is not for states."""
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    return x.new_empty(blocks * TILES.value, N, x.shape[2], dtype=dtype)


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool, initial_state: Tensor | None, cu_seqlens: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y [batch, T, D] in x's dtype, the final state [documents, D, N] float32, and with `keep` what the gradients need."""
    initial = None if initial_state is None else initial_state.transpose(1, 2).contiguous()
    with on_device(x):
        y, final, states = Scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, cu_seqlens).forward(initial, keep)
    return y, final.transpose(1, 2).contiguous(), states


def backward(
    dy: Tensor, d_final: Tensor | None, states: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, dt, A, B, C, D, z, dt_bias and the initial state; empty where there is no such input."""
    d_final = None if d_final is None else d_final.transpose(1, 2).contiguous()
    with on_device(x):
        scan = Scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, cu_seqlens)
        *gradients, d_initial = scan.backward(dy, d_final, states)
    inputs = x, dt, A, B, C, D, z, dt_bias
    found = (x.new_empty(0) if y is None else dy.to(y.dtype).contiguous() for y, dy in zip(inputs, gradients, strict=True))
    return *found, d_initial.transpose(1, 2).contiguous()


def new_final(x: Tensor, A: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, *A.shape, dtype=torch.float32)


def fake(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens, keep):
    T, block = x.shape[1], TILE.value * TILES.value
    blocks = x.shape[0] * cdiv(T, block) if cu_seqlens is None else T // block + cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), new_final(x, A, cu_seqlens), new_states(x, A.shape[1], blocks if keep else 0)


def fake_backward(dy, d_final, states, x, dt, A, B, C, D, z, dt_bias, dt_softplus, cu_seqlens):
    inputs = x, dt, A, B, C, D, z, dt_bias
    return *(x.new_empty(0) if y is None else y.new_empty(y.shape) for y in inputs), new_final(x, A, cu_seqlens)


def save(ctx, inputs, output) -> None:
    *tensors, ctx.softplus, _, cu_seqlens, _ = inputs
    ctx.save_for_backward(*tensors, cu_seqlens, output[2])
    ctx.mark_non_differentiable(output[2])


def differentiate(backward: Callable, ctx, dy: Tensor | None, d_final: Tensor | None, _: Tensor | None):
    *tensors, cu_seqlens, states = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    *gradients, d_initial = backward(dy, d_final, states, *tensors, ctx.softplus, cu_seqlens)
    found = (None if y is None else dy for y, dy in zip(tensors, gradients, strict=True))
    return *found, None, d_initial if ctx.needs_input_grad[9] else None, None, None


run = operator("selective_scan_triton", forward, backward, (fake, fake_backward), save, differentiate)


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool, initial_state: Tensor | None, cu_seqlens: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y, final, _ = run(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens, keep)
    return y, final
