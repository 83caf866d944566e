"""hf_linear: linear-recurrent models for Hugging Face Transformers. Importing it registers them with the Auto classes."""

import warnings

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_linear import models
from hf_linear.models import *  # noqa: F403
from hf_linear.native import accelerate, restore
from hf_linear.version import __version__

__all__ = ["__version__", "accelerate", "restore", *models.__all__]


def register() -> None:
    """Register every family, leaving model types alone that another library registered first."""
    auto_classes = {
        "MODEL_MAPPING_NAMES": AutoModel,
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": AutoModelForCausalLM,
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": AutoModelForSequenceClassification,
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": AutoModelForTokenClassification,
    }
    for config, *classes in [*models.FAMILIES, *models.LAYOUTS]:
        other = CONFIG_MAPPING[config.model_type].__module__ if config.model_type in CONFIG_MAPPING else __name__
        if other.split(".")[0] != __name__:  # a class of ours from an earlier import is replaced
            warnings.warn(
                f"model_type {config.model_type!r} belongs to {other}, which was imported first: the Auto classes open it "
                f"with that library. Import hf_linear before it, or use hf_linear.{config.__name__} and its models by name.",
                stacklevel=3,
            )
            continue
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for (names, auto_class), cls in zip(auto_classes.items(), classes, strict=False):  # a layout has no classes
            auto_class.register(config, cls, exist_ok=True)
            getattr(modeling_auto, names)[config.model_type] = cls.__name__  # Trainer and pipelines go by these names


register()
