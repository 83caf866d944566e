"""The fields of Mamba layers in a hybrid (Gu and Dao 2023, arXiv 2312.00752)."""

from __future__ import annotations

from hf_linear.decoder import LinearConfig


class MambaLayerConfig(LinearConfig):
    """Mamba layers. Transformers has a model of Mamba layers alone; these are for `linear_hybrid`.

    Args:
        state_size: N, the state's numbers a channel.
        expand: channels / hidden_size.
        conv_kernel: taps of the short convolution.
        time_step_rank: rank of the step size's projection, None for hidden_size / 16, rounded up.
        time_step_min: least initial step size.
        time_step_max: largest initial step size.
        use_conv_bias: whether the convolution has a bias.
        use_bias: whether the input and output projections have one.
        inner_layernorms: whether the step size, B and C are normalised, as Jamba's are.
    """

    model_type = "mamba"
    mixer = "mamba"

    state_size: int = 16
    expand: int = 2
    conv_kernel: int = 4
    time_step_rank: int | None = None
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    use_conv_bias: bool = True
    use_bias: bool = False
    inner_layernorms: bool = False

    def __post_init__(self, **kwargs) -> None:
        if self.time_step_rank is None:
            self.time_step_rank = -(-self.hidden_size // 16)
        super().__post_init__(**kwargs)
        self.check_least(state_size=1, expand=1, conv_kernel=1, time_step_rank=1)
        if not 0 < self.time_step_min <= self.time_step_max:
            raise ValueError(
                f"time_step_min must be above 0 and at most time_step_max = {self.time_step_max}, "
                f"got {self.time_step_min}: leave both out for the published 0.001 and 0.1"
            )
