"""The contract, training: layers computed again change no gradient, and bfloat16 is close to float64."""

import copy
import re

import pytest
import torch
from contract import (
    assert_equal_to_rounding,
    documents,
    every_config,
    every_model,
    gradients,
    logits_and_gradients,
    pad,
    weights_like,
)
from families import PRESETS, ids, logits, one_layer_of_each_kind, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_linear.mixers.hyena import HyenaFilter


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # 5.17 knows no other name
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not_reentrant", "reentrant"])
@every_model
def test_gradient_checkpointing(name, use_reentrant):
    """Computing the layers again changes no gradient: plain, packed and padded."""
    depth = one_layer_of_each_kind(name) if name in PRESETS else {}
    model = tiny_model(name, **depth).train()
    x, mask = pad(documents(9, 17), "left", 20)
    row = ids(1, 40)
    forms = {
        "plain": lambda: model(x).logits,
        "padded": lambda: model(x, attention_mask=mask).logits,
        "packed": lambda: model(row, cu_seq_lens_q=torch.tensor([0, 7, 40])).logits,
    }
    expected = {form: logits_and_gradients(model, call) for form, call in forms.items()}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert model.is_gradient_checkpointing
    for form, call in forms.items():
        model.zero_grad()
        found = call()
        (weights_like(found) * found).sum().backward()  # the reentrant kind knows backward() only
        assert_equal_to_rounding(found, expected[form][0])
        actual = {n: p.grad for n, p in model.named_parameters()}
        for parameter, gradient in expected[form][1].items():
            zero = torch.zeros_like(gradient)
            found_gradient = zero if actual[parameter] is None else actual[parameter]
            assert_equal_to_rounding(found_gradient, gradient, f"gradients of {parameter}")


def filter_dtypes(model: PreTrainedModel) -> set[torch.dtype]:
    filters = [module for module in model.modules() if isinstance(module, HyenaFilter)]
    return {p.dtype for module in filters for p in module.parameters()}


@pytest.mark.parametrize("origin", ["to", "from_pretrained", "from_config"])
@every_config
def test_bfloat16(name, origin, tmp_path):
    """Finite logits and gradients, close to float64's; filters of Hyena, decays and recurrent states stay in float32."""
    if origin == "to":
        model = tiny_model(name).to(torch.bfloat16)
    elif origin == "from_pretrained":
        tiny_model(name, dtype=torch.float32).save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    else:
        model = AutoModelForCausalLM.from_config(tiny_config(name), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    wide = re.compile(r"\.implicit_filter\.|\.mixer\.(A_log|D|dt_bias)$")
    assert {p.dtype for n, p in model.named_parameters() if not wide.search(n)} == {torch.bfloat16}
    assert filter_dtypes(model) <= {torch.float32}
    x = ids(2, 70)
    output = model(x, use_cache=True)
    assert output.logits.dtype == torch.bfloat16
    for layer, kind in zip(output.past_key_values.layers, model.config.layer_types, strict=True):
        if kind == "linear_attention":
            assert layer.states["recurrent"].dtype == torch.float32
    found_gradients = gradients(model, output.logits.float().square().mean())
    assert all(g.isfinite().all() for g in found_gradients.values())
    exact = copy.deepcopy(model).double()
    error = (output.logits - logits(exact, x)).square().mean().sqrt() / logits(exact, x).square().mean().sqrt()
    # Each of about ten roundings a layer costs 2^-9 of the activations, and a layer or two amplify it a few times.
    assert error < 0.1, f"bfloat16 is {error:.3f} away from float64"
