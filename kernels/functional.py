"""Operations under names that no folder of `kernels` has: `from amfm.kernels import delta_rule`; docs/kernels_from_python.md."""

from amfm.kernels.attention.op import attention as softmax_attention
from amfm.kernels.causal_conv1d.op import causal_conv1d as short_convolution
from amfm.kernels.decay_scan.op import decay_scan as gated_linear_attention
from amfm.kernels.decay_scan.op import mamba2_scan
from amfm.kernels.delta_scan.op import delta_scan as delta_rule
from amfm.kernels.linear_cross_entropy.op import linear_cross_entropy as fused_linear_cross_entropy
from amfm.kernels.norm.op import gated_rms_norm, rms_norm
from amfm.kernels.rope.op import qk_norm_rope, rope_frequencies
from amfm.kernels.swiglu.op import squared_relu
from amfm.kernels.swiglu.op import swiglu as silu_gate

__all__ = [
    "delta_rule",
    "fused_linear_cross_entropy",
    "gated_linear_attention",
    "gated_rms_norm",
    "mamba2_scan",
    "qk_norm_rope",
    "rms_norm",
    "rope_frequencies",
    "short_convolution",
    "silu_gate",
    "softmax_attention",
    "squared_relu",
]
