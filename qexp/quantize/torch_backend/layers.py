"""The layers of a converted model, in INT8 and in FP32, and their quantization parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.ao.nn.quantized as nnq
import torch.ao.nn.quantized.dynamic as nnqd
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.nn.intrinsic.modules.fused import _FusedModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from qexp.config.schema import Engine
from qexp.quantize.calibration.observers import observed_qparams, observers, to_qparams
from qexp.quantize.graph.tensor_names import public, tensor_of
from qexp.quantize.inspection.programs import conv_kind
from qexp.quantize.torch_backend.float_layers import why_float
from qexp.records import Layer, QParams

if TYPE_CHECKING:
    from qexp.quantize.flow import Flow

_INT8_CONV = (nnq.Conv1d, nnq.Conv2d, nnq.Conv3d, nnq.ConvTranspose1d, nnq.ConvTranspose2d, nnq.ConvTranspose3d)
_INT8_NORM = (nnq.BatchNorm2d, nnq.BatchNorm3d)
_FUNCTIONS = {
    F.conv1d: "conv",
    F.conv2d: "conv",
    F.conv3d: "conv",
    F.conv_transpose1d: "conv_transpose",
    F.conv_transpose2d: "conv_transpose",
    F.conv_transpose3d: "conv_transpose",
    F.linear: "linear",
    F.batch_norm: "batchnorm",
}


def layers(converted: nn.Module, flow: Flow, engine: Engine) -> tuple[Layer, ...]:
    """Return all convolutions, linear and recurrent layers and BatchNorms of a converted model, in modules' order."""
    found: list[Layer] = []
    wholes = _wholes(converted)
    for name, module in converted.named_modules():
        label, whole = public(name, converted), _whole_of(name, wholes)
        for layer, kind in _kinds(label, module):
            if isinstance(module, (*_INT8_CONV, *_INT8_NORM, nnq.Linear, nnqd.Linear)):
                dynamic = " (dynamic)" if isinstance(module, nnqd.Linear) else ""
                found.append(Layer(layer, kind, True, kernel=f"{engine.value} {kind}{dynamic}"))
            else:
                found.append(Layer(layer, kind, False, reason=_why_float(module, kind, whole, flow, engine)))
    if isinstance(converted, fx.GraphModule):
        found.extend(_functional_layers(converted.graph, flow, engine))
    return tuple(found)


def _kinds(name: str, module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield names and kinds of a module's own layers: none, one, or the input projections of attention."""
    kind = _kind(module)
    if kind is not None:
        yield name, kind
    elif type(module) is nn.MultiheadAttention:
        projections = ["in_proj"] if module.in_proj_weight is not None else ["q_proj", "k_proj", "v_proj"]
        for projection in projections:
            yield f"{name}.{projection}".lstrip("."), "linear"


def _wholes(converted: nn.Module) -> dict[str, nn.Module]:
    """Return, by name, torch's modules that compute their submodules' part themselves: attention, and in a graph all it
    calls."""
    modules = dict(converted.named_modules())
    if isinstance(converted, fx.GraphModule):
        called = {str(node.target) for node in converted.graph.nodes if node.op == "call_module"}
        return {name: module for name, module in modules.items() if name in called}
    return {name: module for name, module in modules.items() if type(module) is nn.MultiheadAttention}


def _whole_of(name: str, wholes: Mapping[str, nn.Module]) -> nn.Module | None:
    """Return the outermost of these modules that contains this one; None if there is none."""
    parts = name.split(".")
    around = (".".join(parts[:length]) for length in range(1, len(parts)))
    return next((wholes[outer] for outer in around if outer in wholes), None)


def _kind(module: nn.Module) -> str | None:
    if isinstance(module, (*_INT8_NORM, _BatchNorm)):
        return "batchnorm"
    if isinstance(module, nnq.Linear | nnqd.Linear | nn.Linear):
        return "linear"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "recurrent"
    if isinstance(module, (*_INT8_CONV, _ConvNd)):
        if "Transpose" in type(module).__name__:
            return "conv_transpose"
        weight = module.weight() if callable(module.weight) else module.weight
        return conv_kind(weight.shape, module.groups)
    return None


def _why_float(module: nn.Module, kind: str, whole: nn.Module | None, flow: Flow, engine: Engine) -> str:
    if getattr(module, "never_runs", False):
        return "never runs in evaluation"
    kept_whole = whole if whole is not None else module if isinstance(module, nn.MultiheadAttention) else None
    if kept_whole is not None:
        return f"part of a {type(kept_whole).__name__}, which flow={flow.name} leaves in FP32 as a whole"
    if reason := flow.leaves_in_float(module, kind):
        return reason
    if reason := why_float(module, engine):
        return reason
    if ".reference." in type(module).__module__:
        return f"flow={flow.name} found no INT8 kernel for it here: it runs in FP32 on values that were INT8"
    return f"flow={flow.name} has no INT8 module for {type(module).__name__}"


def _functional_layers(graph: fx.Graph, flow: Flow, engine: Engine) -> Iterator[Layer]:
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in _FUNCTIONS:
            yield Layer(tensor_of(node), _FUNCTIONS[node.target], False, reason=_why_function_is_float(node, flow))
        elif getattr(node.target, "__module__", "") == "torch._ops.quantized" or "quantized." in str(node.target):
            operation = str(node.target).removeprefix("quantized.")
            kinds = ("conv_transpose", "conv", "linear", "batch_norm")
            kind = next((k for k in kinds if operation.startswith(k)), None)
            # If the model computes the weights, they are packed in each call.
            if kind is not None and "prepack" not in operation:
                kind = "batchnorm" if kind == "batch_norm" else kind
                yield Layer(tensor_of(node), kind, True, kernel=f"{engine.value} {kind}")


def _why_function_is_float(node: fx.Node, flow: Flow) -> str:
    weights = [n for n in node.all_input_nodes[1:] if n.op != "get_attr"]
    if weights:
        return "its weights are computed by the model, not constant"
    return f"flow={flow.name} has no INT8 kernel for {getattr(node.target, '__name__', node.target)}"


def read_qparams(module: nn.Module) -> dict[str, QParams]:
    """Return quantization parameters by tensor name: an activation's is the module or operation that computes it, a
    weight's the layer's with `.weight`.

    For a prepared model they are those that convert will read from the observers, grid included. A converted model no
    longer knows a reduced grid: qmin and qmax are then those of its 8-bit type.
    """
    return _prepared_qparams(module) if observers(module) else _converted_qparams(module)


def _prepared_qparams(prepared: nn.Module) -> dict[str, QParams]:
    found = observed_qparams(prepared)
    for name, (weight, observer) in weight_observers(prepared).items():
        observer(weight)
        found[name] = to_qparams(observer, 0 if "channel" in str(observer.qscheme) else None)
    return found


def weight_observers(prepared: nn.Module) -> dict[str, tuple[Tensor, Any]]:
    """Return each float weight that convert quantizes, with an observer that hasn't seen it, by the layer's name with
    `.weight`."""
    found = {}
    for name, module in prepared.named_modules():
        owner = prepared.get_submodule(name.rpartition(".")[0])
        layer = module[0] if isinstance(module, _FusedModule) else module
        qconfig = getattr(module, "qconfig", None)
        if qconfig is not None and isinstance(layer, _ConvNd | nn.Linear) and not isinstance(owner, _FusedModule):
            found[f"{public(name, prepared)}.weight"] = (layer.weight, qconfig.weight())
    return found


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
    """Return a quantized weight's scales, float64, and zero points, int64: [channels], or [1] if per tensor."""
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
