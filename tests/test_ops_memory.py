"""What the ops keep for the backward pass, and what their outputs keep alive."""

import pytest
import torch
from op_cases import BACKENDS, CASES, SELECTIVE_SCAN, named

from hf_linear import ops

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def test_short_conv_keeps_its_inputs_alone():
    """In bfloat16: neither a wide copy of the sequence nor a product with a tap."""
    x, w, kept = torch.randn(1, 200, 24).bfloat16().requires_grad_(), torch.randn(24, 3, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda z: kept.append(z) or z, lambda z: z):
        ops.short_conv(x, w)[0].sum()
    assert {z.untyped_storage().data_ptr() for z in kept if z.numel() >= 200} == {x.untyped_storage().data_ptr()}


@named(SELECTIVE_SCAN)
def test_selective_scan_keeps_no_state_of_a_token(case):
    """For the backward pass: inputs and the states that enter chunks, together a fraction of [T, D, N]."""
    inputs = case.sample(512, B=1, H=4, K=8, V=32, dtype=torch.float32)
    kept: dict[int, int] = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        case("chunked", **{name: x.requires_grad_() for name, x in inputs.items()})
    states = 512 * 32 * 32
    assert max(kept.values()) <= states / 32
    assert sum(kept.values()) <= states / 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@named(CASES)
def test_state_keeps_no_sequence_alive(case, packed, backend):
    """A view of a longer tensor would hold all of it for as long as a cache holds the state."""
    inputs = case.sample(200, B=1, N=2 if packed else None, K=5, V=3)
    index = {"cu_seqlens": torch.tensor([0, 70, 200])} if packed else {}
    _, state = case(backend, **inputs, **index)
    a_token = 8 * 5 * 3  # in float64; the window of a token-by-token convolution holds one input more than the state
    assert state.untyped_storage().nbytes() <= state.nbytes + a_token * state.shape[0]


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("T", [1, 67])
@named(CASES)
def test_outputs_are_no_windows_on_inputs(case, T, packed, backend):
    """A cache writes to the state it was given; that must change neither the inputs nor what else was returned."""
    inputs = case.sample(T, B=1, N=3 if packed else None, K=5, V=3, decay=case.hardest_decay)
    copies = {name: x.clone() for name, x in inputs.items()}
    index = {"cu_seqlens": torch.tensor([0, 0, T, T])} if packed else {}
    with torch.no_grad():
        o, state = case(backend, **inputs, **index)
        before = o.clone()
        state.fill_(torch.nan)
        assert torch.equal(o, before)
        o.fill_(torch.nan)
    for name, x in inputs.items():
        assert torch.equal(x, copies[name]), name
