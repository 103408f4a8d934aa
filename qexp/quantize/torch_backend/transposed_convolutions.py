"""Transposed convolutions: their BatchNorms, and those that torch's INT8 kernels compute wrongly and that stay in FP32.

Measured with torch 2.13 against the same sums in float64, with 7-bit activations, which nothing saturates with:

- oneDNN reads the weights of a transposed convolution as if it had as many input as output channels: where it hasn't,
  answers are off by 100 steps of their grid and more. It refuses output paddings.
- FBGEMM has a kernel of its own for a window of height 2 without padding, strides of 1 or 2, one group, and channels
  that are multiples of 8 on both sides: its answers are another at every call.

- qnnpack reads the weights of a three-dimensional one in another order.

All others that were tried are right to half a step.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from qexp.config.schema import Engine

# Which library computes them under an engine: x86 has either, by the CPU and by what oneDNN takes.
_ONEDNN = (Engine.onednn, Engine.x86)
_FBGEMM = (Engine.fbgemm, Engine.x86)


def why_float(module: nn.Module, engine: Engine) -> str:
    """Why this float layer has to stay in FP32 with this engine; empty where it hasn't."""
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
        return "FBGEMM's INT8 kernel for such windows answers at random"
    return ""


def _is_direct(conv: _ConvTransposeNd) -> bool:
    """Whether FBGEMM takes its kernel for direct convolution."""
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
    """Take a BatchNorm with running statistics into the transposed convolution before it, in place.

    The weights are [in, out / groups, ...]; torch's fuse_conv_bn_eval takes them as if there were one group.
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
