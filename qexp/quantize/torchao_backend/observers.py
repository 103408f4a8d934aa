"""Observers of torchao's interface, around the project's own recorder and ranges.

torchao's `convert_pt2e` lets an observer write its own operators into the graph: these write what kernels execute, and
the names of tensors. Activations are uint8, per tensor; where fewer codes are let through, their codes are clamped. A
weight is written as its codes, int8, so that nothing of the float one is left.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torchao.quantization.pt2e.observer import HistogramObserver, UniformQuantizationObserverBase

from qexp.config.schema import ActivationObserver, Observer, QConfig, WeightObserver
from qexp.quantize.calibration.grid import QUANT_MAX, executed_quant_max
from qexp.quantize.calibration.ranges import range_mse, range_mse_rows
from qexp.quantize.calibration.recording_observer import Recording, destination
from qexp.quantize.calibration.statistics_collector import statistics
from qexp.quantize.graph.exported import CUSTOM, attribute
from qexp.quantize.graph.tensor_names import tensor_of
from qexp.quantize.qdq.operators import decomposed
from qexp.quantize.qdq.program import TENSOR


class _Activation:
    """A mixin for observers of activations: writes how their tensor is quantized."""

    executed_quant_max: int

    def convert(self, module: fx.GraphModule, node: fx.Node) -> None:
        """Replace a call of this observer, in place, as `convert_pt2e` asks for."""
        scale, zero_point = (one.item() for one in self.calculate_qparams())  # type: ignore[attr-defined]
        parameters = scale, int(zero_point), 0, QUANT_MAX, torch.uint8
        graph, (source,) = module.graph, node.all_input_nodes
        with graph.inserting_before(node):
            codes = graph.call_function(decomposed.quantize_per_tensor.default, (source, *parameters))
            codes.meta[CUSTOM] = {**source.meta.get(CUSTOM, {}), TENSOR: tensor_of(node)}
            if self.executed_quant_max < QUANT_MAX:
                codes = graph.call_function(torch.ops.aten.clamp.default, (codes, 0, self.executed_quant_max))
            values = graph.call_function(decomposed.dequantize_per_tensor.default, (codes, *parameters))
        values.meta["val"] = source.meta["val"]
        node.replace_all_uses_with(values)
        graph.erase_node(node)


class RecordingObserver(_Activation, Recording, UniformQuantizationObserverBase):
    """torchao's interface to the activation observer `observer`."""


class Histogram(_Activation, HistogramObserver):
    """torchao's HistogramObserver; executed_quant_max: as in `Recording`."""

    def __init__(self, executed_quant_max: int = QUANT_MAX, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.executed_quant_max = executed_quant_max


class Weight(UniformQuantizationObserverBase):
    """Observes a weight once. axis: the dimension of its channels, None: one scale for all of it."""

    min_val: Tensor
    max_val: Tensor

    def __init__(self, kind: WeightObserver, axis: int | None, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.kind, self.ch_axis = kind, axis  # the second as torchao calls it
        self.register_buffer("min_val", torch.empty(0))
        self.register_buffer("max_val", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        if not self.min_val.numel():
            self.feed(x.detach())
        return x

    def feed(self, weight: Tensor) -> None:
        """Find the weight's range, for the grid that it is mapped onto now."""
        self.min_val, self.max_val = self._range(weight)

    def _range(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        if self.ch_axis is None:
            if self.kind is WeightObserver.minmax:
                low, high = torch.aminmax(weight)
                return low, high
            ends = range_mse(statistics(weight), *destination(self))
            return torch.tensor(ends[0]), torch.tensor(ends[1])
        rows = weight.movedim(self.ch_axis, 0).flatten(1)
        if self.kind is WeightObserver.minmax:
            low, high = torch.aminmax(rows, dim=1)
            return low, high
        lows, highs = range_mse_rows(rows.numpy(), *destination(self))
        return torch.from_numpy(lows), torch.from_numpy(highs)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        scale, zero_point = self._calculate_qparams(self.min_val, self.max_val)
        return scale, zero_point

    def convert(self, module: fx.GraphModule, node: fx.Node) -> None:
        """Replace a call of this observer, in place, as `convert_pt2e` asks for."""
        (source,), graph = node.all_input_nodes, module.graph
        weight = attribute(module, source)
        scale, zero_point = self.calculate_qparams()
        least, most = self.quant_min, self.quant_max
        tensors = {}
        if self.ch_axis is None:
            parameters: tuple[Any, ...] = float(scale), int(zero_point)
            codes = decomposed.quantize_per_tensor(weight, *parameters, least, most, torch.int8)
        else:
            codes = decomposed.quantize_per_channel(weight, scale, zero_point, self.ch_axis, least, most, torch.int8)
            tensors = {"scales": scale.float(), "zero_points": zero_point.to(torch.int8)}
        label = str(source.target).replace(".", "_")
        with graph.inserting_before(node):
            parts = {"codes": codes, **tensors}
            read = {part: _buffer(module, f"{label}_{part}", value) for part, value in parts.items()}
            if self.ch_axis is not None:
                parameters = read["scales"], read["zero_points"], self.ch_axis
            dequantize = decomposed.dequantize_per_tensor if self.ch_axis is None else decomposed.dequantize_per_channel
            values = graph.call_function(dequantize.default, (read["codes"], *parameters, -128, 127, torch.int8))
        read["codes"].meta[CUSTOM] = {TENSOR: tensor_of(node)}
        values.meta["val"] = source.meta["val"]
        node.replace_all_uses_with(values)
        graph.erase_node(node)


def _buffer(module: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    if not hasattr(module, name):  # the same weight at another place
        module.register_buffer(name, value)
    return module.graph.get_attr(name)


def activation_observer(qconfig: QConfig, observer: Observer) -> Any:
    """Return the constructor of the observer of activations."""
    executed = executed_quant_max(qconfig)
    if observer.name is not ActivationObserver.histogram:
        return RecordingObserver.with_args(observer=observer, executed_quant_max=executed)
    bins = {} if observer.bins is None else {"bins": observer.bins}
    return Histogram.with_args(executed_quant_max=executed, **bins)


def weight_observer(qconfig: QConfig, axis: int | None) -> Any:
    """Return the constructor of the observer of a layer's weights. axis: as in `Weight`."""
    return Weight.with_args(kind=qconfig.weight.observer, axis=axis)


def feed_weights(prepared: nn.Module) -> None:
    """Let observers of weights see them, in place: calibration may come from the cache."""
    assert isinstance(prepared, fx.GraphModule)
    for node in prepared.graph.nodes:
        if node.op == "call_module" and isinstance(observer := prepared.get_submodule(str(node.target)), Weight):
            observer(attribute(prepared, node.all_input_nodes[0]))
