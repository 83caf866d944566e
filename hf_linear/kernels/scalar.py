"""Linear attention with no decay, a decay a head, or a decay a head and token: the launches, forward and backward.

The states at the boundaries of blocks of 128 tokens (`scalar_states`), then all blocks in parallel (`scalar_outputs`). The
backward pass computes the states again and keeps nothing but the inputs.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hf_linear.kernels.launch import cdiv, launch, product_precision, ready
from hf_linear.kernels.layout import BLOCK, make_layout, row_segments
from hf_linear.kernels.scalar_decays import WIDTH, decay_gradient_kernel, decays_kernel
from hf_linear.kernels.scalar_outputs import outputs_kernel, whole_outputs_kernel
from hf_linear.kernels.scalar_states import scan_kernel, states_kernel
from hf_linear.kernels.scalar_walk import pairs_kernel, walk_kernel


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] and the final state [N, H, K, V]; q, k [B, T, H, K], v [B, T, H, V], g [B, T, H]."""
    run = Blocks(q, k, v, g, scale, cu_seqlens)
    final = run.new_state(initial_state)
    if run.keeps_state(initial_state):
        return run.walk_outputs(initial_state, final), final
    states = run.new_states()
    run.walk((run.k, run.v, states, initial_state, final))
    return run.outputs(run.q, states, run.k, run.v), final


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
    run = Blocks(q, k, v, g, scale, cu_seqlens)
    q, k, v, do = run.q, run.k, run.v, ready(do)
    states, d_states = run.new_states(), run.new_states()
    d_initial = None if initial_state is None else run.new_state(d_final)
    run.walk((k, v, states, initial_state, None), (q, do, d_states, d_final, d_initial))
    read, left = (run.new_parts(), run.new_parts()) if needs_dg else (None, None)
    dq = run.outputs(do, states, v, k, transposed=True, far=read, own=q)
    if not needs_dg:
        del states  # before dk and dv take memory
    dk = run.outputs(v, d_states, do, q, later=True, transposed=True, far=left, own=k)
    dv = run.outputs(k, d_states, q, do, later=True)
    dg = run.decay_gradient(do, states, d_states, read, left) if needs_dg else None
    return dq, dk, dv, dg, d_initial


class Blocks:
    """One call's tensors and launches."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, cu_seqlens: Tensor | None):
        B, T, self.H, self.K = q.shape
        self.V, self.tokens, self.scale = v.shape[-1], B * T, scale
        self.q, self.k, self.v, self.g = ready(q), ready(k), ready(v), g
        self.KP, self.VP = (padded(width) for width in (self.K, self.V))
        self.layout = make_layout(B, T, cu_seqlens)
        self.sizes = (T, self.layout.row_blocks, self.H)
        # All that compiled kernels depend on, besides what a launch adds.
        self.signature = (v.dtype, self.K, self.V, self.layout.packed)
        self.packed = {"PACKED": self.layout.packed}
        self.common = {**self.packed, "PRECISION": product_precision(v.dtype)}
        if g.data_ptr() % 16 or (B > 1 and g.stride(0) != T * g.stride(1)):  # tokens are counted over all rows
            g = ready(g)
        self.decays = v.new_empty(self.layout.blocks, self.H, WIDTH.value, dtype=torch.float32)
        launch(
            decays_kernel, (self.layout.blocks, self.H), self.layout.packed,
            (g, self.decays, self.layout.table, *self.sizes, g.stride(1), g.stride(2)), lambda: self.packed,
        )  # fmt: skip

    def new_state(self, like: Tensor | None) -> Tensor:
        return self.layout.new_state(like, self.v, self.H, self.K, self.V)

    def new_states(self) -> Tensor:
        return self.v.new_empty(self.layout.blocks, self.H, self.KP, self.VP)

    def new_parts(self) -> Tensor:
        """For one of a token's summands in the gradient of its decay, a part for each tile of keys."""
        tiles = cdiv(self.K, output_tile(self.v.dtype, self.K)["BO"])
        return self.v.new_empty(tiles, self.tokens, self.H, dtype=torch.float32)

    def walk(self, *directions: tuple) -> None:
        """Write the states of one or both directions: (keys, values, states, initial or None, final state to write or None)."""
        layout, tiles = self.layout, self.state_tiles()
        cut = row_segments(layout, len(directions) * layout.rows * self.H * tiles, self.v.device)
        entering = self.entering(directions, *cut) if cut[0] > 1 else (self.decays, self.decays)
        self.walk_segments(directions, *cut, *entering, local=0)

    def entering(self, directions: tuple[tuple, ...], parts: int, segment_blocks: int) -> tuple[Tensor, Tensor]:
        """The states that enter the segments of all rows, and scratch: what each adds to the state, then a scan."""
        K, V, H, segments = self.K, self.V, self.H, len(directions) * self.layout.rows * parts
        between, passed = self.decays.new_empty(segments, H, K, V), self.decays.new_empty(segments, H)
        self.walk_segments(directions, parts, segment_blocks, between, passed, local=1)
        launch(
            scan_kernel, (cdiv(K * V, SCAN_TILE), segments // parts, H), self.signature,
            (between, passed, self.layout.rows, parts, H), lambda: {"SIZE": K * V, "TILE": SCAN_TILE},
        )  # fmt: skip
        return between, passed

    def state_tiles(self) -> int:
        tile = walk_tile(self.v.dtype, self.KP, self.VP)
        return self.KP // tile["BK"] * (self.VP // tile["BV"])

    def walk_segments(
        self, directions: tuple[tuple, ...], parts: int, segment_blocks: int, between: Tensor, passed: Tensor, local: int
    ) -> None:
        layout, segments = self.layout, self.layout.rows * parts
        given = sum(2**i for i, direction in enumerate(directions) if direction[3] is not None)
        wanted = sum(2**i for i, direction in enumerate(directions) if direction[4] is not None)
        absent = self.decays  # a pointer that is never followed
        pointers = [absent if x is None else ready(x) for direction in (directions[0], directions[-1]) for x in direction]
        initial = layout.packed and given > 0
        constants = {"K": self.K, "KP": self.KP, "V": self.V, "VP": self.VP, "INITIAL": initial}
        launch(
            states_kernel, (self.state_tiles(), len(directions) * segments, self.H), (self.signature, initial),
            (
                *pointers, self.decays, between, passed, layout.table,
                self.scale, layout.T, layout.row_blocks, segment_blocks, segments, parts, self.H, given, wanted, local,
            ), lambda: {**constants, **self.common, **walk_tile(self.v.dtype, self.KP, self.VP)},
        )  # fmt: skip

    def keeps_state(self, initial: Tensor | None) -> bool:
        """Whether outputs come from one walk with the state in registers: where states are large.

        Tensor descriptors want rows of whole 16 bytes. Packed documents take registers, and initial states of theirs more.
        """
        channels = 128 if self.layout.packed else 256
        fits = self.v.dtype != torch.float32 and self.K <= channels and self.K % 8 == 0 and self.V % 128 == 0
        return fits and self.K * self.V > 128 * 128 and not (self.layout.packed and initial is not None)

    def walk_outputs(self, initial: Tensor | None, final: Tensor) -> Tensor:
        """o [B, T, H, V], and the final states into `final`: see `scalar_walk`."""
        H, tile = self.H, kept_tile(self.K)
        KP, C, BV = tile["KP"], tile["C"], tile["BV"]
        chunks = BLOCK.value // C * self.layout.blocks
        z, scores = self.v.new_empty(chunks, H, C, KP), self.v.new_empty(chunks, H, C, C)
        from_start = self.decays.new_empty(chunks, H, C)
        widths = {"C": C, "K": self.K, "KP": KP, **self.common}
        sizes = (self.scale, *self.sizes)
        launch(
            pairs_kernel, (chunks, H), self.signature,
            (self.q, self.k, z, scores, from_start, self.decays, self.layout.table, *sizes),
            lambda: {**widths, **PAIRS_TILE},
        )  # fmt: skip
        out, tiles = self.v.new_empty(self.v.shape), self.V // BV
        parts, blocks = row_segments(self.layout, self.layout.rows * H * tiles, self.v.device, at_once=1)
        entering = initial_ = self.decays  # pointers that are never followed
        if parts > 1:  # a local walk writes no states: any tensor of their dtype stands in for them
            entering, _ = self.entering(((self.k, self.v, self.k, initial, None),), parts, blocks)
        if initial is not None:
            initial_ = ready(initial)
        triton.set_allocator(scratch)
        launch(
            walk_kernel, (tiles, self.layout.rows * parts, H), self.signature,
            (
                self.q, z, self.v, scores, from_start, out, entering, initial_, final, self.layout.table,
                *sizes, blocks, parts, int(initial is not None),
            ),
            lambda: {**widths, **tile, "V": self.V},
        )  # fmt: skip
        return out

    def outputs(
        self, x: Tensor, w: Tensor, z: Tensor, y: Tensor, later: bool = False, transposed: bool = False,
        far: Tensor | None = None, own: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """A tensor like y: see `scalar_outputs`."""
        out, width, out_width = y.new_empty(y.shape), x.shape[-1], y.shape[-1]
        widths = {"IN": width, "INP": padded(width), "OUT": out_width, "OUTP": padded(out_width)}
        if far is None and in_one_program(y.dtype, widths["INP"], widths["OUTP"]):
            launch(
                whole_outputs_kernel, (self.layout.blocks, self.H), (self.signature, later, transposed),
                (x, w, z, y, out, self.decays, self.layout.table, self.scale, *self.sizes),
                lambda: {**widths, "LATER": later, "TRANSPOSED": transposed, **self.common, **WHOLE_TILE},
            )  # fmt: skip
            return out
        tile = output_tile(y.dtype, out_width)
        kind = {"LATER": later, "TRANSPOSED": transposed, "FAR": far is not None}
        launch(
            outputs_kernel, (cdiv(out_width, tile["BO"]), self.layout.blocks * (BLOCK.value // tile["ROWS"]), self.H),
            (self.signature, later, transposed, far is not None),
            (
                x, w, z, y, out, self.decays, x if own is None else own, self.decays if far is None else far, self.layout.table,
                self.scale, *self.sizes, self.tokens,
            ),
            lambda: {**widths, **kind, **self.common, **tile},
        )  # fmt: skip
        return out

    def decay_gradient(self, do: Tensor, states: Tensor, d_states: Tensor, read: Tensor, left: Tensor) -> Tensor:
        dg = torch.empty(self.g.shape, dtype=torch.float32, device=self.g.device)
        widths = {"K": self.K, "KP": self.KP, "V": self.V, "VP": self.VP}
        parts = {"READ_PARTS": len(read), "LEFT_PARTS": len(left)}
        launch(
            decay_gradient_kernel, (self.layout.blocks, self.H), self.signature,
            (
                self.q, self.k, self.v, do, self.decays, states, d_states, read, left, dg, self.layout.table,
                self.scale, *self.sizes, self.tokens,
            ), lambda: {**widths, **parts, **self.common, **gradient_tile(self.v.dtype)},
        )  # fmt: skip
        return dg


def padded(width: int) -> int:
    return cdiv(width, 64) * 64


def kept_tile(K: int) -> dict[str, int]:
    """Of the walk that keeps its state. With less than three stages its loads would wait for the products before them."""
    if K <= 128:
        return {"C": 64, "KP": 128, "BV": 128, "num_warps": 8, "num_stages": 3}
    return {"C": 32, "KP": 256, "BV": 128, "num_warps": 8, "num_stages": 4}


# Products of float32 take three of tf32, and their factors twice the memory: smaller tiles.
def walk_tile(dtype: torch.dtype, KP: int, VP: int) -> dict[str, int]:
    if dtype == torch.float32:
        return {"BK": 64, "BV": 32, "num_warps": 4, "num_stages": 1}
    if KP % 128 == 0 and VP % 128 == 0 and KP * VP > 128 * 128:
        # Keys and values come from the L2 cache half as often; rows are cut into segments to fill the GPU.
        return {"BK": 128, "BV": 128, "num_warps": 8, "num_stages": 3}
    return {"BK": 64, "BV": 64, "num_warps": 4, "num_stages": 3}


def output_tile(dtype: torch.dtype, width: int) -> dict[str, int]:
    if dtype == torch.float32:
        return {"ROWS": 128, "BI": 32, "BO": 64, "num_warps": 8, "num_stages": 1}
    return {"ROWS": 128, "BI": 64, "BO": 128 if width > 64 else 64, "num_warps": 8, "num_stages": 3}


def in_one_program(dtype: torch.dtype, INP: int, OUTP: int) -> bool:
    """Whether one program serves all tiles of a block's outputs: worth it for several, and x has to fit into shared memory."""
    return dtype != torch.float32 and INP in (64, 128, 256) and OUTP > 128


WHOLE_TILE = {"BO": 64, "num_warps": 8, "num_stages": 3}


def gradient_tile(dtype: torch.dtype) -> dict[str, int]:
    if dtype == torch.float32:
        return {"BK": 32, "BV": 32, "num_warps": 8, "num_stages": 1}
    return {"BK": 64, "BV": 64, "num_warps": 8, "num_stages": 2}


SCAN_TILE = 1024
PAIRS_TILE = {"BK": 64, "num_warps": 4, "num_stages": 3}


def scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for a launch's tensor descriptors."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
