"""Biases that overflow in qnnpack: its outputs are wrong for channels that BatchNorm all but switched off."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.ao.nn.quantized as nnq
from torch import Tensor, nn

from qexp.config.schema import Engine
from qexp.quantize.torch_backend.engines import engine
from qexp.quantize.torch_backend.layers import weight_scales

# Half of int32, which leaves room for the accumulated products.
_LARGEST = 1 << 30
_LAYERS = (nnq.Conv1d, nnq.Conv2d, nnq.Conv3d, nnq.Linear)


def fit_biases(converted: nn.Module) -> None:
    """Keep the biases of a model that was converted for qnnpack from overflowing, in place.

    qnnpack rounds a bias to a multiple of (scale of the input · scale of the weights), a 32-bit integer. If a channel's
    weights are all but 0, so is their scale, and the integer wraps around. Before a layer runs, such a channel's
    weights get the finest scale that its bias fits, which changes their sum by less than the bias · 10⁻⁷ for each term.
    """
    for module in converted.modules():
        if isinstance(module, _LAYERS) and module.bias() is not None:
            module.register_forward_pre_hook(_Fit())


class _Fit:
    """A layer's forward pre-hook. Biases that fit an input scale also fit a larger one, so few calls check weights."""

    def __init__(self) -> None:
        self._fits = math.inf

    def __call__(self, layer: Any, inputs: tuple[Tensor, ...]) -> None:
        scale = inputs[0].q_scale()
        if scale < self._fits:
            _fit(layer, scale)
            self._fits = scale


def _fit(layer: Any, input_scale: float) -> None:
    bias = layer.bias()
    scales, zero_points = (each.expand(len(bias)) for each in weight_scales(layer.weight()))
    least = bias.detach().abs().double() / (_LARGEST * input_scale)
    if bool((scales >= least).all()):
        return
    wide, weight = torch.maximum(scales, least), layer.weight().int_repr().int()
    shape = (-1, *[1] * (weight.dim() - 1))
    zero = zero_points.view(shape)
    values = ((weight - zero) * (scales / wide).view(shape)).round() + zero
    fitting = torch._make_per_channel_quantized_tensor(values.to(torch.int8), wide, zero_points, 0)
    with engine(Engine.qnnpack):
        layer.set_weight_bias(fitting, bias)
