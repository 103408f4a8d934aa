"""Layers that stay in FP32, since torch's INT8 counterparts compute something else, are too coarse, or don't exist.

torch's fx flow dequantizes before unsupported layers and quantizes behind them; in the eager flow a wrapper does.

Known faults of torch 2.13 on x86, besides transposed convolutions, each found by comparing the INT8 layer with its
float counterpart on the same dequantized input:

- GroupNorm and InstanceNorm of channels-last tensors, which convolutions return, have random outputs if a group has
  fewer than 64 values: so had all of 39 sizes below that, in 6 calls on 64 images, and none of 9 from 64 on.
- A softmax or sigmoid has a fixed scale of 1/256, which is coarse at the model's output.
- Average pooling with a divisor of its own keeps its input's grid, and its output may lie beyond.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import DeQuantStub, QuantStub
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode

from qexp.config.schema import Engine
from qexp.quantize.graph.hooks import attached
from qexp.quantize.graph.tracing import standard_type
from qexp.quantize.torch_backend import transposed_convolutions
from qexp.quantize.torch_backend.stride_bugs import contiguous_strides, strides_are_ambiguous

_VALUES_IN_A_GROUP = 64
RANDOM_NORM = f"torch's INT8 kernel has random outputs where a group has fewer than {_VALUES_IN_A_GROUP} values"
_WITHOUT_INT8 = (
    nn.PReLU,
    nn.CELU,
    nn.SELU,
    nn.SiLU,
    nn.Mish,
    nn.GLU,
    nn.Softplus,
    nn.Softsign,
    nn.LogSigmoid,
    nn.Softmax,
    nn.Softmax2d,
    nn.LogSoftmax,
    nn.AdaptiveMaxPool2d,
    nn.LPPool2d,
    nn.LocalResponseNorm,
    nn.RMSNorm,
    nn.ReplicationPad2d,
    nn.CircularPad2d,
)
_PROBABILITIES = (nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Sigmoid, nn.LogSigmoid)


class InFloat(nn.Module):
    """A layer of the eager flow that stays in FP32: dequantize, layer, quantize (except at the model's output).

    If its input is in FP32 already, so is its output.
    """

    parts_of_one_layer = ("layer", "quant")

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.dequant, self.layer = DeQuantStub(), layer
        self.quant = None if getattr(layer, _LAST, False) else QuantStub()

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layer(self.dequant(inputs))
        if self.quant is None or not (inputs.is_quantized or isinstance(self.quant, QuantStub)):
            return outputs
        quantized: Tensor = self.quant(outputs)
        return quantized


_REASON, _LAST = "stays_float", "computes_model_output"


def why_float(module: nn.Module, engine: Engine) -> str:
    """Return why this float layer must stay in FP32 with this engine; "" if it needn't."""
    return str(getattr(module, _REASON, "")) or transposed_convolutions.why_float(module, engine)


def norm_is_random(values: int) -> bool:
    """True if torch's INT8 instance and group norms have random outputs with this many values in a group."""
    return values < _VALUES_IN_A_GROUP


def mark_float_layers(module: nn.Module, example: Tensor) -> None:
    """Mark, in place, the layers of a model that must stay in FP32 in the eager flow, with the reason.

    Hooks are added, too, for layers whose output torch's INT8 functions need in another form: dequantized for a softmax
    at the model's output, with contiguous strides for a mean of 1x1 maps.

    example: float32 [n, 3, H, W], from which sizes of maps and the layers at the output are found.
    """
    seen = _Seen()
    seen.run(module, example[:1])
    for layer, inputs in seen.inputs.items():
        last = layer in seen.last
        reason = _reason(layer, inputs, last)
        if reason:
            layer.__dict__[_REASON], layer.__dict__[_LAST] = reason, last
    for layer in seen.before_probabilities:
        layer.register_forward_hook(dequantized)
    for layer in seen.before_mean:
        layer.register_forward_hook(contiguous_strides)


def dequantized(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """Return the output in FP32: a forward hook."""
    return output.dequantize() if output.is_quantized else output


def _reason(layer: nn.Module, inputs: torch.Size, last: bool) -> str:
    kind = standard_type(layer)
    if kind is None:
        return ""
    if issubclass(kind, nn.GroupNorm | _InstanceNorm):
        groups: Any = layer.num_groups if isinstance(layer, nn.GroupNorm) else layer.num_features
        return RANDOM_NORM if norm_is_random(math.prod(inputs[1:]) // groups) else ""
    if issubclass(kind, nn.AvgPool2d | nn.AvgPool3d):
        return "its divisor takes it beyond its input's range" if getattr(layer, "divisor_override", None) else ""
    if last and issubclass(kind, _PROBABILITIES):
        return "it computes the model's output, for which the fixed grid of 1/256 is too coarse"
    if issubclass(kind, _WITHOUT_INT8) or (issubclass(kind, nn.Upsample) and getattr(layer, "mode", "") == "bicubic"):
        return f"torch has no INT8 module for {kind.__name__} that computes the same"
    return ""


class _Seen(TorchFunctionMode):
    """Records how a model computes its output for an image.

    inputs: the shape of each layer's input, where input and output are tensors. last: the layers among `_PROBABILITIES`
    whose output is the model's; before_probabilities: the layers from whose output such a function computes the
    model's; before_mean: the layers whose output feeds a mean and has strides that are ambiguous in INT8.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[nn.Module, torch.Size] = {}
        self.last: set[nn.Module] = set()
        self.before_probabilities: set[nn.Module] = set()
        self.before_mean: set[nn.Module] = set()
        self._made_by: dict[int, nn.Module] = {}  # by address, the layer that wrote there last
        self._probabilities: list[tuple[Tensor, nn.Module, set[nn.Module]]] = []

    def run(self, module: nn.Module, image: Tensor) -> None:
        """Run and record one image, float32 [1, 3, H, W]."""
        layers = [layer for layer in module.modules() if not list(layer.children())]
        with torch.inference_mode(), self, attached(layer.register_forward_hook(self._after) for layer in layers):
            result = module(image.clone())
        for output, layer, found in self._probabilities:
            if isinstance(result, Tensor) and output.data_ptr() == result.data_ptr():
                found.add(layer)

    def _after(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            self.inputs[layer] = inputs[0].shape
            self._made_by[output.data_ptr()] = layer
            if isinstance(layer, _PROBABILITIES):
                self._probabilities.append((output, layer, self.last))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        source = args[0] if args and name in ("mean", "softmax", "log_softmax", "sigmoid") else None
        layer = self._made_by.get(source.data_ptr()) if isinstance(source, Tensor) else None
        if isinstance(source, Tensor) and layer is not None:
            if name == "mean" and source.ndim == 4 and strides_are_ambiguous(source.shape):
                self.before_mean.add(layer)
            elif name != "mean":
                self._probabilities.append((output, layer, self.before_probabilities))
        return output
