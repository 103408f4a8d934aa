"""Transposed convolutions: folding of their BatchNorms, and those that stay in FP32 since INT8 kernels are wrong.

Measured with torch 2.13 against the same sums in float64, with 7-bit activations, so that nothing saturates:

- oneDNN reads the weights of a transposed convolution as if it had as many input as output channels: if it hasn't,
  outputs are off by 100 steps of their grid and more. It refuses output paddings.
- FBGEMM has a special kernel for a window of height 2 without padding, strides of 1 or 2, one group, and multiples of 8
  channels on both sides: its outputs differ from call to call.
- qnnpack reads the weights of a three-dimensional one in another order.

All others that were tried are right to half a step.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from qexp.config.schema import Engine

# The libraries that an engine uses; x86 chooses by the CPU and by what oneDNN supports.
_ONEDNN = (Engine.onednn, Engine.x86)
_FBGEMM = (Engine.fbgemm, Engine.x86)


def why_float(module: nn.Module, engine: Engine) -> str:
    """Return why this float layer must stay in FP32 with this engine; "" if it needn't."""
    if not isinstance(module, _ConvTransposeNd):
        return ""
    if engine is Engine.qnnpack and isinstance(module, nn.ConvTranspose3d):
        return "qnnpack's INT8 kernel in three dimensions is wrong"
    padded_output = any(module.output_padding)
    if engine is Engine.onednn and padded_output:
        return "oneDNN has no INT8 kernel for output paddings"
    if engine in _ONEDNN and not padded_output and module.in_channels != module.out_channels:
        return "oneDNN's INT8 kernel is wrong where input and output channels differ in number"
    if engine in _FBGEMM and _is_direct(module):
        return "FBGEMM's INT8 kernel for such windows has random outputs"
    return ""


def _is_direct(conv: _ConvTransposeNd) -> bool:
    """True if FBGEMM uses its kernel for direct convolution."""
    return (
        isinstance(conv, nn.ConvTranspose2d)
        and conv.groups == 1
        and conv.kernel_size[0] == 2
        and max(conv.stride) <= 2
        and not any(conv.padding)
        and conv.in_channels % 8 == 0
        and conv.out_channels % 8 == 0
    )


def fold(conv: _ConvTransposeNd, norm: _BatchNorm) -> None:
    """Fold a BatchNorm with running statistics into the transposed convolution before it, in place.

    Its weights are [in, out / groups, ...]; torch's fuse_conv_bn_eval supports only one group.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps) * (1 if norm.weight is None else norm.weight)
    of_group = scale.reshape(conv.groups, -1).repeat_interleave(conv.in_channels // conv.groups, dim=0)
    bias = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    shift = 0 if norm.bias is None else norm.bias
    weight = conv.weight * of_group.reshape(*of_group.shape, *[1] * len(conv.kernel_size))
    conv.weight = nn.Parameter(weight.detach(), requires_grad=False)
    conv.bias = nn.Parameter((bias * scale + shift).detach(), requires_grad=False)
