"""Biases that qnnpack can't hold: it answers nonsense for channels that BatchNorm all but switched off."""

from __future__ import annotations

from typing import Any

import torch
import torch.ao.nn.quantized as nnq
from torch import Tensor, nn

from qexp.config import Engine
from qexp.quantize.engines import engine

# Half of int32, so that there is room for the sums that are added.
_LARGEST = 1 << 30
_LAYERS = (nnq.Conv1d, nnq.Conv2d, nnq.Conv3d, nnq.Linear)


def fit_biases(converted: nn.Module) -> None:
    """In place, let a model that was converted for qnnpack answer as if it kept biases as they are.

    It rounds a bias to a whole number of (scale of the input · scale of the weights) and holds that in 32 bits. Where a
    channel's weights are all but 0, its bias is beyond them, and wraps around. Before a layer runs, such a channel's
    weights go to the finest scale that its bias fits, which moves their sum by less than the bias · 10⁻⁷ for each term.
    """
    for module in converted.modules():
        if isinstance(module, _LAYERS):
            module.register_forward_pre_hook(_fit)


def _fit(layer: Any, inputs: tuple[Tensor, ...]) -> None:
    bias = layer.bias()
    if bias is None:
        return
    weight, scales, zero_points = _per_channel(layer.weight())
    least = bias.detach().abs().double() / (_LARGEST * inputs[0].q_scale())
    if bool((scales >= least).all()):
        return
    wide = torch.maximum(scales, least)
    shape = (-1, *[1] * (weight.dim() - 1))
    zero = zero_points.view(shape)
    values = ((weight - zero) * (scales / wide).view(shape)).round() + zero
    fitting = torch._make_per_channel_quantized_tensor(values.to(torch.int8), wide, zero_points, 0)
    with engine(Engine.qnnpack):
        layer.set_weight_bias(fitting, bias)


def _per_channel(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Integers of a quantized weight, int32, and of each output channel its scale, float64, and zero point, int64."""
    values = weight.int_repr().int()
    if weight.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
        return values, weight.q_per_channel_scales().double(), weight.q_per_channel_zero_points().long()
    count = len(weight)
    return values, torch.full((count,), weight.q_scale()).double(), torch.full((count,), weight.q_zero_point())
