"""The short causal convolution, its bias and SiLU, forward and backward, and one token of it in place.

    p_t = b + sum_{j < W} w_j x_{t-j},        y_t = silu(p_t) or p_t
    g_t = dy_t silu'(p_t),    dx_t = sum_j w_j g_{t+j},    dw_j = sum_t g_t x_{t-j},    db = sum_t g_t

The backward pass keeps the inputs alone and computes p again, W times for each token: that costs less than to read it.

grid     (D / 256, blocks of 128 tokens), in tiles of 4 tokens: 8 numbers a thread, 16 bytes of half precision
dtypes   x and y as they are, taps and bias and all arithmetic float32
traffic  forward x and y once, backward x, dy and dx once; what tiles share comes from the L1. Partial sums of dw, one a block of 128
         tokens, are added up afterwards: no atomics, the same bits every run
oracle   hf_linear.ops.reference.short_conv
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_linear.kernels.launch import cdiv, evenly_spaced, launch, on_device, ready
from hf_linear.kernels.layout import BLOCK, FIELDS, locate, make_layout
from hf_linear.kernels.selective_scan_tiles import sigmoid

ROWS, CHANNELS = 4, 256  # of a tile
RUN_TIME = ("T", "row_blocks", "given")


@triton.jit
def place(block, T, row_blocks, table, PACKED: tl.constexpr):
    """A block's first token and tokens, the tokens of its document before and from it on (those that taps reach), its document."""
    start, length = locate(block, T, row_blocks, table, PACKED, 1)
    if PACKED:
        mark = tl.load(table + block * FIELDS + 3)
        behind = tl.where((mark & 1) != 0, 0, BLOCK)
        goes_on = (length > 0) & ((mark & 2) == 0)
        following = tl.load(table + (block + 1) * FIELDS + 1, goes_on, 0)
        return start, length, behind, length + following, tl.load(table + block * FIELDS + 2).to(tl.int64)
    behind = (block % row_blocks) * BLOCK
    return start, length, behind, T - behind, (block // row_blocks).to(tl.int64)


@triton.jit
def inputs_at(
    x, state, i, start, behind, ahead, document, given, d, WIDTH: tl.constexpr, STRIDE: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """The inputs i places after a block's first token: of the document, of the state before it, or 0 behind its end."""
    in_x = (i >= -behind) & (i < ahead)
    found = tl.load(
        x + start * STRIDE + (i * STRIDE)[:, None] + d[None, :], in_x[:, None] & (d < WIDTH)[None, :], 0.0
    ).to(tl.float32)  # fmt: skip
    if (behind < W) & (given != 0):
        row = i + behind + (W - 1)
        in_state = (row >= 0) & (row < W - 1)
        at = state + document * ((W - 1) * WIDTH) + row[:, None] * WIDTH + d[None, :]
        found += tl.load(at, in_state[:, None] & (d < WIDTH)[None, :], 0.0).to(tl.float32)
    return found


@triton.jit(do_not_specialize=RUN_TIME)
def forward_kernel(
    x, w, b, y, initial, final, table, T, row_blocks, given,
    WIDTH: tl.constexpr, STRIDE: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    SILU: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """x, y: [tokens, WIDTH], x with a stride of its own; w: [W, WIDTH]; initial, final: [documents, W - 1, WIDTH]."""
    block = tl.program_id(1)
    start, length, behind, ahead, document = place(block, T, row_blocks, table, PACKED)
    d, i = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, BT)
    in_d = d < WIDTH
    b_ = tl.load(b + d, in_d, 0.0)[None, :]
    for tile in range(0, tl.cdiv(length, BT)):
        t = i + tile * BT
        p = tl.zeros((BT, BD), tl.float32) + b_
        for j in tl.static_range(W):
            w_j = tl.load(w + (W - 1 - j) * WIDTH + d, in_d, 0.0)[None, :]
            p += w_j * inputs_at(x, initial, t - j, start, behind, ahead, document, given, d, WIDTH, STRIDE, W)
        if SILU:
            p *= sigmoid(p)
        to = y + start * WIDTH + (t * WIDTH)[:, None] + d[None, :]
        tl.store(to, p.to(y.dtype.element_ty), (t < length)[:, None] & in_d[None, :])
    if (ahead == length) & (length > 0):  # the document ends here
        for s in range(0, W - 1, BT):
            last = inputs_at(
                x, initial, length - (W - 1) + s + i, start, behind, ahead, document, given, d, WIDTH, STRIDE, W
            )  # fmt: skip
            to = final + document * ((W - 1) * WIDTH) + ((s + i) * WIDTH)[:, None] + d[None, :]
            tl.store(to, last.to(final.dtype.element_ty), (s + i < W - 1)[:, None] & in_d[None, :])


@triton.jit
def gradients_at(p, dy, i, start, behind, ahead, d, WIDTH: tl.constexpr, SILU: tl.constexpr):
    """g of the tokens i places after a block's first: 0 before and behind their document."""
    inside = ((i >= -behind) & (i >= 0) & (i < ahead))[:, None] & (d < WIDTH)[None, :]
    g = tl.load(dy + start * WIDTH + (i * WIDTH)[:, None] + d[None, :], inside, 0.0).to(tl.float32)
    if SILU:
        gate = sigmoid(p)
        g *= gate * (1 + p * (1 - gate))
    return g


@triton.jit
def returned(d_final, i, behind, ahead, document, given, d, WIDTH: tl.constexpr, W: tl.constexpr):
    """What inputs i places after a block's first token get from the final state, which holds the last W - 1 of a document."""
    row = i - ahead + (W - 1)
    inside = ((row >= 0) & (row < W - 1) & (given != 0))[:, None] & (d < WIDTH)[None, :]
    at = d_final + document * ((W - 1) * WIDTH) + row[:, None] * WIDTH + d[None, :]
    return tl.load(at, inside, 0.0).to(tl.float32)


@triton.jit(do_not_specialize=(*RUN_TIME, "returns"))
def backward_kernel(
    x, w, b, dy, initial, d_final, dx, d_initial, dw, db, table, T, row_blocks, given, returns,
    WIDTH: tl.constexpr, STRIDE: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    SILU: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dy, dx: [tokens, WIDTH]; dw: [blocks, W, WIDTH]; db: [blocks, WIDTH]; d_final, d_initial: [documents, W - 1, WIDTH].

    A document's first block goes W - 1 places further back, for the inputs that the initial state holds.
    """
    block = tl.program_id(1)
    start, length, behind, ahead, document = place(block, T, row_blocks, table, PACKED)
    d, i = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, BT)
    in_d = d < WIDTH
    b_ = tl.load(b + d, in_d, 0.0)[None, :]
    sums = ()
    for j in tl.static_range(W + 1):
        sums = sums + (tl.zeros((BT, BD), tl.float32),)
    before: tl.constexpr = (W - 1 + BT - 1) // BT
    for tile in range(tl.where(behind == 0, -before, 0), tl.cdiv(length, BT)):
        t = i + tile * BT
        xs = ()
        for j in tl.static_range(2 * W - 1):  # x at t - (W - 1) to t + (W - 1)
            xs = xs + (inputs_at(x, initial, t + (j - (W - 1)), start, behind, ahead, document, given, d, WIDTH, STRIDE, W),)
        dx_ = returned(d_final, t, behind, ahead, document, returns, d, WIDTH, W)
        new = ()
        for j in tl.static_range(W):
            p = tl.zeros((BT, BD), tl.float32) + b_
            if SILU:
                for k in tl.static_range(W):
                    p += tl.load(w + (W - 1 - k) * WIDTH + d, in_d, 0.0)[None, :] * xs[W - 1 + j - k]
            g = gradients_at(p, dy, t + j, start, behind, ahead, d, WIDTH, SILU)
            dx_ += tl.load(w + (W - 1 - j) * WIDTH + d, in_d, 0.0)[None, :] * g
            if j == 0:
                own = tl.where((t < length)[:, None], g, 0.0)
                for k in tl.static_range(W):
                    new = new + (sums[k] + own * xs[W - 1 - k],)
                new = new + (sums[W] + own,)
        sums = new
        inside = in_d[None, :] & ((t >= 0) & (t < length))[:, None]
        tl.store(dx + start * WIDTH + (t * WIDTH)[:, None] + d[None, :], dx_.to(dx.dtype.element_ty), inside)
        row = t + (W - 1)
        in_state = in_d[None, :] & ((t < 0) & (row >= 0) & (length > 0))[:, None]
        to = d_initial + document * ((W - 1) * WIDTH) + (row * WIDTH)[:, None] + d[None, :]
        tl.store(to, dx_.to(d_initial.dtype.element_ty), in_state)
    for k in tl.static_range(W):
        tl.store(dw + (block * W + (W - 1 - k)).to(tl.int64) * WIDTH + d, tl.sum(sums[k], 0), in_d)
    tl.store(db + block.to(tl.int64) * WIDTH + d, tl.sum(sums[W], 0), in_d)


class Convolution:
    """One call's tensors and launches."""

    def __init__(self, x: Tensor, w: Tensor, b: Tensor | None, silu: bool, cu_seqlens: Tensor | None):
        self.batch, T, self.width = x.shape
        self.x, self.W = aligned(x), w.shape[1]
        self.w = w.T.float().contiguous()
        self.b = self.w.new_zeros(self.width) if b is None else ready(b.float())
        self.layout = make_layout(self.batch, T, cu_seqlens)
        self.grid = (cdiv(self.width, CHANNELS), self.layout.blocks)
        self.sizes = (T, self.layout.row_blocks)
        self.constants = {
            "WIDTH": self.width, "STRIDE": self.x.stride(1), "W": self.W, "BT": ROWS, "BD": CHANNELS, "SILU": silu,
            "PACKED": self.layout.packed, "num_warps": 4,
        }  # fmt: skip
        self.signature = (x.dtype, *self.constants.values())

    def new_state(self, like: Tensor | None) -> Tensor:
        """A state to write, of which a document without tokens keeps its own."""
        shape = (self.layout.documents, self.W - 1, self.width)
        return self.x.new_zeros(shape) if like is None else like.clone(memory_format=torch.contiguous_format)

    def forward(self, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        y, final = self.x.new_empty(self.x.shape), self.new_state(initial)
        before = final if initial is None else ready(initial)
        launch(
            forward_kernel, self.grid, self.signature,
            (self.x, self.w, self.b, y, before, final, self.layout.table, *self.sizes, int(initial is not None)),
            lambda: self.constants,
        )  # fmt: skip
        return y, final

    def backward(self, dy: Tensor, d_final: Tensor | None, initial: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradients of x, w, b and the initial state."""
        dx, d_initial = self.x.new_empty(self.x.shape), self.new_state(d_final)
        dw = self.w.new_empty(self.layout.blocks, self.W, self.width)
        db = self.w.new_empty(self.layout.blocks, self.width)
        before, after = (d_initial if state is None else ready(state) for state in (initial, d_final))
        launch(
            backward_kernel, self.grid, self.signature,
            (
                self.x, self.w, self.b, ready(dy), before, after, dx, d_initial, dw, db, self.layout.table, *self.sizes,
                int(initial is not None), int(d_final is not None),
            ), lambda: self.constants,
        )  # fmt: skip
        return dx, dw.sum(0).T, db.sum(0), d_initial


def aligned(x: Tensor) -> Tensor:
    x = evenly_spaced(x)
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def forward(
    x: Tensor, w: Tensor, b: Tensor | None, silu: bool, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y [B, T, D] and the final state [documents, W - 1, D], both in x's dtype."""
    with on_device(x):
        return Convolution(x, w, b, silu, cu_seqlens).forward(initial_state)


def backward(
    dy: Tensor, d_final: Tensor | None, x: Tensor, w: Tensor, b: Tensor | None, silu: bool, initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, w, b (empty if there is none) and the initial state."""
    with on_device(x):
        dx, dw, db, d_initial = Convolution(x, w, b, silu, cu_seqlens).backward(dy, d_final, initial_state)
    return dx, dw.to(w.dtype).contiguous(), x.new_empty(0) if b is None else db.to(b.dtype), d_initial


FORWARD, BACKWARD = "hf_linear::short_conv_triton", "hf_linear::short_conv_triton_backward"
INPUTS = "Tensor x, Tensor w, Tensor? b, bool silu, Tensor? initial_state, Tensor? cu_seqlens"
torch.library.define(FORWARD, f"({INPUTS}) -> (Tensor, Tensor)")
torch.library.define(BACKWARD, f"(Tensor dy, Tensor? d_final, {INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)")
torch.library.impl(FORWARD, ("cpu", "cuda"))(forward)
torch.library.impl(BACKWARD, ("cpu", "cuda"))(backward)


def state_like(x: Tensor, w: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, w.shape[1] - 1, x.shape[2])


@torch.library.register_fake(FORWARD)
def _(x, w, b, silu, initial_state, cu_seqlens):
    return x.new_empty(x.shape), state_like(x, w, cu_seqlens)


@torch.library.register_fake(BACKWARD)
def _(dy, d_final, x, w, b, silu, initial_state, cu_seqlens):
    db = x.new_empty(0) if b is None else b.new_empty(b.shape)
    return x.new_empty(x.shape), w.new_empty(w.shape), db, state_like(x, w, cu_seqlens)


def setup_context(ctx, inputs, output) -> None:
    x, w, b, ctx.silu, initial_state, cu_seqlens = inputs
    ctx.save_for_backward(x, w, b, initial_state, cu_seqlens)
    ctx.set_materialize_grads(False)


def differentiate(backward: Callable, ctx, dy: Tensor | None, d_final: Tensor | None):
    """The gradients by `backward`, the function or the operator."""
    x, w, b, initial_state, cu_seqlens = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, dw, db, d_initial = backward(dy, d_final, x, w, b, ctx.silu, initial_state, cu_seqlens)
    return dx, dw, None if b is None else db, None, d_initial if ctx.needs_input_grad[4] else None, None


torch.library.register_autograd(
    FORWARD, partial(differentiate, torch.ops.hf_linear.short_conv_triton_backward), setup_context=setup_context
)


class ShortConv(torch.autograd.Function):
    """The operator without the dispatcher."""

    @staticmethod
    def forward(ctx, *inputs):
        output = forward(*inputs)
        setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(once_differentiable(partial(differentiate, backward)))


def short_conv(
    x: Tensor, w: Tensor, b: Tensor | None, silu: bool, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    run = torch.ops.hf_linear.short_conv_triton if torch.compiler.is_compiling() else ShortConv.apply
    return run(x, w, b, silu, initial_state, cu_seqlens)
