"""The short causal convolution, its bias and SiLU, forward and backward.

    p_t = b + sum_{j < W} w_j x_{t-j},        y_t = silu(p_t) or p_t
    g_t = dy_t silu'(p_t),    dx_t = sum_j w_j g_{t+j},    dw_j = sum_t g_t x_{t-j},    db = sum_t g_t

A thread has two channels and walks over the tokens of a block, 8 at a time: what a token shares with its neighbours is in its
registers. The backward pass keeps the inputs alone and computes p again.

grid     D / 256 times the blocks of 128 tokens, channels first
dtypes   x, y and the states as they are; taps, bias and all arithmetic float32
traffic  forward x and y once, backward x, dy and dx once; W - 1 tokens more for every 8, from a cache. Partial sums of dw, one
         a block, are added up afterwards: no atomics, the same bits every run
oracle   hf_linear.ops.reference.short_conv
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_linear.kernels.autograd import operator
from hf_linear.kernels.launch import cdiv, evenly_spaced, launch, on_device, ready
from hf_linear.kernels.layout import BLOCK, FIELDS, locate, make_layout
from hf_linear.kernels.selective_scan_tiles import sigmoid

ROWS, CHANNELS = 8, 256  # tokens at a time, channels of a program
RUN_TIME = ("T", "row_blocks", "given", "returns")


@triton.jit
def own_part(WIDTH: tl.constexpr, BD: tl.constexpr):
    """A program's block and channels; on one axis of the grid, for the others end at 65535."""
    of_channels: tl.constexpr = tl.cdiv(WIDTH, BD)
    return tl.program_id(0) // of_channels, tl.program_id(0) % of_channels * BD + tl.arange(0, BD)


@triton.jit
def place(block, T, row_blocks, table, PACKED: tl.constexpr):
    """A block's first token, its tokens, those of its document before and from it on (as far as taps reach), its document."""
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
def load_taps(w, d, in_d, WIDTH: tl.constexpr, W: tl.constexpr):
    """w_0 to w_{W-1}: w [W, WIDTH] has that of the current token last."""
    taps = ()
    for j in tl.static_range(W):
        taps = taps + (tl.load(w + (W - 1 - j) * WIDTH + d, in_d, 0.0),)
    return taps


@triton.jit
def load_inputs(
    x, state, first, behind, ahead, given, d, in_d,
    WIDTH: tl.constexpr, STRIDE: tl.constexpr, W: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The W - 1 inputs before a block's token `first` and COUNT from it on; those before a document are its state's.

    x and state: pointers to the block's first token and to the document's state.
    """
    found = ()
    for j in tl.static_range(W - 1 + COUNT):
        i = first + (j - (W - 1))
        at, inside = x + i * STRIDE, in_d & (i < ahead)
        if j < W - 1:
            in_x = i + behind >= 0
            at = tl.where(in_x, at, state + (i + behind + (W - 1)) * WIDTH)
            inside = inside & (in_x | ((given != 0) & (i + behind + (W - 1) >= 0)))
        found = found + (tl.load(at + d, inside, 0.0).to(tl.float32),)
    return found


@triton.jit
def convolve(taps, inputs, t, b_, W: tl.constexpr):
    p = b_
    for j in tl.static_range(W):
        p += taps[j] * inputs[t + W - 1 - j]
    return p


@triton.jit(do_not_specialize=RUN_TIME)
def forward_kernel(
    x, w, b, y, initial, final, table, T, row_blocks, given,
    WIDTH: tl.constexpr, STRIDE: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
    SILU: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """x, y: [tokens, WIDTH], x with a stride of its own; w: [W, WIDTH]; initial, final: [documents, W - 1, WIDTH]."""
    block, d = own_part(WIDTH, BD)
    start, length, behind, ahead, document = place(block, T, row_blocks, table, PACKED)
    in_d = d < WIDTH
    b_, taps = tl.load(b + d, in_d, 0.0), load_taps(w, d, in_d, WIDTH, W)
    x += start * STRIDE
    y += start * WIDTH
    initial += document * ((W - 1) * WIDTH)
    final += document * ((W - 1) * WIDTH)
    for first in range(0, length, ROWS):
        inputs = load_inputs(x, initial, first, behind, ahead, given, d, in_d, WIDTH, STRIDE, W, ROWS)
        for t in tl.static_range(ROWS):
            p = convolve(taps, inputs, t, b_, W)
            if SILU:
                p *= sigmoid(p, x.dtype.element_ty == tl.float32)
            tl.store(y + (first + t) * WIDTH + d, p.to(y.dtype.element_ty), in_d & (first + t < length))
    if (ahead == length) & (length > 0):  # the document ends here
        inputs = load_inputs(x, initial, length, behind, ahead, given, d, in_d, WIDTH, STRIDE, W, 0)
        for j in tl.static_range(W - 1):
            tl.store(final + j * WIDTH + d, inputs[j].to(final.dtype.element_ty), in_d)


@triton.jit
def returned(d_final, i, ahead, returns, d, inside, WIDTH: tl.constexpr, W: tl.constexpr):
    """What input i of a block gets from the final state, which holds the last W - 1 inputs of a document."""
    row = i - ahead + (W - 1)
    return tl.load(d_final + row * WIDTH + d, inside & (row >= 0) & (returns != 0), 0.0).to(tl.float32)


@triton.jit(do_not_specialize=RUN_TIME)
def backward_kernel(
    x, w, b, dy, initial, d_final, dx, d_initial, dw, db, table, T, row_blocks, given, returns,
    WIDTH: tl.constexpr, STRIDE: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
    SILU: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dy, dx: [tokens, WIDTH]; dw: [blocks, W, WIDTH]; db: [blocks, WIDTH]; d_final, d_initial: [documents, W - 1, WIDTH]."""
    block, d = own_part(WIDTH, BD)
    start, length, behind, ahead, document = place(block, T, row_blocks, table, PACKED)
    in_d = d < WIDTH
    b_, taps = tl.load(b + d, in_d, 0.0), load_taps(w, d, in_d, WIDTH, W)
    x += start * STRIDE
    dy += start * WIDTH
    dx += start * WIDTH
    initial += document * ((W - 1) * WIDTH)
    d_final += document * ((W - 1) * WIDTH)
    d_initial += document * ((W - 1) * WIDTH)
    sums, db_ = (), tl.zeros((BD,), tl.float32)
    for _ in tl.static_range(W):
        sums = sums + (tl.zeros((BD,), tl.float32),)
    for first in range(0, length, ROWS):
        inputs = load_inputs(x, initial, first, behind, ahead, given, d, in_d, WIDTH, STRIDE, W, ROWS + W - 1)
        grads = ()
        for t in tl.static_range(ROWS + W - 1):
            g = tl.load(dy + (first + t) * WIDTH + d, in_d & (first + t < ahead), 0.0).to(tl.float32)
            if SILU:
                p = convolve(taps, inputs, t, b_, W)
                gate = sigmoid(p, x.dtype.element_ty == tl.float32)
                g *= gate * (1 + p * (1 - gate))
            grads = grads + (g,)
        for t in tl.static_range(ROWS):
            inside = in_d & (first + t < length)
            dx_ = returned(d_final, first + t, ahead, returns, d, inside, WIDTH, W)
            own = tl.where(inside, grads[t], 0.0)  # the block behind has those behind this one's end, too
            db_ += own
            new = ()
            for j in tl.static_range(W):
                dx_ += taps[j] * grads[t + j]
                new = new + (sums[j] + own * inputs[t + W - 1 - j],)
            sums = new
            tl.store(dx + (first + t) * WIDTH + d, dx_.to(dx.dtype.element_ty), inside)
        if (behind == 0) & (first == 0):
            for s in tl.static_range(W - 1):
                before = returned(d_final, s - (W - 1), ahead, returns, d, in_d, WIDTH, W)
                for j in tl.static_range(W - 1 - s, W):
                    before += taps[j] * grads[s - (W - 1) + j]
                tl.store(d_initial + s * WIDTH + d, before.to(d_initial.dtype.element_ty), in_d)
    for j in tl.static_range(W):
        tl.store(dw + (block * W + (W - 1 - j)).to(tl.int64) * WIDTH + d, sums[j], in_d)
    tl.store(db + block.to(tl.int64) * WIDTH + d, db_, in_d)


class Convolution:
    """One call's tensors and launches."""

    def __init__(self, x: Tensor, w: Tensor, b: Tensor | None, silu: bool, cu_seqlens: Tensor | None):
        self.batch, T, self.width = x.shape
        self.x, self.W = aligned(x), w.shape[1]
        self.w = w.T.float().contiguous()
        self.b = self.w.new_zeros(self.width) if b is None else ready(b.float())
        self.layout = make_layout(self.batch, T, cu_seqlens)
        self.grid = (cdiv(self.width, CHANNELS) * self.layout.blocks,)
        self.sizes = (T, self.layout.row_blocks)
        self.constants = {
            "WIDTH": self.width, "STRIDE": self.x.stride(1), "W": self.W, "ROWS": ROWS, "BD": CHANNELS, "SILU": silu,
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


def state_like(x: Tensor, w: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, w.shape[1] - 1, x.shape[2])


def fake(x, w, b, silu, initial_state, cu_seqlens):
    return x.new_empty(x.shape), state_like(x, w, cu_seqlens)


def fake_backward(dy, d_final, x, w, b, silu, initial_state, cu_seqlens):
    db = x.new_empty(0) if b is None else b.new_empty(b.shape)
    return x.new_empty(x.shape), w.new_empty(w.shape), db, state_like(x, w, cu_seqlens)


def save(ctx, inputs, output) -> None:
    x, w, b, ctx.silu, initial_state, cu_seqlens = inputs
    ctx.save_for_backward(x, w, b, initial_state, cu_seqlens)


def differentiate(backward: Callable, ctx, dy: Tensor | None, d_final: Tensor | None):
    x, w, b, initial_state, cu_seqlens = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, dw, db, d_initial = backward(dy, d_final, x, w, b, ctx.silu, initial_state, cu_seqlens)
    return dx, dw, None if b is None else db, None, d_initial if ctx.needs_input_grad[4] else None, None


short_conv = operator("short_conv_triton", forward, backward, (fake, fake_backward), save, differentiate)
