"""The short causal convolution as a module."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from hf_linear.modules.padding import right_align, take
from hf_linear.ops import short_conv, short_conv_step
from hf_linear.ops.dispatch import needs_gradient


class ShortConv(nn.Conv1d):
    """Depthwise causal convolution of x [B, T, D] with `kernel_size` taps; its parameters are those of the nn.Conv1d."""

    def __init__(self, dim: int, kernel_size: int, bias: bool = False, activation: Literal["silu"] | None = None):
        super().__init__(dim, dim, kernel_size, groups=dim, bias=bias)
        self.activation = activation

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns y [B, T, D] and the state [B, kernel_size - 1, D]: the last real inputs of every row.

        One token without a mask and a gradient writes it into the state that was given.
        """
        return convolve(self, self.activation, x, mask, cu_seqlens, state)


def convolve(
    conv: nn.Conv1d,
    activation: Literal["silu"] | None,
    x: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What `ShortConv` returns, by the parameters of any depthwise nn.Conv1d."""
    w = conv.weight.squeeze(1)
    if mask is None and state is not None and x.shape[1] == 1 and not needs_gradient(x, w, conv.bias, state):
        return short_conv_step(x, w, conv.bias, state=state, activation=activation)
    if mask is None:
        return short_conv(x, w, conv.bias, activation=activation, initial_state=state, cu_seqlens=cu_seqlens)
    past = x.new_zeros(x.shape[0], w.shape[1] - 1, x.shape[2]) if state is None else state
    sequence, place = right_align(mask, past, x)
    y, state = short_conv(sequence, w, conv.bias, activation=activation)
    return take(y, place), state
