"""What Transformers' common tests ask of every model, without a checkout: its gradients, and steps of Trainer."""

import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother
from transformers_common import close, every_family, model_of, tensors_of, tokens

from hf_linear.mixers.hyena import HyenaFilter


def gradients(model: PreTrainedModel, x: Tensor) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    model(x, labels=x).loss.backward()
    return {key: p.grad for key, p in model.named_parameters() if p.requires_grad}


@every_family
def test_every_parameter_learns(name):
    found = gradients(model_of(name), tokens(2, 9))
    assert [key for key, g in found.items() if g is None or not g.isfinite().all() or not g.any()] == []


@pytest.mark.filterwarnings("ignore::FutureWarning")  # its newest name is not in every version supported
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@every_family
def test_gradient_checkpointing_changes_no_gradient(name, use_reentrant):
    model, x = model_of(name), tokens(2, 9)
    expected = gradients(model, x)
    expected = {key: g.clone() for key, g in expected.items()}
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert model.is_gradient_checkpointing
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    hook = model.model.layers[0].mixer.register_forward_pre_hook(count)
    if use_reentrant:
        model.enable_input_require_grads()
    found = gradients(model, x)
    assert calls == 2  # forward, and again in the backward pass
    hook.remove()
    for key, g in expected.items():
        close(found[key], g)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


@every_family
def test_inputs_can_require_gradients(name):
    """As PEFT asks for: frozen weights, and gradients that flow through them."""
    model = model_of(name).train()
    model.requires_grad_(False)
    model.enable_input_require_grads()
    assert model(tokens(2, 7), labels=tokens(2, 7)).loss.requires_grad


class Rows(torch.utils.data.Dataset):
    """Rows of one length whose numbers of labels are unequal."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        x = tokens(8, 16)[i]
        labels = x.clone()
        labels[: 2 * i] = -100
        return {"input_ids": x, "labels": labels}


def trainer(model: PreTrainedModel, folder, **options) -> Trainer:
    arguments = {
        "learning_rate": 0.1,
        "optim": "sgd",
        "max_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        **options,
    }
    return Trainer(model, TrainingArguments(str(folder), **arguments), train_dataset=Rows())


@pytest.mark.parametrize("name", ["gla", "linear-elu", "hyena", "hybrid-sliding"])
def test_accumulated_gradients_are_those_of_a_large_batch(name, tmp_path):
    """With unequal numbers of labels, only a loss divided by `num_items_in_batch` gives the same step."""
    results = []
    for batch, steps in ((8, 1), (2, 4)):
        model = model_of(name)
        run = trainer(model, tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=steps)
        assert run.model_accepts_loss_kwargs
        loss = run.train().training_loss
        results.append((loss, tensors_of(model)))
    (loss, weights), (other_loss, other_weights) = results
    assert math.isclose(loss, other_loss, rel_tol=1e-5)
    start = tensors_of(model_of(name))
    assert any(not torch.equal(weights[key], start[key]) for key in weights)
    for key, x in weights.items():
        close(other_weights[key], x)


@pytest.mark.parametrize("name", ["gla", "hybrid-rope"])
def test_label_smoothing_shifts_labels(name, tmp_path):
    """Trainer shifts them only for the class names that it knows as causal language models."""
    model = model_of(name).eval()
    run = trainer(model, tmp_path, label_smoothing_factor=0.1)
    x = tokens(2, 9)
    with torch.no_grad():
        found = run.compute_loss(model, {"input_ids": x, "labels": x.clone()})
        expected = LabelSmoother(epsilon=0.1)(model(x), x, shift_labels=True)
    close(found, expected)


def test_a_filter_hands_out_no_parameter():
    """FSDP2 frees the parameters of a module when its forward ends; what it returned has to outlive them."""
    (hyena_filter,) = (m for m in model_of("hyena", num_hidden_layers=1).modules() if isinstance(m, HyenaFilter))
    parameters = {p.untyped_storage().data_ptr() for p in hyena_filter.parameters()}
    assert all(output.untyped_storage().data_ptr() not in parameters for output in hyena_filter(5))
