"""Bad arguments of the ops are a ValueError that names the argument, what was got, what was wanted and the way out."""

import re

import pytest
import torch
from op_cases import BACKENDS, FULL_CASES, GATED, LINEAR_ATTENTION, LONG_CONV, SELECTIVE_SCAN, SHORT_CONV, Case, named

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    return torch.zeros(*shape, dtype=dtype, device=device) if shape else torch.zeros((), dtype=dtype, device=device)


def plain(message: str) -> str:
    """Shapes as [2, 6, 3, 5] and dtypes as float32, however they are printed."""
    message = message.replace("torch.Size(", "").replace("torch.", "")
    return re.sub(r"\(([\d, ]+?),?\)", r"[\1]", message)


def check_error(case: Case, changes: dict, name: str, got: str, wanted: str) -> None:
    """A ValueError that names the argument, what was got and what was wanted (all three patterns), and then the way out."""
    N = 2 if "cu_seqlens" in changes else None
    inputs = case.sample(6, B=2 if N is None else 1, N=N, dtype=torch.float32, K=5, V=4, P=2) | case.options | changes
    for backend in [changes["backend"]] if "backend" in changes else ["auto", *BACKENDS]:
        with pytest.raises(ValueError) as info:
            case.op(**(inputs | {"backend": backend}))
        message = plain(str(info.value))
        assert re.search(rf"\b{name}\b", message), f"{message!r} names no {name}"
        assert re.search(got, message), f"{message!r} does not say what was got: {got}"
        assert re.search(wanted, message), f"{message!r} does not say what was wanted: {wanted}"
        assert re.search(r"\bgot\b.*: \S.*\w", message), f"{message!r} shows no way out"


def wrong(id: str, name: str, value, got: str, wanted: str, **more):
    """A call like check_error's with one argument replaced, and `more` beside it."""
    return pytest.param({name: value} | more, name, got, wanted, id=id)


def wrong_shape(id: str, name: str, *shape: int, wanted: str, **more):
    return wrong(id, name, zeros(*shape), re.escape(str(list(shape))), wanted, **more)


def wrong_dtype(name: str, *shape: int, dtype: torch.dtype = torch.int64, wanted: str = "float(?!64)", **more):
    got = str(dtype).removeprefix("torch.")
    return wrong(f"{name} in {got}", name, zeros(*shape, dtype=dtype), rf"\b{got}\b", wanted, **more)


def wrong_device(name: str, *shape: int):
    return wrong(f"{name} on another device", name, zeros(*shape, device="meta"), "meta", "cpu")


def wrong_backend(name: str):
    return wrong(f"backend {name!r}", "backend", name, repr(name), "(?=.*auto)(?=.*reference).*chunked")


def errors_of(*params):
    return pytest.mark.parametrize(("changes", "name", "got", "wanted"), params)


def of_shape(*shapes: tuple[int, ...]):
    return pytest.mark.parametrize("shape", shapes, ids=lambda shape: str(list(shape)))


# --- Linear attention, without and with gates ---

KEYS = r"\[2, 6, 3, 5\]|\[B, T, H, K\]"
VALUES = r"\[2, 6, 3, \w+\]|\[B, T, H, V\]"
STATE = r"\[2, 3, 5, 4\]"
SHAPES = {"q": (2, 6, 3, 5), "k": (2, 6, 3, 5), "v": (2, 6, 3, 4), "g": (2, 6, 3)}
IN_FLOAT64 = {name: zeros(*shape, dtype=torch.float64) for name, shape in SHAPES.items()}
NO_TOKEN = {"k": zeros(2, 0, 3, 5), "v": zeros(2, 0, 3, 4), "g": zeros(2, 0, 3)}


@errors_of(
    wrong_shape("q of three axes", "q", 6, 3, 5, wanted=r"\[B, T, H, K\]"),
    wrong_shape("k of another head", "k", 2, 6, 2, 5, wanted=KEYS),
    wrong_shape("k of another width", "k", 2, 6, 3, 4, wanted=KEYS),
    wrong_shape("k of another length", "k", 2, 7, 3, 5, wanted=KEYS),
    wrong_shape("k of another batch", "k", 1, 6, 3, 5, wanted=KEYS),
    wrong_shape("v of another head", "v", 2, 6, 1, 4, wanted=VALUES),
    wrong_shape("v of another length", "v", 2, 1, 3, 4, wanted=VALUES),
    wrong_shape("v of three axes", "v", 2, 6, 3, wanted=VALUES),
    wrong("no token", "q", zeros(2, 0, 3, 5), r"\[2, 0, 3, 5\]|T ?=+ ?0", "1", **NO_TOKEN),
    wrong_dtype("q", 2, 6, 3, 5),
    wrong_dtype("k", 2, 6, 3, 5, dtype=torch.int32),
    wrong_dtype("v", 2, 6, 3, 4),
    wrong_dtype("v", 2, 6, 3, 4, dtype=torch.complex64),
    wrong_dtype("v", 2, 6, 3, 4, dtype=torch.bool),
    wrong_dtype("g", 2, 6, 3),
    wrong_device("k", 2, 6, 3, 5),
    wrong_device("g", 2, 6, 3),
    wrong_device("initial_state", 2, 3, 5, 4),
    wrong_shape("state transposed", "initial_state", 2, 3, 4, 5, wanted=STATE),
    wrong_shape("state of another batch", "initial_state", 1, 3, 5, 4, wanted=STATE),
    wrong_shape("state of three axes", "initial_state", 3, 5, 4, wanted=STATE),
    wrong_dtype("initial_state", 2, 3, 5, 4, dtype=torch.bfloat16, wanted=r"\bfloat32\b"),
    wrong_dtype("initial_state", 2, 3, 5, 4, dtype=torch.float64, wanted=r"\bfloat32\b"),
    wrong_dtype("initial_state", 2, 3, 5, 4, dtype=torch.float32, wanted=r"\bfloat64\b", **IN_FLOAT64),
    wrong_backend("cuda"),
    wrong_backend(""),
)
@named([LINEAR_ATTENTION[2], *GATED])
def test_attention_errors(case, changes, name, got, wanted):
    if case in GATED and "g" in changes:  # the same mistake in GLA's shape
        changes = changes | {"g": changes["g"][..., None].expand(*changes["g"].shape, 5)}
    check_error(case, changes, name, got, wanted)


@pytest.mark.parametrize("value", [0.25, torch.inf])
@named([*LINEAR_ATTENTION[1:], *GATED])
def test_a_log_decay_is_not_positive(case, value):
    g = case.sample(6, dtype=torch.float32, K=5, V=4)["g"]
    g.view(-1)[-1] = value
    check_error(case, {"g": g}, "g", rf"\b{value}\b", "log-decay <= 0")


@of_shape((2,), (1,), (), (2, 6), (6, 3), (1, 6, 3), (2, 1, 3), (2, 6, 1), (2, 6, 3, 5))
def test_linear_attention_wants_g_of_a_head(shape):
    wanted = r"\[H\]" if len(shape) == 1 else r"\[B, T, H\]|\[2, 6, 3\]"
    check_error(LINEAR_ATTENTION[2], {"g": zeros(*shape)}, "g", re.escape(str(list(shape))), wanted)


@of_shape((3,), (5,), (2, 6, 3), (2, 6, 3, 1), (2, 6, 3, 4), (1, 6, 3, 5))
def test_gated_linear_attention_wants_g_of_a_channel(shape):
    check_error(GATED[0], {"g": zeros(*shape)}, "g", re.escape(str(list(shape))), r"\[2, 6, 3, 5\]")


# --- Short convolution ---


@errors_of(
    wrong_shape("x of two axes", "x", 6, 15, wanted=r"\[B, T, D\]"),
    wrong("no token", "x", zeros(2, 0, 15), r"\[2, 0, 15\]|T ?=+ ?0", "1"),
    wrong_shape("w of another width", "w", 14, 3, wanted=r"\[15, \w+\]|\[D, W\]"),
    wrong_shape("w of a Conv1d", "w", 15, 1, 3, wanted=r"\[15, W\]|\[D, W\]"),
    wrong("w without a tap", "w", zeros(15, 0), r"\[15, 0\]|W ?=+ ?0", "1"),
    wrong_shape("b of another width", "b", 3, wanted=r"\[15\]"),
    wrong_dtype("x", 2, 6, 15),
    wrong_dtype("w", 15, 3),
    wrong_dtype("b", 15),
    wrong_device("w", 15, 3),
    wrong_device("b", 15),
    wrong_device("initial_state", 2, 2, 15),
    wrong_dtype("initial_state", 2, 2, 15),
    wrong_dtype("initial_state", 2, 2, 15, dtype=torch.bfloat16, wanted=r"\bfloat32\b"),
    wrong_shape("state of another length", "initial_state", 2, 3, 15, wanted=r"\[2, 2, 15\]"),
    wrong_shape("state channel-major", "initial_state", 2, 15, 2, wanted=r"\[2, 2, 15\]"),
    wrong("activation unknown", "activation", "relu", "relu", "None.*silu|silu.*None"),
    wrong_backend("cuda"),
)
def test_short_conv_errors(changes, name, got, wanted):
    check_error(SHORT_CONV[1], changes, name, got, wanted)


# --- Selective scan ---

CHANNELS = r"\[2, 6, 15\]|\[batch, T, D\]"
NUMBERS = r"\[2, 6, 4\]|\[batch, T, N\]"


@errors_of(
    wrong_shape("x of two axes", "x", 6, 15, wanted=r"\[batch, T, D\]"),
    wrong("no token", "x", zeros(2, 0, 15), r"\[2, 0, 15\]|T ?=+ ?0", "1"),
    wrong_shape("dt of low rank", "dt", 2, 6, 1, wanted=CHANNELS),
    wrong_shape("A of one axis", "A", 15, wanted=r"\[D, N\]"),
    wrong_shape("A of another width", "A", 14, 4, wanted="15"),
    wrong_shape("A without a number", "A", 15, 0, wanted="N >= 1"),
    wrong_shape("B of groups", "B", 2, 6, 3, 4, wanted=NUMBERS),
    wrong_shape("C of another length", "C", 2, 5, 4, wanted=NUMBERS),
    wrong_shape("D of another width", "D", 4, wanted=r"\[15\]"),
    wrong_shape("dt_bias of another width", "dt_bias", 4, wanted=r"\[15\]"),
    wrong_shape("z channel-major", "z", 2, 15, 6, wanted=CHANNELS),
    wrong_dtype("x", 2, 6, 15),
    wrong_dtype("A", 15, 4),
    wrong_dtype("dt_bias", 15),
    wrong_device("B", 2, 6, 4),
    wrong_device("initial_state", 2, 15, 4),
    wrong_shape("state of another batch", "initial_state", 1, 15, 4, wanted=r"\[2, 15, 4\]"),
    wrong_shape("state transposed", "initial_state", 2, 4, 15, wanted=r"\[2, 15, 4\]"),
    wrong_dtype("initial_state", 2, 15, 4, dtype=torch.bfloat16, wanted=r"\bfloat32\b"),
    wrong("A above 0", "A", zeros(15, 4) + 0.25, r"\b0.25\b", "<= 0"),
    wrong("dt below 0", "dt", zeros(2, 6, 15) - 0.25, r"-0.25\b", ">= 0", dt_softplus=False, dt_bias=None),
    wrong_backend("cuda"),
)
def test_selective_scan_errors(changes, name, got, wanted):
    check_error(SELECTIVE_SCAN[1], changes, name, got, wanted)


# --- Long convolution ---

GATE = r"\[2, 15, 6\]|\[B, D, T\]"
HISTORY = r"\[2, 15, \w+\]|\[B, D, P\]"
NO_GATE_TOKEN = {"pre_gate": zeros(2, 15, 0), "post_gate": zeros(2, 15, 0)}


@errors_of(
    wrong_shape("u of two axes", "u", 15, 6, wanted=r"\[B, D, T\]"),
    wrong("no token", "u", zeros(2, 15, 0), r"\[2, 15, 0\]|T ?=+ ?0", "1", **NO_GATE_TOKEN),
    wrong_shape("h of another width", "h", 14, 9, wanted=r"\[15, \w+\]|\[D, L\]"),
    wrong_shape("h of one axis", "h", 9, wanted=r"\[15, \w+\]|\[D, L\]"),
    wrong("h shorter than the tokens", "h", zeros(15, 5), r"\b5\b", r"\b6\b", initial_state=None),
    wrong("h shorter than history and tokens", "h", zeros(15, 7), r"\b7\b", r"\b8\b|2 \+ 6"),
    wrong_shape("skip of another width", "skip", 3, wanted=r"\[15\]"),
    wrong_shape("pre_gate of another length", "pre_gate", 2, 15, 1, wanted=GATE),
    wrong_shape("post_gate token-major", "post_gate", 2, 6, 15, wanted=GATE),
    wrong_dtype("u", 2, 15, 6),
    wrong_dtype("h", 15, 9),
    wrong_dtype("skip", 15),
    wrong_dtype("pre_gate", 2, 15, 6),
    wrong_device("h", 15, 11),
    wrong_device("post_gate", 2, 15, 6),
    wrong_dtype("initial_state", 2, 15, 2),
    wrong_dtype("initial_state", 2, 15, 2, dtype=torch.bfloat16, wanted=r"\bfloat32\b"),
    wrong_device("initial_state", 2, 15, 2),
    wrong_shape("state of another width", "initial_state", 2, 3, 2, wanted=HISTORY),
    wrong_shape("state of another batch", "initial_state", 1, 15, 2, wanted=HISTORY),
    wrong_backend("cuda"),
)
def test_long_conv_errors(changes, name, got, wanted):
    check_error(LONG_CONV[1], changes, name, got, wanted)


def test_long_conv_takes_no_state_of_packed_documents():
    changes = {"cu_seqlens": torch.tensor([0, 3, 6]), "initial_state": zeros(1, 15, 2)}
    check_error(LONG_CONV[1], changes, "initial_state", "cu_seqlens", "None|without|no ")


# --- Packing, and backends ---


def borders(id: str, value: list[int], got: str, wanted: str, dtype: torch.dtype = torch.int64):
    return wrong(id, "cu_seqlens", torch.tensor(value, dtype=dtype), got, wanted)


@errors_of(
    borders("not from 0", [1, 3, 6], r"1, 3, 6|\b1\b", r"\b0\b"),
    borders("short of T", [0, 3, 5], r"\b5\b", r"\b6\b|\bT\b"),
    borders("beyond T", [0, 3, 7], r"\b7\b", r"\b6\b|\bT\b"),
    borders("decreasing", [0, 5, 3, 6], r"0, 5, 3, 6|5.*3", "decreas|increas|ascend|sort|rise|fall"),
    borders("float32", [0, 3, 6], "float32", "int32.*int64", dtype=torch.float32),
    borders("int16", [0, 3, 6], "int16", "int32.*int64", dtype=torch.int16),
    borders("two axes", [[0, 3, 6]], r"\[1, 3\]", r"N ?\+ ?1"),
    borders("no document", [0], r"\[1\]|\[0\]|\b0\b", r"N ?\+ ?1|\b6\b"),
    wrong("cu_seqlens on another device", "cu_seqlens", torch.tensor([0, 3, 6], device="meta"), "meta", "cpu"),
)
@named(FULL_CASES)
def test_cu_seqlens_errors(case, changes, name, got, wanted):
    sampled = case.sample(6, B=1, N=len(changes["cu_seqlens"]) - 1, dtype=torch.float32, K=5, V=4, P=2)
    check_error(case, sampled | changes, name, got, wanted)


@named(FULL_CASES)
def test_cu_seqlens_wants_one_row(case):
    changes = case.sample(6, B=2, N=2, dtype=torch.float32, K=5, V=4, P=2) | {"cu_seqlens": torch.tensor([0, 3, 6])}
    check_error(case, changes, "cu_seqlens", r"\b2\b", r"B ?=+ ?1|one row")


@pytest.mark.parametrize(
    ("case", "shape", "wanted"),
    [
        (LINEAR_ATTENTION[2], (1, 3, 5, 4), STATE),
        (GATED[0], (3, 3, 5, 4), STATE),
        (SHORT_CONV[1], (1, 2, 15), "2, 2, 15"),
        (SELECTIVE_SCAN[1], (1, 15, 4), "2, 15, 4"),
    ],
    ids=lambda x: x.name if isinstance(x, Case) else "",
)
def test_packed_initial_state_is_one_a_document(case, shape, wanted):
    changes = {"cu_seqlens": torch.tensor([0, 3, 6]), "initial_state": zeros(*shape)}
    check_error(case, changes, "initial_state", re.escape(str(list(shape))), wanted)


@named(FULL_CASES)
def test_triton_on_a_cpu_says_the_way_out(case, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = case.sample(6, dtype=torch.float32)
    with pytest.raises(ValueError, match="triton") as info:
        case("triton", **inputs)
    assert re.search("chunked|auto", str(info.value)), info.value
