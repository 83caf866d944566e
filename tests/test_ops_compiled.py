"""The ops under torch.compile: one graph, and the same results."""

from functools import partial

import pytest
import torch
from op_cases import FULL_CASES, GATED, SAME_SUMS, assert_equal_to_rounding, named, outputs_and_gradients

from hf_linear.ops import chunked as chunked_ops

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@named(FULL_CASES)
def test_compiled_equals_eager(case, packed):
    inputs = case.sample(70, B=1 if packed else 2, N=3 if packed else None, K=5, V=3)
    index = {"cu_seqlens": torch.tensor([0, 66, 66, 70])} if packed else {}
    torch._dynamo.reset()
    compiled = torch.compile(lambda **x: case(**x, **index), fullgraph=True, backend="aot_eager")
    expected = outputs_and_gradients(lambda **x: case(**x, **index), inputs)
    assert_equal_to_rounding(outputs_and_gradients(compiled, inputs), expected, inputs, SAME_SUMS)


@named(FULL_CASES)
def test_compiled_once_serves_other_documents(case):
    """The borders are data: a graph made for some documents must serve others of the same number."""
    inputs = case.sample(70, B=1, N=3, K=5, V=3)
    torch._dynamo.reset()
    compiled = torch.compile(case, fullgraph=True, backend="aot_eager")
    for borders in ([0, 66, 66, 70], [0, 1, 30, 70]):
        index = torch.tensor(borders)
        expected = dict(zip(("o", "state"), case(**inputs, cu_seqlens=index), strict=True))
        with torch.compiler.set_stance("default" if borders[1] == 66 else "fail_on_recompile"):
            actual = dict(zip(("o", "state"), compiled(**inputs, cu_seqlens=index), strict=True))
        assert_equal_to_rounding(actual, expected, inputs, SAME_SUMS)


def test_no_pieces_in_a_graph(monkeypatch):
    """A graph of pieces would grow with the sequence."""
    monkeypatch.setattr(chunked_ops, "PIECE", 64)
    monkeypatch.setattr(chunked_ops, "in_pieces", None)
    torch._dynamo.reset()
    torch.compile(partial(GATED[0], "chunked"), fullgraph=True, backend="eager")(**GATED[0].sample(200))
