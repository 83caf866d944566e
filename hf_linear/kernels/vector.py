"""Linear attention with a decay a key channel: the launches, forward and backward.

Forward: scores within chunks (`vector_scores`), then one walk of the state over them (`vector_walk`). Backward: the scores
again, a walk forward that keeps a state a block, a walk backward that writes dv and keeps the state's gradient a chunk, and
then all chunks in parallel (`vector_gradients`). Nothing but the inputs is kept for the backward pass.

Where rows, heads and tiles of V are too few to fill the GPU, rows are cut into segments: each adds up what it contributes to
the state, a scan over the segments gives the state that enters each, and the walks start from there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_linear.kernels.launch import cdiv, launch, multiprocessors, product_precision, ready
from hf_linear.kernels.layout import make_layout, row_segments
from hf_linear.kernels.vector_gradients import FLAGS, exact_gradient_kernel, mild_gradient_kernel
from hf_linear.kernels.vector_scores import CHUNK, MILD, scores_kernel
from hf_linear.kernels.vector_walk import scan_kernel, walk_kernel


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] and the final state [N, H, K, V]; q, k [B, T, H, K], v [B, T, H, V], g [B, T, H, K]."""
    run = Chunks(q, k, v, g, scale, cu_seqlens)
    out = v.new_empty(v.shape)
    final = run.new_state(initial_state)
    run.walk(run.v, out=out, initial=initial_state, final=final)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of q, k, v, g (None unless needed) and the initial state (None where there is none)."""
    run = Chunks(q, k, v, g, scale, cu_seqlens)
    states, d_states = run.new_states(a_block=1), run.new_states(a_block=2)
    dv, d_initial = v.new_empty(v.shape), None if initial_state is None else run.new_state(d_final)
    do = ready(do)
    run.walk(run.v, states=states, initial=initial_state)
    run.walk(do, backwards=True, out=dv, states=d_states, initial=d_final, final=d_initial)
    dq, dk, dg = run.gradients(do, states, d_states, needs_dg)
    return dq, dk, dv, dg, d_initial


class Chunks:
    """One call's tensors and launches."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, cu_seqlens: Tensor | None):
        B, T, self.H, self.K = q.shape
        self.V, self.scale, self.mild = v.shape[-1], scale, MILD[v.dtype]
        self.q, self.k, self.v, self.g = ready(q), ready(k), ready(v), ready(g)
        self.layout = make_layout(B, T, cu_seqlens)
        self.KP = next(width for width in (64, 128, 256) if self.K <= width)
        self.VP = cdiv(self.V, 64) * 64
        self.common = {
            "K": self.K, "KP": self.KP, "PACKED": self.layout.packed, "PRECISION": product_precision(v.dtype),
        }  # fmt: skip
        chunks, H = 2 * self.layout.blocks, self.H
        self.x, self.z = v.new_empty(2, chunks, H, CHUNK.value, self.KP)
        self.scores = v.new_empty(chunks, H, CHUNK.value, CHUNK.value)
        self.total = v.new_empty(chunks, H, self.KP, dtype=torch.float32)
        # All that compiled kernels depend on, besides what a launch adds.
        self.signature = (v.dtype, self.K, self.V, self.layout.packed)
        # Without a mild form, which sets them, all chunks are exact.
        self.strong = (torch.empty if self.mild else torch.ones)(chunks, H, dtype=torch.int8, device=v.device)
        for exact in self.forms():
            launch(
                scores_kernel, (chunks, H), (self.signature, exact),
                (
                    self.q, self.k, self.g, self.x, self.z, self.scores, self.total, self.strong, self.layout.table,
                    scale, self.mild, T, self.layout.row_blocks, H,
                ), lambda exact=exact: {"EXACT": exact, **self.common, **score_tile(v.dtype, exact)},
            )  # fmt: skip

    def forms(self) -> tuple[bool, ...]:
        """The values of EXACT to launch."""
        return (False, True) if self.mild else (True,)

    def new_state(self, like: Tensor | None) -> Tensor:
        return self.layout.new_state(like, self.v, self.H, self.K, self.V)

    def new_states(self, a_block: int) -> Tensor:
        return self.v.new_empty(a_block * self.layout.blocks, self.H, self.VP, self.KP)

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
        programs = layout.rows * H * (VP // walk_tile(KP, y.dtype, out is not None)["BV"])
        segments, blocks = row_segments(layout, programs, y.device)
        x, z = (self.z, self.x) if backwards else (self.x, self.z)
        initial = None if initial is None else ready(initial)
        absent = self.total  # a pointer that is never followed

        def walk_segments(out=None, states=None, entering=None, leaving=None, passed=None, initial=None, final=None) -> None:
            optional = (states, entering, leaving, passed, initial, final)
            tile = walk_tile(KP, y.dtype, out is not None)
            tiles = VP // tile["BV"] * (KP // (tile["BK"] * tile["BLOCKS"]))
            transposed = backwards and out is not None
            kind = {"OUTPUT": out is not None, "TRANSPOSED": transposed, "INITIAL": layout.packed and initial is not None}
            launch(
                walk_kernel, (tiles, layout.rows * segments, H), (self.signature, *kind.values()),
                (
                    x, z, y, self.scores, self.total, y if out is None else out, x if states is None else states,
                    *[absent if tensor is None else tensor for tensor in optional[1:]], layout.table,
                    layout.T, layout.row_blocks, blocks, segments, H, int(backwards), *[int(t is not None) for t in optional],
                ),
                lambda: {**kind, "V": self.V, "VP": VP, **self.common, **tile},
            )  # fmt: skip

        if segments == 1:
            ends = {"initial": initial, "final": final} if layout.packed else {"entering": initial, "leaving": final}
            walk_segments(out=out, states=states, **ends)
            return
        between = y.new_empty(layout.rows * segments, H, self.K, self.V, dtype=torch.float32)
        passed = y.new_empty(layout.rows * segments, H, KP, dtype=torch.float32)
        documents = {"initial": initial, "final": final}
        rows = {"initial": None, "final": None}
        if not layout.packed:
            documents, rows = rows, documents
        walk_segments(leaving=between, passed=passed, initial=documents["initial"])
        launch(
            scan_kernel, (VP // SCAN_TILE["BV"], KP // SCAN_TILE["BK"], layout.rows * H), self.signature,
            (
                between, passed, *[absent if tensor is None else tensor for tensor in rows.values()],
                segments, H, int(backwards), *[int(tensor is not None) for tensor in rows.values()],
            ), lambda: {"K": self.K, "KP": KP, "V": self.V, "PRECISION": self.common["PRECISION"], **SCAN_TILE},
        )  # fmt: skip
        walk_segments(out=out, states=states, entering=between, **documents)

    def gradients(self, do: Tensor, states: Tensor, d_states: Tensor, needs_dg: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        layout, H, chunks = self.layout, self.H, 2 * self.layout.blocks
        dq, dk = self.q.new_empty(self.q.shape), self.k.new_empty(self.k.shape)
        dg = self.g.new_empty(self.g.shape) if needs_dg else None
        results = (dq, dk, dq if dg is None else dg, layout.table)
        constants = {"DG": needs_dg, "V": self.V, "VP": self.VP, **self.common}
        if self.mild:
            tile = gradient_tile(self.v.dtype, exact=False)
            launch(
                mild_gradient_kernel, (self.KP // tile["BK"], chunks, H), (self.signature, needs_dg),
                (
                    self.v, do, self.g, self.x, self.z, self.total, self.strong, states, d_states, *results,
                    self.scale, layout.T, layout.row_blocks, H,
                ), lambda: {**constants, **tile},
            )  # fmt: skip
        tile = gradient_tile(self.v.dtype, exact=True)
        # Programs that mostly find nothing to do; but where few are needed, or all have work, one for each chunk.
        enough = 8 * multiprocessors(do.device)
        together = min(max(self.KP // tile["BK"] * chunks * H // enough, 1), FLAGS.value) if self.mild else 1
        launch(
            exact_gradient_kernel, (self.KP // tile["BK"], cdiv(chunks, together), H), (self.signature, needs_dg),
            (
                self.q, self.k, self.v, do, self.g, self.z, self.total, self.strong, states, d_states, *results,
                self.scale, layout.T, layout.row_blocks, chunks, together, H,
            ), lambda: {**constants, **tile},
        )  # fmt: skip
        return dq, dk, dg


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


def gradient_tile(dtype: torch.dtype, exact: bool) -> dict[str, int]:
    if dtype == torch.float32:
        return {"BK": 32, "BV": 32, "num_warps": 8, "num_stages": 1}
    return {"BK": 64, "BV": 64, "num_warps": 8 if exact else 4, "num_stages": 3}


SCAN_TILE = {"BK": 64, "BV": 32}
