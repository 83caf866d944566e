"""Hybrids by the name of the model whose plan they follow, in its published width and depth.

Each says which layers mix tokens how, what stands behind them, and how attention knows positions. They are plans, not copies:
where a published model has a part that is not here, the comment says what stands in its place. "jamba" and "granite-4" are
exact: they are what the checkpoints of these models open as. docs/hybrids.md has them side by side.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # Jamba-v0.1, 52B (arXiv 2403.19887): attention in layer 4 of 8, without positions; experts in every second layer.
    "jamba": {
        "pattern": "MMMMAMMM",
        "mlp_pattern": "DS",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_heads": 32,
        "num_kv_heads": 8,
        "intermediate_size": 14336,
        "num_experts": 16,
        "norm_topk_prob": False,
        "vocab_size": 65536,
        "max_position_embeddings": 262144,
        "pad_token_id": 0,
        "mixer_options": {"mamba": {"inner_layernorms": True}},
    },
    # Granite-4.0-H-Small, 32B: 9:1 Mamba-2, attention in layer 5 of 10 without positions, many small experts beside shared
    # ones, and its multipliers.
    "granite-4": {
        "pattern": "NNNNNANNNN",
        "num_hidden_layers": 40,
        "hidden_size": 4096,
        "num_heads": 32,
        "num_kv_heads": 8,
        "attention_multiplier": 1 / 128,
        "embedding_multiplier": 12,
        "residual_multiplier": 0.22,
        "logits_scaling": 16,
        "num_experts": 72,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 768,
        "num_shared_experts": 2,
        "norm_eps": 1e-5,
        "vocab_size": 100352,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "mixer_options": {"mamba2": {"num_heads": 128}},
    },
    # Qwen3-Next-80B-A3B: 3:1, gated attention with normalised q and k of which a quarter turns. GLA with as large a state
    # stands in for its gated delta rule; the shared expert has no gate.
    "qwen3-next": {
        "pattern": "GGGA",
        "num_hidden_layers": 48,
        "hidden_size": 2048,
        "num_heads": 16,
        "num_kv_heads": 2,
        "head_dim": 256,
        "attention_output_gate": True,
        "use_qk_norm": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "num_shared_experts": 1,
        "vocab_size": 151936,
        "max_position_embeddings": 262144,
        "mixer_options": {
            "gla": {"num_heads": 32, "num_kv_heads": 32, "expand_k": 2.0, "expand_v": 2.0, "use_short_conv": True}
        },
    },
    # MiniMax-Text-01, 456B (arXiv 2501.08313): 7:1, attention turns half of its channels, experts everywhere. Retention stands
    # in for lightning attention, which has other decays and no rotation; residuals are not scaled.
    "minimax": {
        "pattern": "RRRRRRRA",
        "num_hidden_layers": 80,
        "hidden_size": 6144,
        "num_heads": 64,
        "num_kv_heads": 8,
        "head_dim": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5},
        "num_experts": 32,
        "moe_intermediate_size": 9216,
        "norm_eps": 1e-5,
        "vocab_size": 200064,
        "max_position_embeddings": 10240000,
        "mixer_options": {"retention": {"num_kv_heads": 64, "expand_k": 4 / 3, "expand_v": 4 / 3}},
    },
    # Samba-421M (arXiv 2406.07522): Mamba and a window of 2048 tokens in turn.
    "samba": {
        "pattern": "MS",
        "num_hidden_layers": 12,
        "hidden_size": 1536,
        "num_heads": 12,
        "intermediate_size": 4096,
        "sliding_window": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    # Zamba2-2.7B (arXiv 2411.15242): after every six Mamba-2 layers without an MLP, a block of attention and MLP. All its sites
    # share its weights, but for adapters of rank 128, here in all its products. Theirs are two blocks in turn, which also read
    # the embeddings.
    "zamba": {
        "pattern": "NNNNNNZ",
        "mlp_pattern": "------D",
        "num_hidden_layers": 63,
        "hidden_size": 2560,
        "num_heads": 32,
        "intermediate_size": 10240,
        "hidden_act": "gelu",
        "adapter_rank": 128,
        "norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "mixer_options": {"mamba2": {"num_heads": 80, "num_kv_heads": 80, "state_size": 64}},
    },
}
