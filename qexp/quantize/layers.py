"""What a converted model executes: which layers run in INT8, which stayed in FP32, and with which parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.ao.nn.quantized as nnq
import torch.ao.nn.quantized.dynamic as nnqd
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.nn.intrinsic.modules.fused import _FusedModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from qexp.config import Engine, Flow
from qexp.quantize.names import public, tensor_names, tensor_of
from qexp.quantize.observers import observers, to_qparams
from qexp.quantize.transposed import why_float
from qexp.results import Layer, QParams

_INT8_CONV = (nnq.Conv1d, nnq.Conv2d, nnq.Conv3d, nnq.ConvTranspose1d, nnq.ConvTranspose2d, nnq.ConvTranspose3d)
_INT8_NORM = (nnq.BatchNorm2d, nnq.BatchNorm3d)
_FUNCTIONS = {
    F.conv1d: "conv",
    F.conv2d: "conv",
    F.conv3d: "conv",
    F.conv_transpose2d: "conv_transpose",
    F.linear: "linear",
    F.batch_norm: "batchnorm",
}


def conv_kind(weight: torch.Size, groups: int) -> str:
    """depthwise, grouped, pointwise or conv, from a weight's shape [out, in / groups, ...]."""
    if groups > 1:
        return "depthwise" if weight[1] == 1 else "grouped"
    return "pointwise" if all(size == 1 for size in weight[2:]) else "conv"


def layers(converted: nn.Module, flow: Flow, engine: Engine) -> tuple[Layer, ...]:
    """Every convolution, linear layer and BatchNorm of a converted model, in the order of its modules."""
    found: list[Layer] = []
    for name, module in converted.named_modules():
        layer = _layer(public(name, converted), module, flow, engine)
        if layer is not None:
            found.append(layer)
    if isinstance(converted, fx.GraphModule):
        found.extend(_functional_layers(converted.graph, engine))
    return tuple(found)


def _layer(name: str, module: nn.Module, flow: Flow, engine: Engine) -> Layer | None:
    kind = _kind(module)
    if kind is None:
        return None
    if isinstance(module, (*_INT8_CONV, *_INT8_NORM, nnq.Linear, nnqd.Linear)):
        dynamic = " (dynamic)" if isinstance(module, nnqd.Linear) else ""
        return Layer(name, kind, True, kernel=f"{engine.value} {kind}{dynamic}")
    return Layer(name, kind, False, reason=_why_float(module, flow, engine))


def _kind(module: nn.Module) -> str | None:
    if isinstance(module, (*_INT8_NORM, _BatchNorm)):
        return "batchnorm"
    if isinstance(module, nnq.Linear | nnqd.Linear | nn.Linear):
        return "linear"
    if isinstance(module, (*_INT8_CONV, _ConvNd)):
        if "Transpose" in type(module).__name__:
            return "conv_transpose"
        weight = module.weight() if callable(module.weight) else module.weight
        return conv_kind(weight.shape, module.groups)
    return None


def _why_float(module: nn.Module, flow: Flow, engine: Engine) -> str:
    if ".reference." in type(module).__module__:
        return "this engine has no INT8 kernel for it: it runs in FP32 between a dequantize and a quantize"
    if flow is Flow.dynamic:
        return "flow=dynamic quantizes linear layers only"
    if getattr(module, "never_runs", False):
        return "never runs in evaluation"
    if reason := why_float(module, engine):
        return reason
    return f"flow={flow.value} has no INT8 module for {type(module).__name__}"


def _functional_layers(graph: fx.Graph, engine: Engine) -> Iterator[Layer]:
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in _FUNCTIONS:
            reason = "its weights are computed by the model, not constant"
            yield Layer(tensor_of(node), _FUNCTIONS[node.target], False, reason=reason)
        elif getattr(node.target, "__module__", "") == "torch._ops.quantized" or "quantized." in str(node.target):
            operation = str(node.target).removeprefix("quantized.")
            kind = next((k for k in ("conv", "linear", "batch_norm") if operation.startswith(k)), None)
            if kind is not None:
                kind = "batchnorm" if kind == "batch_norm" else kind
                yield Layer(tensor_of(node), kind, True, kernel=f"{engine.value} {kind}")


def read_qparams(module: nn.Module) -> dict[str, QParams]:
    """Quantization parameters by tensor name: those of activations under the module or operation that makes them, those
    of weights under the layer's name with `.weight`.

    Of a prepared model they are what convert will read from the observers, grid included. A converted model no longer
    knows a narrowed grid: qmin and qmax are then those of its 8-bit type.
    """
    return _prepared_qparams(module) if observers(module) else _converted_qparams(module)


def _prepared_qparams(prepared: nn.Module) -> dict[str, QParams]:
    names = tensor_names(prepared)
    found = {names[name]: to_qparams(observer) for name, observer in observers(prepared).items() if name in names}
    for name, module in prepared.named_modules():
        layer = module[0] if isinstance(module, _FusedModule) else module
        qconfig = getattr(module, "qconfig", None)
        if qconfig is None or not isinstance(layer, _ConvNd | nn.Linear) or _inside_fused(prepared, name):
            continue
        observer = qconfig.weight()
        observer(layer.weight)
        axis = 0 if "channel" in str(observer.qscheme) else None
        found[f"{public(name, prepared)}.weight"] = to_qparams(observer, axis)
    return found


def _inside_fused(prepared: nn.Module, name: str) -> bool:
    return isinstance(prepared.get_submodule(name.rpartition(".")[0]), _FusedModule)


def _converted_qparams(converted: nn.Module) -> dict[str, QParams]:
    found: dict[str, QParams] = {}
    for name, module in converted.named_modules():
        label = public(name, converted)
        if isinstance(getattr(module, "scale", None), float | Tensor) and hasattr(module, "zero_point"):
            found[label] = _qparams(module.scale, module.zero_point, torch.iinfo(torch.uint8))
        weight = getattr(module, "weight", None)
        if callable(weight) and isinstance(tensor := weight(), Tensor) and tensor.is_quantized:
            found[f"{label}.weight"] = _weight_qparams(tensor)
    return found


def weight_scales(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of a quantized weight its scales, float64, and zero points, int64: [channels], or [1] where all share one."""
    if is_per_channel(weight):
        return weight.q_per_channel_scales().double(), weight.q_per_channel_zero_points().long()
    return torch.tensor([weight.q_scale()], dtype=torch.float64), torch.tensor([weight.q_zero_point()])


def is_per_channel(weight: Tensor) -> bool:
    return weight.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)


def _weight_qparams(weight: Tensor) -> QParams:
    axis = weight.q_per_channel_axis() if is_per_channel(weight) else None
    return _qparams(*weight_scales(weight), torch.iinfo(torch.int8), axis)


def _qparams(scale: Any, zero_point: Any, limits: torch.iinfo, axis: int | None = None) -> QParams:
    return QParams(
        scale=np.atleast_1d(np.asarray(scale, dtype=np.float32)),
        zero_point=np.atleast_1d(np.asarray(zero_point, dtype=np.int64)),
        qmin=limits.min,
        qmax=limits.max,
        axis=axis,
    )
