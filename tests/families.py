"""Tiny models of every family for the tests: each config varies what the mixers branch on.

Their parameters are drawn anew with a spread that trained models have. At initialisation most weights are so small that a
wrong state moves no logit, biases are zero, and every GLA decay is close to 1/2 to the power 1/16.
"""

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

import hf_linear
from hf_linear import LinearHybridConfig
from hf_linear.config import LinearConfig
from hf_linear.mixers.gla import GatedLinearAttention
from hf_linear.mixers.hyena import HyenaFilter

VOCAB = 64
LONGEST = 256  # the filters of Hyena

TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": LONGEST,
    "bos_token_id": None,
    "eos_token_id": None,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
TORCHSCALE = {
    "expand_v": 1.0,
    "rope_style": "interleaved",
    "rope_frequencies": "linspace",
    "elementwise_affine": False,
    "retention_norm": "decay",
}
SMALL_HYENA = {"filter_order": 16, "filter_emb_dim": 5}
JAMBA = {
    "inner_layernorms": True,
    "state_size": 6,
    "conv_kernel": 3,
    "time_step_rank": 5,
    "use_conv_bias": False,
    "use_bias": True,
}
MAMBA2 = {"num_heads": 4, "state_size": 6, "n_groups": 2, "conv_kernel": 3, "use_bias": True, "time_step_limit": [0.2, 2.0]}
SLIDING = {"sliding_window": 8, "rope_parameters": ROPE}
EVERY_MIXER = {
    "pattern": "GRLHMNAS",
    "num_hidden_layers": 8,
    "mixer_options": {"gla": {"use_short_conv": True}, "hyena": SMALL_HYENA, "mamba2": {"state_size": 16}},
    **SLIDING,
}
SHARED = {
    "pattern": "GZZ",
    "mlp_pattern": "-DD",
    "num_hidden_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "adapter_rank": 3,
    "attention_bias": True,
    "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
}
GATED = {"attention_output_gate": True, "use_qk_norm": True}
SPARSE = {
    "pattern": "GA",
    "mlp_layer_types": ["sparse", "dense"],
    "num_experts": 5,
    "moe_intermediate_size": 24,
    "num_shared_experts": 1,
}

# name: model type as in the Auto classes, and what the config says beyond TINY
CONFIGS: dict[str, tuple[str, dict]] = {
    "gla": ("gla", {}),
    "gla-conv-kv-phi": (
        "gla",
        {
            "num_heads": 4,
            "num_kv_heads": 2,
            "use_short_conv": True,
            "feature_map": "relu",
            "clamp_min": -3.0,
            "output_gate_bias": True,
        },
    ),
    "gla-no-gate": (
        "gla",
        {"use_output_gate": False, "head_norm": "layer", "elementwise_affine": False, "expand_k": 0.75, "num_heads": 4},
    ),
    "retnet": ("retnet", {}),
    "retnet-torchscale": ("retnet", {**TORCHSCALE, "embedding_multiplier": 4.0, "use_embedding_norm": True}),
    "retnet-kv": ("retnet", {"num_heads": 4, "num_kv_heads": 2, "use_output_gate": False, "feature_map": "silu"}),
    "linear-elu": ("linear_attention", {"feature_map": "elu"}),
    "linear-relu-kv": ("linear_attention", {"feature_map": "relu", "num_heads": 4, "num_kv_heads": 2}),
    "linear-identity": ("linear_attention", {"feature_map": "identity", "expand_k": 0.5}),
    "linear-softmax": ("linear_attention", {"feature_map": "softmax", "expand_v": 2.0}),
    "hyena": ("hyena", SMALL_HYENA),
    "hyena-order3": ("hyena", {**SMALL_HYENA, "hyena_order": 3, "short_filter_order": 4, "filter_shift": 0.05}),
    "hyena-plain-filter": ("hyena", {**SMALL_HYENA, "filter_modulate": False, "filter_normalize": True}),
    "hybrid-rope": ("linear_hybrid", {"pattern": "GGGA", "num_hidden_layers": 4, "rope_parameters": ROPE}),
    "hybrid-nope": ("linear_hybrid", {"pattern": "GGGA", "num_hidden_layers": 4, "num_kv_heads": 1, **GATED}),
    "hybrid-sliding": ("linear_hybrid", {"pattern": "RS", "mixer_options": {"retention": TORCHSCALE}, **SLIDING}),
    "hybrid-mamba": ("linear_hybrid", {"pattern": "MMA", "num_hidden_layers": 3}),
    "hybrid-jamba": ("linear_hybrid", {"pattern": "MA", "mixer_options": {"mamba": JAMBA}}),
    "hybrid-mamba2": ("linear_hybrid", {"pattern": "NA", "mixer_options": {"mamba2": MAMBA2}}),
    "hybrid-every-mixer": ("linear_hybrid", EVERY_MIXER),
    "hybrid-sparse": ("linear_hybrid", SPARSE),
    "hybrid-shared": ("linear_hybrid", SHARED),
}
# Hybrids by the name of a preset, as deep as their pattern at least, and what is tiny in them beyond TINY.
FEW_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
PRESETS: dict[str, dict] = {
    "jamba": {"num_hidden_layers": 8, "num_kv_heads": 1, **FEW_EXPERTS},
    "granite-4": {"num_hidden_layers": 10, "num_kv_heads": 1, "mixer_options": {"mamba2": {"state_size": 8}}, **FEW_EXPERTS},
    "qwen3-next": {"num_hidden_layers": 4, "num_kv_heads": 1, "head_dim": 16, "mixer_options": None, **FEW_EXPERTS},
    "minimax": {"num_hidden_layers": 8, "num_kv_heads": 1, "head_dim": 8, "mixer_options": None, **FEW_EXPERTS},
    "samba": {"num_hidden_layers": 4, "sliding_window": 8},
    "zamba": {"num_hidden_layers": 7, "adapter_rank": 3, "mixer_options": {"mamba2": {"state_size": 8}}},
}
FAMILIES = {"gla": "GLA", "retnet": "RetNet", "linear_attention": "LinearAttention", "hyena": "Hyena"}
FAMILIES["linear_hybrid"] = "LinearHybrid"
HYENA = [name for name in CONFIGS if "hyena" in name or "every" in name]
SLIDING_WINDOW = [name for name in CONFIGS if "sliding" in name or "every" in name]
FIXED_STATE = [name for name, (family, _) in CONFIGS.items() if family in ("gla", "retnet", "linear_attention")]
WITHOUT_HYENA = [name for name in CONFIGS if name not in HYENA]
# One of each kind of mixer, for what costs too much to run on all.
ONE_OF_EACH = ["gla-conv-kv-phi", "retnet-torchscale", "linear-relu-kv", "hyena-order3", "hybrid-every-mixer"]


def tiny_config(name: str, **overrides) -> LinearConfig:
    if name in PRESETS:
        return LinearHybridConfig.from_preset(name, **{**TINY, **PRESETS[name], **overrides})
    family, options = CONFIGS[name]
    return getattr(hf_linear, f"{FAMILIES[family]}Config")(**{**TINY, **options, **overrides})


def one_layer_of_each_kind(preset: str) -> dict:
    """What makes a preset as shallow as it can be, for what costs too much at its own depth."""
    patterns = {name: LinearHybridConfig.presets[preset].get(name) for name in ("pattern", "mlp_pattern")}
    kinds = {name: "".join(dict.fromkeys(letters)) for name, letters in patterns.items() if letters}
    return {**kinds, "num_hidden_layers": len(kinds["pattern"])}


def tiny_model(name: str, head: str = "ForCausalLM", dtype: torch.dtype = torch.float64, **overrides) -> PreTrainedModel:
    """A model in eval mode, its parameters the same at every call."""
    config = tiny_config(name, **overrides)
    model = getattr(hf_linear, f"{FAMILIES[config.model_type]}{head}")(config)
    return spread_parameters(model).to(dtype).eval()


@torch.no_grad()
def spread_parameters(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(0)

    def noise(p: Tensor) -> Tensor:
        return torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)

    for module in model.modules():
        if isinstance(module, HyenaFilter):  # its sines turn noise into a filter of noise: keep them smooth
            module.out.weight.copy_(noise(module.out.weight) / 16)
            module.skip.copy_(noise(module.skip))
            continue
        for name, p in module.named_parameters(recurse=False):
            if p.dim() > 1:
                fan_in = p[0].numel() if not isinstance(module, nn.Embedding) else 1
                p.copy_(noise(p) * fan_in**-0.5)
            elif name == "weight":  # of a norm
                p.copy_(1 + noise(p) / 4)
            else:
                p.copy_(noise(p) / 4)
        if isinstance(module, GatedLinearAttention):
            module.gk_proj[1].bias.copy_(2 * noise(module.gk_proj[1].bias))
    embedding, head = model.get_input_embeddings().weight, getattr(model, "lm_head", None)
    if head is not None and head.weight is not embedding:
        head.weight.sub_(embedding / 10)  # a token that seldom follows itself, or greedy decoding settles on one
    return model


def ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def logits(model: PreTrainedModel, input_ids: Tensor, **kwargs) -> Tensor:
    """Logits of one call without a cache."""
    with torch.no_grad():
        return model(input_ids, use_cache=False, **kwargs).logits


def new_cache(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config)
