"""The fields of Mamba layers in a hybrid (Gu and Dao 2023, arXiv 2312.00752; Dao and Gu 2024, arXiv 2405.21060)."""

from __future__ import annotations

import math

from hf_linear.config import LinearConfig


class StateSpaceConfig(LinearConfig):
    """What Mamba and Mamba-2 layers have in common. Transformers has models of them alone; these are for `linear_hybrid`.

    Args:
        expand: channels / hidden_size.
        conv_kernel: taps of the short convolution.
        time_step_min: least initial step size.
        time_step_max: largest initial step size.
        use_conv_bias: whether the convolution has a bias.
        use_bias: whether the input and output projections have one.
    """

    expand: int = 2
    conv_kernel: int = 4
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    use_conv_bias: bool = True
    use_bias: bool = False

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        self.check_least(expand=1, conv_kernel=1)
        if not 0 < self.time_step_min <= self.time_step_max:
            raise ValueError(
                f"time_step_min must be above 0 and at most time_step_max = {self.time_step_max}, "
                f"got {self.time_step_min}: leave both out for the published 0.001 and 0.1"
            )


class MambaLayerConfig(StateSpaceConfig):
    """Mamba layers.

    Args:
        state_size: N, the state's numbers a channel.
        time_step_rank: rank of the step size's projection, None for hidden_size / 16, rounded up.
        inner_layernorms: whether the step size, B and C are normalised, as Jamba's are.
    """

    model_type = "mamba"
    mixer = "mamba"

    state_size: int = 16
    time_step_rank: int | None = None
    inner_layernorms: bool = False

    def __post_init__(self, **kwargs) -> None:
        if self.time_step_rank is None:
            self.time_step_rank = -(-self.hidden_size // 16)
        super().__post_init__(**kwargs)
        self.check_least(state_size=1, time_step_rank=1)


class Mamba2LayerConfig(StateSpaceConfig):
    """Mamba-2 layers. `num_heads` is the number of their heads, expand * hidden_size / 64 in every published model.

    Args:
        state_size: N, the width of B and C.
        n_groups: groups of heads that share a B and a C.
        time_step_limit: what step sizes are clamped to.
    """

    model_type = "mamba2"
    mixer = "mamba2"

    state_size: int = 128
    n_groups: int = 1
    time_step_limit: list[float] | tuple[float, ...] = (0.0, math.inf)

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        self.check_least(state_size=1)
        self.check_divides("n_groups", self.n_groups, "num_heads", self.num_heads)
        limit = tuple(self.time_step_limit)
        if len(limit) != 2 or not 0 <= limit[0] <= limit[1]:
            raise ValueError(
                f"time_step_limit must be two numbers, 0 <= least <= largest, got {self.time_step_limit}: "
                "leave it out for no limit"
            )
