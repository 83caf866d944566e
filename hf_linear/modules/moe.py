"""Mixture of experts in place of an MLP: every token goes through the k experts that its router scores highest.

A token's experts follow from the token alone: an expert has no capacity and drops nothing, so no row depends on its neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface, use_experts_implementation
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from hf_linear.modules.mlp import GatedMLP


def grouped_mm(experts: Experts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Transformers' own, but for float64 and tensors without data, which PyTorch's grouped product does not take."""
    name = "batched_mm" if x.dtype == torch.float64 or x.is_meta else "grouped_mm"
    return ALL_EXPERTS_FUNCTIONS[name](experts, x, index, weights)


IMPLEMENTATIONS = ExpertsInterface()  # Transformers' table, also of what is registered later, with one entry of ours
IMPLEMENTATIONS["grouped_mm"] = grouped_mm


class TopKRouter(nn.Module):
    """p = softmax(W x) over all experts; the k largest p, and whose they are.

    With `norm_topk_prob` the chosen p are divided by their sum, as in Mixtral (arXiv 2401.04088); without it they stay as they
    are, as in Jamba (arXiv 2403.19887).
    """

    def __init__(self, config):
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """W x [N, E], the weights [N, k] and the experts [N, k] of tokens x [N, D]."""
        logits = self.proj(x)
        p = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weights, index = p.topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(x.dtype), index


@use_experts_implementation(experts_interface=IMPLEMENTATIONS)
class Experts(nn.Module):
    """y = sum_i w_i down_i(act(gate_i(x)) * up_i(x)) over the chosen experts i of a token.

    The weights of all experts lie in two tensors, in the layout of Transformers' experts interface: it runs this forward for
    "eager", an expert at a time, and its own for the other values of `experts_implementation`.
    """

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * config.moe_intermediate_size, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, config.moe_intermediate_size))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in index.unique().tolist():
            token, place = torch.where(index == expert)
            gate, up = F.linear(x[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            output = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            y.index_add_(0, token, (output * weights[token, place, None]).to(y.dtype))
        return y


class SparseMLP(nn.Module):
    """The experts that the router chooses, and the shared experts, which every token goes through.

    Shared experts side by side are one MLP as wide as all of them.
    """

    def __init__(self, config):
        super().__init__()
        self.router = TopKRouter(config)
        self.experts = Experts(config)
        shared = config.num_shared_experts * config.moe_intermediate_size
        self.shared_experts = GatedMLP(config, shared) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        _, weights, index = self.router(tokens)
        y = self.experts(tokens, index, weights).view_as(x)
        return y if self.shared_experts is None else y + self.shared_experts(x)


def load_balancing_loss(router_logits: tuple[Tensor, ...], top_k: int, real: Tensor) -> Tensor:
    """E sum_i f_i P_i: f_i the share of tokens that go to expert i, P_i its mean probability (arXiv 2101.03961, eq. 4 to 6).

    Args:
        router_logits: [B T, E] of every sparse layer; the means are over all of them.
        real: [B, T], 0 on padding. Without it, Transformers counts in a way that older versions cannot compile.
    """
    logits = tuple(layer.float() for layer in router_logits)  # the softmax that is made of them is in their dtype
    return load_balancing_loss_func(logits, logits[0].shape[-1], top_k, real)
