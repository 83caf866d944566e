"""Linear attention with a decay a head or a decay a key channel, in chunks: the launches, forward and backward.

Forward: scores within chunks (`scores`), then one walk of the state over them (`walk`). Backward: the scores again, a walk
forward that keeps a state a pair of chunks, a walk backward that writes dv and keeps the state's gradient a pair, and then
all chunks in parallel (`gradients`). Nothing but the inputs is kept for the backward pass.

Where rows, heads and tiles of V are too few to fill the GPU, rows are cut into segments: each adds up what it contributes to
the state, a scan over the segments gives the state that enters each, and the walks start from there.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from hf_linear.kernels.gradients import gradient_kernel
from hf_linear.kernels.layout import CHUNK, Layout, make_layout
from hf_linear.kernels.scores import MILD, scalar_kernel, vector_kernel
from hf_linear.kernels.walk import scan_kernel, walk_kernel

PAIRS_A_SEGMENT = 4  # at least: shorter ones spend more on their states than they gain


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """o and the final state [N, H, K, V]. q, k [B, T, H, K], v [B, T, H, V], g [B, T, H, K] or [B, T, H]."""
    run = Chunks(q, k, v, g, scale, cu_seqlens)
    out = v.new_empty(v.shape)
    final = run.new_state(initial_state)
    run.walk(run.v, out=out, initial=contiguous(initial_state), final=final)
    return out, final


def backward(
    do: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    needs_dg: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """The gradients of q, k, v, g (None unless needed) and the initial state."""
    run = Chunks(q, k, v, g, scale, cu_seqlens)
    states, d_states = run.new_pair_states(), run.new_pair_states()
    dv, d_initial = v.new_empty(v.shape), run.new_state(d_final)
    do, d_final = do.contiguous(), contiguous(d_final)
    run.walk(run.v, states=states, initial=contiguous(initial_state))
    run.walk(do, backwards=True, out=dv, states=d_states, initial=d_final, final=d_initial)
    return *run.gradients(do, states, d_states, needs_dg), dv, d_initial


class Chunks:
    """One call's tensors and launches."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, cu_seqlens: Tensor | None):
        B, T, self.H, self.K = q.shape
        self.V, self.tokens, self.scale = v.shape[-1], B * T, scale
        q, k, v = self.q, self.k, self.v = q.contiguous(), k.contiguous(), v.contiguous()
        if g.dim() == 4 or (B > 1 and g.stride(0) != T * g.stride(1)):  # tokens are counted over all rows
            g = g.contiguous()
        self.g, self.vector, self.mild = g, g.dim() == 4, MILD[v.dtype]
        self.layout: Layout = make_layout(B, T, cu_seqlens)
        self.KP = next(width for width in (64, 128, 256) if self.K <= width)
        self.VP = triton.cdiv(self.V, 64) * 64
        self.common = {
            "K": self.K, "KP": self.KP, "PACKED": self.layout.packed,
            "PRECISION": "tf32x3" if v.dtype == torch.float32 else "tf32",  # the latter concerns no other dtype
        }  # fmt: skip
        chunks, H = self.layout.chunks, self.H
        self.x, self.z = v.new_empty(2, chunks, H, CHUNK.value, self.KP)
        self.scores = v.new_empty(chunks, H, CHUNK.value, CHUNK.value)
        self.total = v.new_empty(chunks, H, self.KP, dtype=torch.float32)
        tensors = (q, k, g, self.x, self.z, self.scores, self.total)
        sizes = (T, self.layout.row_pairs, H)
        if self.vector:
            # Without a mild form all chunks are exact.
            strong = torch.full((chunks, H), 1, dtype=torch.int8, device=v.device)
            for exact in self.forms():
                vector_kernel[(chunks, H)](
                    *tensors, strong, self.layout.table, scale, self.mild, *sizes,
                    EXACT=exact, **self.common, **score_tile(v.dtype, exact),
                )  # fmt: skip
        else:
            scalar_kernel[(chunks, H)](
                *tensors, self.layout.table, scale, *sizes, g.stride(1), g.stride(2),
                **self.common, **score_tile(v.dtype, False),
            )  # fmt: skip

    def forms(self) -> tuple[bool, ...]:
        """The values of EXACT to launch."""
        return (False, True) if self.mild else (True,)

    def new_state(self, like: Tensor | None) -> Tensor:
        """A state to write; that of a document without tokens stays what it was."""
        shape = (self.layout.documents, self.H, self.K, self.V)
        if not self.layout.packed:
            return self.v.new_empty(shape, dtype=torch.float32)
        return (
            self.v.new_zeros(shape, dtype=torch.float32) if like is None else like.clone(memory_format=torch.contiguous_format)
        )

    def new_pair_states(self) -> Tensor:
        return self.v.new_empty(self.layout.rows * self.layout.row_pairs, self.H, self.VP, self.KP)

    def walk(
        self,
        y: Tensor,
        backwards: bool = False,
        out: Tensor | None = None,
        states: Tensor | None = None,
        initial: Tensor | None = None,
        final: Tensor | None = None,
    ) -> None:
        """Walk all rows in one direction, through segments where there are few of them."""
        layout, H, KP, VP = self.layout, self.H, self.KP, self.VP
        tile = walk_tile(KP, y.dtype, out is not None)
        segments, pairs = self.segments(layout.rows * H * (VP // tile["BV"]))
        x, z = (self.z, self.x) if backwards else (self.x, self.z)
        absent = self.total  # a pointer that is never followed

        def launch(out=None, states=None, entering=None, leaving=None, passed=None, initial=None, final=None) -> None:
            optional = (states, entering, leaving, passed, initial, final)
            tile = walk_tile(KP, y.dtype, out is not None)
            tiles = VP // tile["BV"] * (KP // (tile["BK"] * tile["BLOCKS"]))
            walk_kernel[(tiles, layout.rows * segments, H)](
                x, z, y, self.scores, self.total, y if out is None else out, x if states is None else states,
                *(absent if tensor is None else tensor for tensor in optional[1:]), layout.table,
                layout.T, layout.row_pairs, pairs, segments, H, int(backwards), *(int(t is not None) for t in optional),
                OUTPUT=out is not None, TRANSPOSED=backwards and out is not None, V=self.V, VP=VP, **self.common, **tile,
            )  # fmt: skip

        if segments == 1 and not layout.packed:
            launch(out=out, states=states, entering=initial, leaving=final)
            return
        between = y.new_empty(layout.rows * segments, H, self.K, self.V, dtype=torch.float32)
        passed = y.new_empty(layout.rows * segments, H, KP, dtype=torch.float32)
        documents = {"initial": initial, "final": final}
        rows = {"initial": None, "final": None}
        if not layout.packed:
            documents, rows = rows, documents
        launch(leaving=between, passed=passed, initial=documents["initial"])
        scan_kernel[(VP // SCAN_TILE["BV"], KP // SCAN_TILE["BK"], layout.rows * H)](
            between, passed, *(absent if tensor is None else tensor for tensor in rows.values()), segments, H, int(backwards),
            *(int(tensor is not None) for tensor in rows.values()),
            K=self.K, KP=KP, V=self.V, PRECISION=self.common["PRECISION"], **SCAN_TILE,
        )  # fmt: skip
        launch(out=out, states=states, entering=between, **documents)

    def segments(self, programs: int) -> tuple[int, int]:
        """How many segments a row is cut into, and the pairs of chunks in each.

        Segments cost a second pass over the keys and values, so only where a quarter of the GPU would idle without them.
        """
        processors = multiprocessors(self.v.device)
        count = 1 if 4 * programs >= 3 * processors else 2 * processors // programs
        count = min(count, max(self.layout.row_pairs // PAIRS_A_SEGMENT, 1))
        pairs = triton.cdiv(self.layout.row_pairs, count)
        return triton.cdiv(self.layout.row_pairs, pairs), pairs

    def gradients(self, do: Tensor, states: Tensor, d_states: Tensor, needs_dg: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        layout, H, g, tile = self.layout, self.H, self.g, gradient_tile(self.v.dtype)
        dq, dk, dg = self.q.new_empty(self.q.shape), self.k.new_empty(self.k.shape), None
        if needs_dg:
            dg = g.new_empty(g.shape) if self.vector else g.new_empty(self.KP // tile["BK"], *g.shape, dtype=torch.float32)
        strides = (0, 0) if self.vector else (g.stride(1), g.stride(2))
        for exact in self.forms() if self.vector else (False,):
            gradient_kernel[(self.KP // tile["BK"], layout.rows * layout.row_pairs, H)](
                self.q, self.k, self.v, do, g, self.total, states, d_states, dq, dk, dg, layout.table,
                self.scale, self.mild, layout.T, layout.row_pairs, H, self.tokens, *strides,
                V=self.V, VP=self.VP, VECTOR=self.vector, EXACT=exact, DG=needs_dg, **self.common, **tile,
            )  # fmt: skip
        if dg is not None and not self.vector:
            dg = dg.sum(0).to(g.dtype)
        return dq, dk, dg


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


# Products of float32 take three of tf32, and their factors twice the memory: smaller tiles.
def score_tile(dtype: torch.dtype, exact: bool) -> dict[str, int]:
    single = dtype == torch.float32
    return {"BK": 32 if exact or single else 64, "num_warps": 8 if exact and single else 4}


def walk_tile(KP: int, dtype: torch.dtype, output: bool) -> dict[str, int]:
    BK, single = min(KP, 128), dtype == torch.float32
    if not output:
        return {"BK": BK, "BLOCKS": 1, "BV": 32 if single else 64, "num_warps": 4, "num_stages": 1 if single else 3}
    BV = 32 if KP > 128 or single else 64
    return {"BK": BK, "BLOCKS": KP // BK, "BV": BV, "num_warps": 4, "num_stages": 1 if single else 2}


def gradient_tile(dtype: torch.dtype) -> dict[str, int]:
    if dtype == torch.float32:
        return {"BK": 32, "BV": 32, "num_warps": 8, "num_stages": 1}
    return {"BK": 64, "BV": 64, "num_warps": 8, "num_stages": 3}


SCAN_TILE = {"BK": 64, "BV": 32}


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
