"""Linear attention with no decay, a decay a head, or a decay a head and token: the launches, forward and backward.

The states at the boundaries of blocks of 128 tokens (`scalar_states`), then all blocks in parallel (`scalar_outputs`). The
backward pass computes the states again and keeps nothing but the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_linear.kernels.launch import cdiv, launch, product_precision, ready
from hf_linear.kernels.layout import BLOCK, make_layout, row_segments
from hf_linear.kernels.scalar_decays import WIDTH, decay_gradient_kernel, decays_kernel
from hf_linear.kernels.scalar_outputs import outputs_kernel
from hf_linear.kernels.scalar_states import scan_kernel, states_kernel


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] and the final state [N, H, K, V]; q, k [B, T, H, K], v [B, T, H, V], g [B, T, H]."""
    run = Blocks(q, k, v, g, scale, cu_seqlens)
    final = run.new_state(initial_state)
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
        layout, H, K, V = self.layout, self.H, self.K, self.V
        tile = walk_tile(self.v.dtype, self.KP, self.VP)
        tiles = self.KP // tile["BK"] * (self.VP // tile["BV"])
        parts, segment_blocks = row_segments(layout, len(directions) * layout.rows * H * tiles, self.v.device)
        segments = layout.rows * parts
        given = sum(2**i for i, direction in enumerate(directions) if direction[3] is not None)
        wanted = sum(2**i for i, direction in enumerate(directions) if direction[4] is not None)
        absent = self.decays  # a pointer that is never followed
        pointers = [absent if x is None else ready(x) for direction in (directions[0], directions[-1]) for x in direction]
        between = passed = absent
        if parts > 1:
            between = self.decays.new_empty(len(directions) * segments, H, K, V)
            passed = self.decays.new_empty(len(directions) * segments, H)
        widths = {"K": K, "KP": self.KP, "V": V, "VP": self.VP}
        for local in (1, 0) if parts > 1 else (0,):
            launch(
                states_kernel, (tiles, len(directions) * segments, H), self.signature,
                (
                    *pointers, self.decays, between, passed, layout.table,
                    self.scale, layout.T, layout.row_blocks, segment_blocks, segments, parts, H, given, wanted, local,
                ), lambda: {**widths, **self.common, **tile},
            )  # fmt: skip
            if local:
                launch(
                    scan_kernel, (cdiv(K * V, SCAN_TILE), len(directions) * layout.rows, H), self.signature,
                    (between, passed, layout.rows, parts, H), lambda: {"SIZE": K * V, "TILE": SCAN_TILE},
                )  # fmt: skip

    def outputs(
        self, x: Tensor, w: Tensor, z: Tensor, y: Tensor, later: bool = False, transposed: bool = False,
        far: Tensor | None = None, own: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """A tensor like y: see `scalar_outputs`."""
        out, width, out_width = y.new_empty(y.shape), x.shape[-1], y.shape[-1]
        tile = output_tile(y.dtype, out_width)
        kind = {"LATER": later, "TRANSPOSED": transposed, "FAR": far is not None}
        launch(
            outputs_kernel, (cdiv(out_width, tile["BO"]), self.layout.blocks * (BLOCK.value // tile["ROWS"]), self.H),
            (self.signature, later, transposed, far is not None),
            (
                x, w, z, y, out, self.decays, x if own is None else own, self.decays if far is None else far, self.layout.table,
                self.scale, *self.sizes, self.tokens,
            ),
            lambda: {
                "IN": width, "INP": padded(width), "OUT": out_width, "OUTP": padded(out_width), **kind, **self.common, **tile,
            },
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


def gradient_tile(dtype: torch.dtype) -> dict[str, int]:
    if dtype == torch.float32:
        return {"BK": 32, "BV": 32, "num_warps": 8, "num_stages": 1}
    return {"BK": 64, "BV": 64, "num_warps": 8, "num_stages": 2}


SCAN_TILE = 1024
