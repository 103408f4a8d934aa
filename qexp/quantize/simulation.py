"""More bits than INT8 kernels hold, simulated in float.

A model of 9 to 16 bits is quantized as one of 8, by the same flow and calibration, which says what is quantized and
where. Its Q/DQ program is then computed on finer grids: activations on one over the range that their observer finds for
it, weights anew from the float ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from qexp.quantize import qdq
from qexp.quantize.calibration.grid import QUANT_MAX, Grid, Side, asked_grid
from qexp.quantize.calibration.observers import observers, on_grid, to_qparams
from qexp.quantize.flow import QuantizedModel
from qexp.quantize.graph.exported import CUSTOM, attribute, is_program
from qexp.quantize.graph.tensor_names import tensor_names, tensor_of
from qexp.quantize.qdq.operators import decomposed
from qexp.quantize.qdq.program import BOUNDS, TENSOR
from qexp.quantize.torch_backend.engines import engine
from qexp.records import Layer, QParams

_QUANTIZE = decomposed.quantize_per_tensor.default
_DEQUANTIZE = decomposed.dequantize_per_tensor.default
_DEQUANTIZE_CHANNELS = decomposed.dequantize_per_channel.default
_OF_WEIGHTS = (torch.qint8, torch.int8)

Step = tuple[float, int]
"""A scale and a zero point."""


@dataclass(frozen=True, eq=False)
class SimulatedModel(QuantizedModel):
    """A model of more than 8 bits, whose module is a Q/DQ program. coarse: the same with 8 bits in place of more."""

    coarse: QuantizedModel

    @cached_property
    def qparams(self) -> dict[str, QParams]:
        names = tensor_names(self.prepared.module)
        activations = {names[name]: finer for name, _, finer in _activations(self.coarse) if name in names}
        return self.coarse.qparams | activations | {name: finer for name, _, finer in _weights(self.coarse)}

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """As in the base class, with `simulated` for a kernel."""
        return tuple(replace(layer, kernel="simulated" if layer.int8 else "") for layer in self.coarse.layers)


def simulated(coarse: QuantizedModel, example: Tensor) -> SimulatedModel:
    """Return the model with the bits that its settings ask for. coarse: with 8 in place of more; example: float32
    [n, 3, H, W].

    Raises UnsupportedError where it has no Q/DQ program.
    """
    with engine(coarse.engine):
        program = qdq.program(coarse.module, example, every_clamp=True)
    finer = asked_grid(coarse.qconfig, Side.activations)
    if finer.qmax > QUANT_MAX:
        steps = {_step(before): _step(after) for _, before, after in _activations(coarse)}
        _refine_activations(program.graph, finer, lambda step: steps.get(step) or _divided(step, finer))
    weights = {name: (weight, after) for name, weight, after in _weights(coarse)}
    for node in program.graph.nodes:
        if node.target in (_DEQUANTIZE, _DEQUANTIZE_CHANNELS) and node.args[0].op == "get_attr":
            name = node.args[0].meta.get(CUSTOM, {}).get(TENSOR)
            if name in weights:
                _refine_weight(program, node, *weights[name])
    program.recompile()
    return SimulatedModel(coarse.prepared, program, coarse)


def _activations(coarse: QuantizedModel) -> Iterator[tuple[str, QParams, QParams]]:
    """Yield, for each observer of activations, its name, and the parameters on the kernels' grid and on the finer."""
    grid = asked_grid(coarse.qconfig, Side.activations)
    if grid.qmax > QUANT_MAX:
        for name, observer in observers(coarse.prepared.module).items():
            if observer.dtype not in _OF_WEIGHTS:
                yield name, to_qparams(observer), to_qparams(on_grid(observer, grid))


def _weights(coarse: QuantizedModel) -> Iterator[tuple[str, Tensor, QParams]]:
    """Yield, for each weight with more than 8 bits, its name, the float weight, and the parameters."""
    grid = asked_grid(coarse.qconfig, Side.weights)
    if grid.qmax > QUANT_MAX // 2:
        for name, weight, observer in _weight_observers(coarse):
            finer = on_grid(observer, grid)
            finer(weight)
            yield name, weight, to_qparams(finer, getattr(finer, "ch_axis", None))


def _weight_observers(coarse: QuantizedModel) -> Iterator[tuple[str, Tensor, Any]]:
    """Yield each weight's name, the weight, and an observer that has not seen it."""
    prepared = coarse.prepared.module
    if not is_program(coarse.module):
        from qexp.quantize.torch_backend.layers import weight_observers

        for name, (weight, observer) in weight_observers(prepared).items():
            yield name, weight, observer
    watching = observers(prepared)
    for node in prepared.graph.nodes if isinstance(prepared, fx.GraphModule) else ():
        observer = watching.get(str(node.target)) if node.op == "call_module" else None
        if observer is not None and observer.dtype in _OF_WEIGHTS:
            fresh = copy.deepcopy(observer)
            fresh.min_val, fresh.max_val = torch.empty(0), torch.empty(0)
            yield tensor_of(node), attribute(prepared, node.all_input_nodes[0]), fresh


def _step(qparams: QParams) -> Step:
    return float(qparams.scale[0]), int(qparams.zero_point[0])


def _divided(step: Step, finer: Grid) -> Step:
    """Return a step of the kernels' grid divided into those of a finer one, for a tensor without an observer: one that
    a kernel scales by a number."""
    times = finer.levels // (QUANT_MAX + 1)
    return step[0] / times, step[1] * times


def _refine_activations(graph: fx.Graph, finer: Grid, of: Callable[[Step], Step]) -> None:
    """Let the operators quantize to and dequantize from the finer grid, in place. of: from a step of the kernels'
    grid."""

    def refined(node: fx.Node) -> Step:
        return of((float(np.float32(node.args[1])), int(node.args[2])))  # type: ignore[arg-type]

    before = {node: refined(node) for node in graph.nodes if node.target is _QUANTIZE}
    for node in graph.nodes:
        if node in before or (node.target is _DEQUANTIZE and node.args[0].op != "get_attr"):
            step = before.get(node) or refined(node)
            node.args = (node.args[0], *step, finer.qmin, finer.qmax, torch.int32)
        elif BOUNDS in node.meta.get(CUSTOM, {}):
            scale, zero_point = before[node.args[0]]
            codes = np.rint(np.array(node.meta[CUSTOM][BOUNDS]) / scale) + zero_point
            node.args = (node.args[0], *(int(code) for code in codes.clip(finer.qmin, finer.qmax)))


def _refine_weight(program: fx.GraphModule, node: fx.Node, weight: Tensor, finer: QParams) -> None:
    """Quantize a weight anew, in place. node: dequantizes it."""
    source, *rest = node.args
    assert isinstance(source, fx.Node)
    scale, zero_point = torch.from_numpy(finer.scale), torch.from_numpy(finer.zero_point)
    along = [1] * weight.ndim
    if finer.axis is not None:
        along[finer.axis] = -1
    codes = (weight.double() / scale.double().view(along)).round() + zero_point.view(along)
    shape = program.get_buffer(str(source.target)).shape
    _replace(program, source, codes.clamp(finer.qmin, finer.qmax).to(torch.int16).reshape(shape))
    grid = finer.qmin, finer.qmax, torch.int16
    if node.target is _DEQUANTIZE:
        node.args = (source, *_step(finer), *grid)
        return
    scales, zero_points, axis = rest[:3]
    _replace(program, scales, scale)
    _replace(program, zero_points, zero_point.to(torch.int32))
    node.args = (source, scales, zero_points, axis, *grid)


def _replace(program: fx.GraphModule, node: Any, value: Tensor) -> None:
    """Replace the buffer that a node reads, in place."""
    path, _, name = str(node.target).rpartition(".")
    program.get_submodule(path).register_buffer(name, value)
