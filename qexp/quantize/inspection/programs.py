"""Inspection of a Q/DQ program whose module computes it in float: layers, the error of each tensor, and a proof that it
is the float model's graph with rounding in between.

Nodes of the program and of the float graph that it was made from have the same names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from qexp.errors import RunError
from qexp.quantize.calibration.grid import QUANT_MAX
from qexp.quantize.graph.exported import CONVOLUTIONS, LAYERS, TRANSPOSED, aten, attribute, operation
from qexp.quantize.graph.placement import computed_by
from qexp.quantize.graph.tensor_names import tensor_of
from qexp.quantize.qdq.operators import decomposed
from qexp.quantize.qdq.program import CUSTOM, TENSOR, quantizing
from qexp.records import Fidelity, Layer
from qexp.statistics import decibels
from qexp.system import machine_lock

_DEQUANTIZE = {decomposed.dequantize_per_tensor.default, decomposed.dequantize_per_channel.default}
_ELSE = "the Q/DQ program computes something else than the float model"
_MOST_STEPS = 0.51  # of a weight's grid, which rounding explains


# ------------------------------------------------------------------------------------------------ layers


def program_layers(program: fx.GraphModule) -> tuple[Layer, ...]:
    """Return all convolutions, linear layers and BatchNorms of a program, in the order of execution."""
    return tuple(
        _layer(node) if node.target in LAYERS else Layer(tensor_of(node), "batchnorm", False, reason="")
        for node in program.graph.nodes
        if node.target in LAYERS or node.target is aten.batch_norm.default
    )


def _layer(node: fx.Node) -> Layer:
    name, kind = tensor_of(node), kind_of(node)
    if cast(fx.Node, node.args[1]).target in _DEQUANTIZE:
        return Layer(name, kind, True, kernel=f"Q/DQ {kind}")
    return Layer(name, kind, False, reason="its weights are computed by the model, not constant")


def kind_of(node: fx.Node) -> str:
    """Return the kind of a node that is a layer, as in `records.Layer`."""
    if node.target not in CONVOLUTIONS:
        return "linear"
    groups = dict(enumerate(node.args)).get(6, 1)
    shape = cast(fx.Node, node.args[1]).meta["val"].shape
    if not isinstance(groups, int):
        return "grouped"  # one for each image
    return "conv_transpose" if node.target in TRANSPOSED else conv_kind(shape, groups)


def conv_kind(weight: torch.Size, groups: int) -> str:
    """Return depthwise, grouped, pointwise or conv, by a weight's shape [out, in / groups, ...]."""
    if groups > 1:
        return "depthwise" if weight[1] == 1 else "grouped"
    return "pointwise" if all(size == 1 for size in weight[2:]) else "conv"


# ------------------------------------------------------------------------------------------------ the same graph


def check_program(fused: fx.GraphModule, program: fx.GraphModule) -> None:
    """Raise RunError, naming the layer, where a program without its quantize and dequantize operators isn't the graph
    that it was made from, or a weight is further than half a step from the float one."""
    before = {node.name: node for node in fused.graph.nodes}
    for node in program.graph.nodes:
        if _only_rounds(node) or node.op in ("get_attr", "placeholder"):
            continue
        expected = before.get(node.name)
        if expected is None or (node.op, node.target) != (expected.op, expected.target):
            raise RunError(f"{_ELSE}: {_called(node)} isn't in it.")
        mine, theirs = (_flat((one.args, one.kwargs)) for one in (node, expected))
        same = len(mine) == len(theirs) and all(_same(a, b, program, fused) for a, b in zip(mine, theirs, strict=True))
        if not same:
            raise RunError(f"{_ELSE}: {_called(node)} reads another tensor, or holds other weights.")


def _called(node: fx.Node) -> str:
    return tensor_of(node) or node.name


def _only_rounds(node: fx.Node) -> bool:
    """True for quantize and dequantize operators, and clamps of codes between them."""
    if node.target in _DEQUANTIZE or node.target is decomposed.quantize_per_tensor.default:
        return True
    sources = node.all_input_nodes
    return node.target is aten.clamp.default and sources[0].target is decomposed.quantize_per_tensor.default


def _flat(arguments: Any) -> list[Any]:
    found: list[Any] = []
    fx.node.map_aggregate(arguments, lambda one: found.append(one))
    return found


def _same(mine: Any, theirs: Any, program: fx.GraphModule, fused: fx.GraphModule) -> bool:
    if not isinstance(mine, fx.Node) or not isinstance(theirs, fx.Node):
        return bool(mine == theirs)
    if theirs.op == "get_attr":
        return _same_constant(mine, attribute(fused, theirs), program)
    while _only_rounds(mine):
        mine = mine.all_input_nodes[0]
    return mine.name == theirs.name


def _same_constant(node: fx.Node, expected: Tensor, program: fx.GraphModule) -> bool:
    """True for the node of a constant, or of a weight that is within half a step of it, but where its range ends."""
    if node.op == "get_attr":
        return torch.equal(attribute(program, node), expected)
    if node.target not in _DEQUANTIZE:
        return False
    codes, step = (attribute(program, one) if isinstance(one, fx.Node) else torch.tensor(one) for one in node.args[:2])
    axis = [-1 if step.ndim and dim == node.args[3] else 1 for dim in range(codes.ndim)]
    steps = (_dequantized(node, program) - expected).abs() / step.view(axis)
    inside = (codes > codes.min()) & (codes < codes.max())
    return bool((steps[inside] <= _MOST_STEPS).all())


def _dequantized(node: fx.Node, program: fx.GraphModule) -> Tensor:
    values: Tensor = cast(Any, node.target)(*fx.map_arg(node.args, lambda one: attribute(program, one)))
    return values


# ------------------------------------------------------------------------------------------------ errors


@dataclass
class _Site:
    """A tensor that is quantized on a grid of its own where it is computed, with its errors over all images so far.

    source: the node that computes it; rounding: the operators that quantize and dequantize it, in their order; ends: of
    the values that its codes can say, a step beyond; own_error: of its operator for the float model's input.
    """

    source: fx.Node
    rounding: list[fx.Node]
    ends: tuple[float, float]
    values: int = 0
    outside: int = 0
    signal: float = 0.0
    error: float = 0.0
    own_error: float = 0.0

    @property
    def rounded(self) -> str:
        """The name of the node that has its rounded values."""
        return self.rounding[-1].name

    def round(self, values: Tensor) -> Tensor:
        for node in self.rounding:
            values = cast(Any, node.target)(values, *node.args[1:])
        return values

    def add(self, expected: Tensor, found: Tensor, alone: Tensor) -> None:
        """Add values of the float model, of the program, and of its operator for the float model's input."""
        self.values += expected.numel()
        self.outside += int(((expected < self.ends[0]) | (expected > self.ends[1])).sum())
        self.signal += _squares(expected)
        self.error += _squares(found - expected)
        self.own_error += _squares(alone - expected)


def _squares(values: Tensor) -> float:
    return float(values.double().square().sum())


def _sites(graph: fx.Graph) -> list[_Site]:
    found = []
    for node in quantizing(graph):
        source, rounding = node.all_input_nodes[0], [node]
        while rounding[-1].target not in _DEQUANTIZE:
            rounding.append(next(iter(rounding[-1].users)))
        scale, zero_point = (cast(float, one) for one in node.args[1:3])
        highest = next((one.args[2] for one in rounding if one.target is aten.clamp.default), QUANT_MAX)
        grids = [before.args[1:3] for before in computed_by(source).all_input_nodes if before.target in _DEQUANTIZE]
        if source.op == "placeholder" or any(grid != node.args[1:3] for grid in grids) or not grids:
            ends = (-1 - zero_point) * scale, (cast(int, highest) + 1 - zero_point) * scale
            found.append(_Site(source, rounding, ends))
    return found


class _Values(fx.Interpreter):
    """Runs a graph. kept: what its nodes of some names computed; fed: values that go on in place of computed ones."""

    def __init__(self, module: fx.GraphModule, names: Iterable[str], fed: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(module)
        self._names, self._fed, self.kept = set(names), fed or {}, dict[str, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self._names:
            self.kept[n.name] = value
        return self._fed.get(n.name, value)


def program_errors(fused: fx.GraphModule, program: fx.GraphModule, parts: Iterable[Tensor]) -> tuple[Fidelity, ...]:
    """Return the fidelity of each tensor that a program quantizes on a grid of its own, in the order of execution.

    parts: float32 [n, 3, H, W], few enough images for all of the model's tensors to fit into memory.
    """
    sites = _sites(program.graph)
    for images in parts:
        with machine_lock.computing():
            floats = _Values(fused, (site.source.name for site in sites))
            floats.run(images)
            found = _Values(program, (site.rounded for site in sites))
            found.run(images)
            fed = dict[str, Tensor]()
            for site in sites:
                value = site.round(floats.kept[site.source.name])
                fed |= {node.name: value for node in site.rounding[-1].all_input_nodes[0].users}
            alone = _Values(program, (site.rounded for site in sites), fed)
            alone.run(images)
        for site in sites:
            site.add(floats.kept[site.source.name], found.kept[site.rounded], alone.kept[site.rounded])
    return tuple(_fidelity(site, fused, program) for site in sites)


def _fidelity(site: _Site, fused: fx.GraphModule, program: fx.GraphModule) -> Fidelity:
    operator = computed_by(site.source)
    kind = kind_of(operator) if operator.target in LAYERS else "quantize" if operator.op == "placeholder" else ""
    weight = None
    if operator.target in LAYERS and (codes := cast(fx.Node, operator.args[1])).target in _DEQUANTIZE:
        before = next(node for node in fused.graph.nodes if node.name == operator.name)
        exact = attribute(fused, cast(fx.Node, before.args[1]))
        weight = decibels(_squares(exact), _squares(_dequantized(codes, program) - exact))
    return Fidelity(
        name=site.rounding[0].meta[CUSTOM][TENSOR],
        kind=kind or operation(operator),
        sqnr_db=decibels(site.signal, site.error),
        own_sqnr_db=decibels(site.signal, site.own_error),
        weight_sqnr_db=weight,
        clipped=site.outside / site.values,
        scale=cast(float, site.rounding[0].args[1]),
    )
