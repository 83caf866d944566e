"""The families. Each file is a config, its choice of mixers, and names."""

from hf_linear.models.gla import (
    GLAConfig,
    GLAForCausalLM,
    GLAForSequenceClassification,
    GLAForTokenClassification,
    GLAModel,
)
from hf_linear.models.hyena import (
    HyenaConfig,
    HyenaDNAConfig,
    HyenaForCausalLM,
    HyenaForSequenceClassification,
    HyenaForTokenClassification,
    HyenaModel,
)
from hf_linear.models.linear_attention import (
    LinearAttentionConfig,
    LinearAttentionForCausalLM,
    LinearAttentionForSequenceClassification,
    LinearAttentionForTokenClassification,
    LinearAttentionModel,
)
from hf_linear.models.linear_hybrid import (
    LinearHybridConfig,
    LinearHybridForCausalLM,
    LinearHybridForSequenceClassification,
    LinearHybridForTokenClassification,
    LinearHybridModel,
)
from hf_linear.models.retnet import (
    RetNetConfig,
    RetNetForCausalLM,
    RetNetForSequenceClassification,
    RetNetForTokenClassification,
    RetNetModel,
)

# config, backbone, causal LM, sequence classification, token classification
FAMILIES = [
    (
        GLAConfig,
        GLAModel,
        GLAForCausalLM,
        GLAForSequenceClassification,
        GLAForTokenClassification,
    ),
    (
        RetNetConfig,
        RetNetModel,
        RetNetForCausalLM,
        RetNetForSequenceClassification,
        RetNetForTokenClassification,
    ),
    (
        LinearAttentionConfig,
        LinearAttentionModel,
        LinearAttentionForCausalLM,
        LinearAttentionForSequenceClassification,
        LinearAttentionForTokenClassification,
    ),
    (
        HyenaConfig,
        HyenaModel,
        HyenaForCausalLM,
        HyenaForSequenceClassification,
        HyenaForTokenClassification,
    ),
    (
        LinearHybridConfig,
        LinearHybridModel,
        LinearHybridForCausalLM,
        LinearHybridForSequenceClassification,
        LinearHybridForTokenClassification,
    ),
]

# Layouts of other libraries, which the Auto classes read as a family above.
LAYOUTS = [(HyenaDNAConfig,)]

__all__ = [cls.__name__ for family in [*FAMILIES, *LAYOUTS] for cls in family]
