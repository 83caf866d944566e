"""What the op tests share: how to sample each op's inputs, its closed form, and how an error is measured.

B batch, T tokens, H heads, K key dim, V value dim, D channels, W taps, L filter length, P tokens of history, N
documents.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_linear import ops

Inputs = dict[str, Tensor]
Results = dict[str, Tensor]
Function = Callable[..., tuple[Tensor, Tensor]]

DECAYS = ("0", "1e-4", "0.01", "1", "50", "spread", "reset50", "reset1e4")

# Below this a tensor counts as zero: one step of decay 50 (2e-22) is still resolved, while float32 only turns
# subnormal at 1e-38, where no relative accuracy is promised.
NEGLIGIBLE = 1e-30


# --- Closed forms: sums over all pairs s <= t, no recurrence, no chunk, no transform ---


def segment_sums(g: Tensor) -> Tensor:
    """L[t, s] = sum of g_r over s < r <= t, for g [..., T]; every sum is formed by itself, so nothing cancels."""
    t = torch.arange(g.shape[-1])
    inside = (t[None, :, None] < t[None, None, :]) & (t[None, None, :] <= t[:, None, None])  # [t, s, r]
    return torch.where(inside, g[..., None, None, :], 0.0).sum(-1)


def prefix_sums(g: Tensor) -> Tensor:
    """The sum of g_r over r <= t, for g [..., T], formed pair by pair as above."""
    t = torch.arange(g.shape[-1])
    return torch.where(t[None, :] <= t[:, None], g[..., None, :], 0.0).sum(-1)


def closed_gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """o_t = scale sum_{s <= t} (q_t . exp(g_{s+1} + ... + g_t) k_s) v_s; the initial state is one term more."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, g = (x.movedim(1, -1) for x in (q, k, v, g))  # [B, H, K or V, T]
    T = q.shape[-1]
    causal = torch.ones(T, T).tril().bool()
    decay = torch.where(causal, segment_sums(g).exp(), 0.0)  # [B, H, K, t, s]
    scores = torch.einsum("bhkt,bhks,bhkts->bhts", q, k, decay)
    o = torch.einsum("bhts,bhvs->bthv", scores, v)
    state = torch.einsum("bhks,bhvs,bhks->bhkv", k, v, decay[..., -1, :])
    if initial_state is not None:
        from_start = prefix_sums(g).exp()  # [B, H, K, T]
        o = o + torch.einsum("bhkt,bhkt,bhkv->bthv", q, from_start, initial_state)
        state = state + from_start[..., -1, None] * initial_state
    return scale * o, state


def closed_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    initial_state: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The same with one decay a head: none, a constant [H], or [B, T, H]."""
    g = torch.zeros_like(q[..., 0]) if g is None else g.expand(q.shape[:-1])
    return closed_gated_linear_attention(q, k, v, g[..., None].expand(q.shape), initial_state, scale)


def closed_short_conv(
    x: Tensor, w: Tensor, b: Tensor | None = None, initial_state: Tensor | None = None, activation: str | None = None
) -> tuple[Tensor, Tensor]:
    """y_t = act(b + sum_j w[:, W-1-j] x_{t-j}), one output at a time."""
    T, W = x.shape[1], w.shape[1]
    before = x.new_zeros(x.shape[0], W - 1, x.shape[2]) if initial_state is None else initial_state
    tokens = [*before.unbind(1), *x.unbind(1)]  # tokens[W - 1 + t] is x_t
    y = torch.stack([sum(w[:, W - 1 - j] * tokens[W - 1 + t - j] for j in range(W)) for t in range(T)], 1)
    if b is not None:
        y = y + b
    if activation == "silu":
        y = y / (1 + torch.exp(-y))
    return y, torch.cat([before, x], 1)[:, T:]


def closed_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    dt_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """y_t = sum_{s <= t} C_t . (exp((dt_{s+1} + ... + dt_t) A) B_s) dt_s x_s; the initial state is one term more."""
    dt = dt if dt_bias is None else dt + dt_bias
    dt = torch.log1p(torch.exp(dt)) if dt_softplus else dt
    g = dt.movedim(1, -1)[:, :, None] * A[..., None]  # [B, D, N, T]
    T = x.shape[1]
    decay = torch.where(torch.ones(T, T).tril().bool(), segment_sums(g).exp(), 0.0)  # [B, D, N, t, s]
    from_start = prefix_sums(g).exp()
    y = torch.einsum("btn,bdnts,bsn,bsd->btd", C, decay, B, dt * x)
    state = torch.einsum("bdns,bsn,bsd->bdn", decay[..., -1, :], B, dt * x)
    if initial_state is not None:
        y = y + torch.einsum("btn,bdnt,bdn->btd", C, from_start, initial_state)
        state = state + from_start[..., -1] * initial_state
    y = y if D is None else y + D * x
    return y if z is None else y * z / (1 + torch.exp(-z)), state


def closed_long_conv(
    u: Tensor,
    h: Tensor,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = post_t (sum_{s <= t} h[:, t-s] p_s + skip p_t) with p = pre u, as one Toeplitz matrix a channel."""
    T = u.shape[-1]
    p = u if pre_gate is None else pre_gate * u
    history = p if initial_state is None else torch.cat([initial_state, p], -1)
    lag = torch.arange(history.shape[-1])[:, None] - torch.arange(history.shape[-1])
    toeplitz = torch.where(lag >= 0, h[:, lag.clamp(min=0)], 0.0)  # [D, P + T, P + T]
    y = torch.einsum("dts,bds->bdt", toeplitz, history)[..., -T:]
    if skip is not None:
        y = y + skip[:, None] * p
    return y if post_gate is None else post_gate * y, history


# --- Cases: an op with one choice of its optional arguments ---


def log_decay(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Log-decays <= 0 of one of DECAYS. A reset is one huge decay among tiny ones, which a running sum cannot hold."""
    u = torch.rand(shape, generator=generator)
    if kind == "spread":
        return -(10.0 ** (5.7 * u - 4))  # 1e-4 to 50 side by side
    if not kind.startswith("reset"):
        return -float(kind) * (0.5 + u)
    g = -1e-3 * u
    at_reset = torch.zeros(shape, dtype=torch.bool)
    # Early, the last and the first token of a chunk of 16, 32 or 64, two in a row, and amid a chunk. Some heads or
    # channels go through unharmed.
    for t in (2, 5, 15, 32, 63, 64, 101, 150):
        at_reset[:, t : t + 1] = torch.rand(at_reset[:, t : t + 1].shape, generator=generator) < 0.7
    return g.masked_fill(at_reset, -float(kind.removeprefix("reset")))


@dataclass(frozen=True)
class Sizes:
    B: int
    T: int
    N: int  # rows of the initial state
    H: int
    K: int
    V: int
    P: int

    @property
    def D(self) -> int:
        return self.H * self.K


def randn(shapes: dict[str, tuple[int, ...]], generator: torch.Generator) -> Inputs:
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def sample_attention(n: Sizes, decay: str, generator: torch.Generator, *, g_shape: str | None) -> Inputs:
    keys, values = (n.B, n.T, n.H, n.K), (n.B, n.T, n.H, n.V)
    inputs = randn({"q": keys, "k": keys, "v": values, "initial_state": (n.N, n.H, n.K, n.V)}, generator)
    if g_shape is not None:
        shape = {"H": (n.H,), "BTH": (n.B, n.T, n.H), "BTHK": keys}[g_shape]
        inputs["g"] = log_decay(decay, shape, generator)
    return inputs


def sample_short_conv(n: Sizes, decay: str, generator: torch.Generator, *, W: int, bias: bool) -> Inputs:
    shapes = {"x": (n.B, n.T, n.D), "w": (n.D, W), "initial_state": (n.N, W - 1, n.D)}
    return randn(shapes | ({"b": (n.D,)} if bias else {}), generator)


def sample_long_conv(n: Sizes, decay: str, generator: torch.Generator, *, gated: bool) -> Inputs:
    tokens = (n.B, n.D, n.T)
    shapes = {"u": tokens, "h": (n.D, n.P + n.T + 3), "initial_state": (n.B, n.D, n.P)}  # a filter longer than needed
    return randn(shapes | ({"skip": (n.D,), "pre_gate": tokens, "post_gate": tokens} if gated else {}), generator)


def sample_selective_scan(n: Sizes, decay: str, generator: torch.Generator, *, full: bool) -> Inputs:
    """With a plain step size the decays are those of the other ops; with a softplus around it they spread by themselves."""
    tokens, numbers = (n.B, n.T, n.D), (n.B, n.T, n.V)
    inputs = randn({"x": tokens, "dt": tokens, "B": numbers, "C": numbers, "initial_state": (n.N, n.D, n.V)}, generator)
    inputs["A"] = -0.5 - torch.rand(n.D, n.V, generator=generator)
    if full:
        return inputs | randn({"D": (n.D,), "z": tokens, "dt_bias": (n.D,)}, generator)
    return inputs | {"dt": -log_decay(decay, tokens, generator)}


@dataclass(frozen=True)
class Case:
    """One op, how to sample it and what it must equal.

    Attributes:
        time: the time axis of every input that has one.
        float32: inputs that are float32 whatever the dtype of the others.
        out_time: the time axis of o.
    """

    name: str
    op: Function
    closed_form: Function
    sampler: Callable[..., Inputs]
    time: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)
    float32: tuple[str, ...] = ()
    out_time: int = 1
    decays: tuple[str, ...] = ("1",)

    def __call__(self, backend: str = "auto", **inputs: Any) -> tuple[Tensor, Tensor]:
        return self.op(**inputs, **self.options, backend=backend)

    def sample(
        self,
        T: int,
        *,
        B: int = 2,
        dtype: torch.dtype = torch.float64,
        decay: str = "1",
        state: bool = True,
        N: int | None = None,
        H: int = 3,
        K: int = 24,
        V: int = 40,
        P: int = 9,
        seed: int = 0,
    ) -> Inputs:
        """Inputs in `dtype`; `N` is the number of packed documents, each with its own initial state."""
        generator = torch.Generator().manual_seed(seed)
        inputs = self.sampler(Sizes(B, T, B if N is None else N, H, K, V, P), decay, generator)
        if not state or (N is not None and self.is_long_conv):
            del inputs["initial_state"]
        wide = torch.promote_types(dtype, torch.float32)
        return {name: x.to(wide if name in self.float32 else dtype) for name, x in inputs.items()}

    @property
    def hardest_decay(self) -> str:
        return self.decays[-1]

    @property
    def is_long_conv(self) -> bool:
        """Its state is a history that grows, and packing takes none: the one op whose state is not of a fixed size."""
        return self.op is ops.long_conv

    def slice_time(self, inputs: Inputs, start: int, stop: int) -> Inputs:
        """The inputs of the tokens start..stop, without an initial state."""
        cut = {n: x.narrow(self.time[n], start, stop - start) if n in self.time else x for n, x in inputs.items()}
        return {name: x for name, x in cut.items() if name != "initial_state"}

    def empty_state(self, inputs: Inputs) -> Tensor:
        """[1, ...]: the state of a document that has no token and no past."""
        if "q" in inputs:
            shape = (1, *inputs["k"].shape[2:], inputs["v"].shape[-1])
            return torch.zeros(shape, dtype=torch.promote_types(inputs["q"].dtype, torch.float32))
        if "A" in inputs:
            return torch.zeros(1, *inputs["A"].shape, dtype=torch.promote_types(inputs["x"].dtype, torch.float32))
        return inputs["x"].new_zeros(1, inputs["w"].shape[1] - 1, inputs["x"].shape[2])

    def document_by_document(self, cu_seqlens: list[int], backend: str) -> Function:
        """What packing must equal: a call for every document."""

        def function(**inputs: Any) -> tuple[Tensor, Tensor]:
            outputs, states = [], []
            for i, (start, stop) in enumerate(pairwise(cu_seqlens)):
                initial = inputs["initial_state"][i : i + 1] if "initial_state" in inputs else None
                if start < stop:
                    document = self.slice_time(inputs, start, stop)
                    o, final = self(backend, **document, initial_state=initial)
                    outputs.append(o)
                    states.append(final)
                elif not self.is_long_conv:
                    states.append(self.empty_state(inputs) if initial is None else initial)
            return torch.cat(outputs, self.out_time), torch.cat(states, -1 if self.is_long_conv else 0)

        return function

    def piece_by_piece(self, splits: list[int], backend: str) -> Function:
        """What one call over all tokens must equal: a call for every piece, the state carried along."""

        def function(**inputs: Any) -> tuple[Tensor, Tensor]:
            outputs, state, start = [], inputs.get("initial_state"), 0
            for length in splits:
                piece = self.slice_time(inputs, start, start + length)
                o, state = self(backend, **piece, initial_state=state)
                outputs.append(o)
                start += length
            return torch.cat(outputs, self.out_time), state

        return function


def attention_case(name: str, op: Function, closed_form: Function, g_shape: str | None) -> Case:
    time = {"q": 1, "k": 1, "v": 1} | ({"g": 1} if g_shape in ("BTH", "BTHK") else {})
    decays = {None: ("0",), "H": tuple(d for d in DECAYS if "reset" not in d)}.get(g_shape, DECAYS)
    sampler = partial(sample_attention, g_shape=g_shape)
    return Case(name, op, closed_form, sampler, time, float32=("g", "initial_state"), decays=decays)


def short_conv_case(name: str, W: int, bias: bool, activation: str | None) -> Case:
    sampler = partial(sample_short_conv, W=W, bias=bias)
    options = {} if activation is None else {"activation": activation}
    return Case(name, ops.short_conv, closed_short_conv, sampler, {"x": 1}, options)


def selective_scan_case(name: str, full: bool) -> Case:
    time = dict.fromkeys(("x", "dt", "B", "C", *(["z"] if full else [])), 1)
    float32 = ("A", "D", "dt_bias", "initial_state")
    options, decays = ({"dt_softplus": True}, ("1",)) if full else ({}, DECAYS[1:])
    sampler = partial(sample_selective_scan, full=full)
    return Case(name, ops.selective_scan, closed_selective_scan, sampler, time, options, float32, decays=decays)


def long_conv_case(name: str, gated: bool) -> Case:
    sampler = partial(sample_long_conv, gated=gated)
    time = {"u": 2} | ({"pre_gate": 2, "post_gate": 2} if gated else {})
    return Case(name, ops.long_conv, closed_long_conv, sampler, time, float32=("h", "skip", "initial_state"), out_time=2)


LINEAR_ATTENTION = [
    attention_case("linear_attention", ops.linear_attention, closed_linear_attention, None),
    attention_case("linear_attention_per_head", ops.linear_attention, closed_linear_attention, "H"),
    attention_case("linear_attention_per_token", ops.linear_attention, closed_linear_attention, "BTH"),
]
GATED = [attention_case("gated_linear_attention", ops.gated_linear_attention, closed_gated_linear_attention, "BTHK")]
ATTENTION = LINEAR_ATTENTION + GATED
SHORT_CONV = [
    short_conv_case("short_conv", W=4, bias=False, activation=None),
    short_conv_case("short_conv_silu", W=3, bias=True, activation="silu"),
    short_conv_case("short_conv_one_tap", W=1, bias=True, activation=None),
]
LONG_CONV = [long_conv_case("long_conv", gated=False), long_conv_case("long_conv_gated", gated=True)]
SELECTIVE_SCAN = [selective_scan_case("selective_scan", full=False), selective_scan_case("selective_scan_full", full=True)]
CASES = ATTENTION + SHORT_CONV + LONG_CONV + SELECTIVE_SCAN

# One of each op, with every optional argument in use.
FULL_CASES = [LINEAR_ATTENTION[2], GATED[0], SHORT_CONV[1], LONG_CONV[1], SELECTIVE_SCAN[1]]


# --- Parameters and tolerances ---

BACKENDS = ["reference", "chunked"]

# Two exact evaluations of one sum in float64. Rounding is 1.1e-16; the longest sums here have 200 tokens times 100
# channels, and a log-decay that adds up to 8e4 is held to 8e4 * 1.1e-16 = 1e-11, which is the relative error of its
# exponential. A slip in a formula shows at 1e-4 (the weakest decay) or above.
ROUNDING = 1e-10

# One evaluation made twice with the same sums in another order or with another matrix kernel: nothing but rounding.
SAME_SUMS = 1e-12


def named(cases: list[Case]):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def of_dtype(*dtypes: torch.dtype):
    return pytest.mark.parametrize("dtype", dtypes, ids=lambda dtype: str(dtype).removeprefix("torch."))


def case_and_decay(cases: list[Case]):
    return pytest.mark.parametrize(
        ("case", "decay"), [pytest.param(c, d, id=f"{c.name}-decay{d}") for c in cases for d in c.decays]
    )


# --- Running and measuring ---


def to(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: x.to(dtype) for name, x in inputs.items()}


def cotangents(o: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Random do and dstate, the same ones for every dtype: their values are exact in bfloat16."""
    generator = torch.Generator().manual_seed(1)
    do, dstate = (torch.randn(x.shape, generator=generator).bfloat16() for x in (o, state))
    return do.to(o.dtype), dstate.to(state.dtype)


def outputs_and_gradients(function: Function, inputs: Inputs, *, through: str = "both") -> Results:
    """o, the state and the gradient of every input ("dq", ...), flowing back through "o", "state" or both."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    o, state = function(**leaves)
    do, dstate = cotangents(o, state)
    ends = {"both": ([o, state], [do, dstate]), "o": ([o], [do]), "state": ([state], [dstate])}[through]
    gradients = torch.autograd.grad(ends[0], list(leaves.values()), ends[1], allow_unused=True, materialize_grads=True)
    grads = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"o": o.detach(), "state": state.detach(), **grads}


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def distance(x: Tensor, exact: Tensor) -> float:
    """The error of a tensor over the size of what it should be; NaN stays NaN, which no bound allows."""
    x, exact = x.detach().double(), exact.detach().double()
    return float((x - exact).norm() / exact.norm().clamp(min=NEGLIGIBLE))


def scales(expected: Results, inputs: Inputs) -> dict[str, float]:
    """What an error is measured against: the RMS of the tensor itself.

    A gradient of g is the sum over later tokens of q . dq - k . dk. Under strong decay the terms cancel and leave
    almost nothing, so an error in dg is measured against those terms, per token (summed for a g of [H]).
    """
    found = {name: max(rms(x), NEGLIGIBLE) for name, x in expected.items()}
    if "dg" in expected:
        terms = [(inputs[n].double() * expected[f"d{n}"].double()) for n in ("q", "k")]  # [B, T, H, K]
        if expected["dg"].ndim < 4:
            terms = [x.sum(-1) for x in terms]
        size = terms[0].abs() + terms[1].abs()
        found["dg"] = max(found["dg"], rms(size.sum((0, 1)) if expected["dg"].ndim == 1 else size))
    return found


def errors(actual: Results, expected: Results, inputs: Inputs, *, worst_element: bool = False) -> dict[str, float]:
    """The error of every tensor over its scale: RMS, or that of the worst element. NaN counts as infinite."""
    scale, found = scales(expected, inputs), {}
    assert actual.keys() == expected.keys()
    for name, e in expected.items():
        assert actual[name].shape == e.shape, f"{name} is {list(actual[name].shape)}, wanted {list(e.shape)}"
        difference = actual[name].double() - e.double()
        if not difference.numel():
            size = 0.0
        elif not difference.isfinite().all():
            size = float("inf")
        else:
            size = difference.abs().max().item() if worst_element else rms(difference)
        found[name] = size / scale[name]
    return found


def assert_equal_to_rounding(actual: Results, expected: Results, inputs: Inputs, tolerance: float) -> None:
    """No element of any output or gradient is off by more than `tolerance` times the size of its tensor."""
    found = errors(actual, expected, inputs, worst_element=True)
    wrong = {name: error for name, error in found.items() if not error <= tolerance}
    assert not wrong, f"off by more than {tolerance:g}: {wrong}"
