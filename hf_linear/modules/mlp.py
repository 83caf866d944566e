"""Channel mixing."""

from torch import Tensor, nn
from transformers.activations import ACT2FN

from hf_linear.modules.fused import available, is_bare
from hf_linear.modules.projections import project


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), SwiGLU for hidden_act "silu" (arXiv 2002.05202)."""

    def __init__(self, config, intermediate_size: int | None = None):
        super().__init__()
        intermediate_size = intermediate_size or config.intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act = ACT2FN[config.hidden_act]
        self.is_swiglu = config.hidden_act in ("silu", "swish")

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project(x, self.gate_proj, self.up_proj)
        if self.is_swiglu and available(gate):
            from hf_linear.kernels import fused

            if is_bare(self.down_proj):
                return fused.swiglu_product(self.down_proj.weight, gate, up)
            return self.down_proj(fused.swiglu(gate, up))
        return self.down_proj(self.act(gate) * up)


class MLP(nn.Module):
    """fc2(act(fc1(x))), with biases: GPT-2's, which Hyena's models keep."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))
