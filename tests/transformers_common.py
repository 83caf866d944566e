"""What the tests of Transformers' common demands share: the models of every family, in float32 with a padding token."""

import pytest
import torch
from families import ids, tiny_model
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from hf_linear.mixers.hyena import HyenaFilter

NAMES = ["gla", "gla-conv-kv-phi", "retnet", "linear-elu", "hyena", "hybrid-rope", "hybrid-sliding"]
NAMES += ["hybrid-sparse", "hybrid-shared"]
PAD = 0
# Logits are of order 1 in float32. A wrong state, mask or weight moves them by 1e-3 and more in these models.
ROUNDING = {"rtol": 1e-5, "atol": 3e-5}

every_family = pytest.mark.parametrize("name", NAMES)
HEADS = {
    "Model": (AutoModel, "MODEL_MAPPING_NAMES"),
    "ForCausalLM": (AutoModelForCausalLM, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "ForSequenceClassification": (
        AutoModelForSequenceClassification,
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    ),
    "ForTokenClassification": (AutoModelForTokenClassification, "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"),
}
every_head = pytest.mark.parametrize("head", HEADS)


def model_of(name: str, head: str = "ForCausalLM", **options) -> PreTrainedModel:
    return tiny_model(name, head, dtype=torch.float32, pad_token_id=PAD, **options)


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return ids(*shape, seed=seed).clamp(min=1)  # 0 is padding


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, **ROUNDING)


def tensors_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def filters_of(model: PreTrainedModel) -> tuple[str, ...]:
    """The prefixes of Hyena's filters."""
    return tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, HyenaFilter))
