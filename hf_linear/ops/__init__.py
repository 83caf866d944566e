"""One public function a recurrence. Each takes tensors and returns (o, final_state)."""

from hf_linear.ops.gated_linear_attention import gated_linear_attention
from hf_linear.ops.linear_attention import linear_attention
from hf_linear.ops.long_conv import long_conv
from hf_linear.ops.long_conv_step import long_conv_ahead, long_conv_step
from hf_linear.ops.retention import retention_chunkwise, retention_decay, retention_parallel, retention_recurrent
from hf_linear.ops.selective_scan import selective_scan, selective_scan_step
from hf_linear.ops.short_conv import short_conv, short_conv_step
from hf_linear.ops.step import recurrent_step

__all__ = [
    "gated_linear_attention",
    "linear_attention",
    "long_conv",
    "long_conv_ahead",
    "long_conv_step",
    "recurrent_step",
    "retention_chunkwise",
    "retention_decay",
    "retention_parallel",
    "retention_recurrent",
    "selective_scan",
    "selective_scan_step",
    "short_conv",
    "short_conv_step",
]
