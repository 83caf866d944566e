"""A chunk of a long prompt: attention sees all that is cached, in memory that does not grow with it."""

import pytest
import torch
from contract import assert_equal_gradients, assert_equal_to_rounding, logits_and_gradients
from families import ids, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Cache

from hf_linear.inputs import PREFIX
from hf_linear.mixers import attention

CHUNK = 32


def model_with_groups(num_kv_heads: int, dtype: torch.dtype = torch.float64):
    return tiny_model(
        "hybrid-rope",
        dtype=dtype,
        pattern="GA",
        num_hidden_layers=2,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        max_position_embeddings=32 * CHUNK,
    )


class Storages(TorchDispatchMode):
    """The storages of all that operators return, kept, so that none begins where another was."""

    def __init__(self):
        super().__init__()
        self.all = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.all += [x.untyped_storage() for x in tree_leaves(output) if isinstance(x, torch.Tensor)]
        return output

    def largest_beside(self, cache: Cache) -> int:
        held = {x.untyped_storage().data_ptr() for y in cache.layers if y.keys is not None for x in (y.keys, y.values)}
        return max(x.nbytes() for x in self.all if x.data_ptr() not in held)


@pytest.mark.parametrize("masked", [False, True], ids=["no_mask", "mask_of_ones"])
def test_memory_of_a_chunk_does_not_grow(monkeypatch, masked):
    """The largest tensor of a chunk, keys and values aside, is that of the second one after any number of others."""
    monkeypatch.setattr(attention, "PAIRS", 2 * CHUNK**2)  # of the second chunk, in the place of far longer ones
    model, x, cache, largest = model_with_groups(1), ids(1, 32 * CHUNK), None, []
    for part in x.split(CHUNK, 1):
        seen = len(largest) * CHUNK
        mask = torch.ones(1, seen + CHUNK, dtype=torch.long) if masked else None
        with torch.no_grad(), Storages() as made:
            cache = model(part, attention_mask=mask, past_key_values=cache, use_cache=True).past_key_values
        largest.append(made.largest_beside(cache))
    assert largest[-1] == largest[1], largest


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_slices_are_exact(monkeypatch, num_kv_heads):
    """Slices of three, two and one of the queries give the logits and gradients of one call."""
    monkeypatch.setattr(attention, "PAIRS", 50)
    model, x = model_with_groups(num_kv_heads), ids(2, 37)

    def in_calls():
        cache, found = None, []
        for part in x.split([9, 7, 1, 20], 1):
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits)
        return torch.cat(found, 1)

    expected, gradients = logits_and_gradients(model, lambda: model(x, use_cache=False).logits)
    found, in_slices = logits_and_gradients(model, in_calls)
    assert_equal_to_rounding(found, expected)
    assert_equal_gradients(in_slices, gradients)


def attend(q, k, v, groups):
    module = torch.nn.Module()
    module.num_key_value_groups = groups
    return attention.prefix_attention(module, q, k, v, PREFIX, scaling=0.3)[0]


def masked_attention(q, k, v, groups):
    k, v = (y.repeat_interleave(groups, dim=1) for y in (k, v))
    T, S = q.shape[2], k.shape[2]
    scores = 0.3 * q @ k.transpose(-1, -2) + q.new_full((T, S), -torch.inf).triu(S - T + 1)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def test_a_compiled_layer_takes_a_prefix(monkeypatch):
    """Compiled on its own, a layer is handed what the model made of the mask outside of the graph."""
    monkeypatch.setattr(attention, "PAIRS", 200)
    q, k, v = torch.randn(2, 6, 15, 8), torch.randn(2, 2, 63, 8), torch.randn(2, 2, 63, 8)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, 3), masked_attention(q, k, v, 3))


def on_a_gpu(H: int, kv_heads: int, T: int, S: int, width: int, dtype: torch.dtype):
    shapes = (H, T), (kv_heads, S), (kv_heads, S)
    return [torch.randn(1, heads, length, width, device="cuda", dtype=dtype) for heads, length in shapes]


@pytest.mark.gpu
@pytest.mark.parametrize("width", [36, 64, 128])  # FlashAttention takes multiples of 8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefix_on_a_gpu(dtype, width):
    """Values and gradients of both ways beside those in float64."""
    x = on_a_gpu(16, 2, 100, 777, width, dtype)
    found, expected = [y.clone().requires_grad_() for y in x], [y.double().requires_grad_() for y in x]
    o, o64 = attend(*found, 8), masked_attention(*expected, 8)
    do = torch.randn_like(o)
    pairs = zip(torch.autograd.grad(o, found, do), torch.autograd.grad(o64, expected, do.double()), strict=True)
    # The weights of softmax are rounded to bfloat16's 8 bits; products in float32 may go through the 11 of TF32.
    bound = 2**-6 if dtype == torch.bfloat16 else 2**-9
    for y, y64 in [(o, o64), *pairs]:
        assert (y.double() - y64).norm() <= bound * y64.norm()


@pytest.mark.gpu
def test_memory_of_a_prefix_on_a_gpu():
    """Half of what a mask of 16 bits would need, a quarter of what repeated keys would."""
    H, T, S, width = 16, 1024, 65536, 128
    q, k, v = on_a_gpu(H, 1, T, S, width, torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend(q, k, v, H)
    assert torch.cuda.max_memory_allocated() - before < T * S
