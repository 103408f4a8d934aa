"""Where a graph of aten operators is quantized: its layers, and the tensors around them, by `qconfig.placement`.

`every_op`: what goes into and comes out of convolutions, linear layers, sums and products of two tensors,
concatenations and pooling, the output behind the clamp that follows, as torch's FX flow has it and INT8 kernels of
whole graphs need it. `layers`: what goes into convolutions and linear layers alone; all else is computed in float.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from qexp.config.schema import Placement
from qexp.quantize.graph.exported import LAYERS, aten, zeros_around

Edge = tuple[fx.Node, fx.Node]
"""A tensor where it is read: the node that makes it, and the one that reads it."""

_CLAMPS = {aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default}
_FUSED = {aten.relu.default}
_JOIN = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor}
_CONCATENATE = {aten.cat.default, aten.stack.default}
_MAXIMUM = {
    aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default, aten.adaptive_max_pool2d.default,
}  # fmt: skip
_AVERAGE = {
    aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default,
    aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default, aten.mean.dim,
}  # fmt: skip
_PAD = {aten.constant_pad_nd.default, aten.pad.default}
_MOVE = {
    aten.reshape.default, aten.flatten.using_ints, aten.permute.default, aten.transpose.int, aten.squeeze.dim,
    aten.squeeze.dims, aten.unsqueeze.default, aten.slice.Tensor, aten.select.int, aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default, aten.channel_shuffle.default, aten.upsample_nearest2d.vec,
    aten.upsample_nearest2d.default,
}  # fmt: skip


@dataclass(frozen=True)
class Sites:
    """The nodes and edges of a graph that are quantized.

    layers: convolutions and linear layers, with the nodes of their weights; grids: tensors, where they are made (a
    node) or read (an edge), each with the one whose grid it shares, None for its own. In their order in the graph.
    """

    layers: dict[fx.Node, fx.Node] = field(default_factory=dict)
    grids: dict[fx.Node | Edge, fx.Node | Edge | None] = field(default_factory=dict)


def sites(graph: fx.Graph, placement: Placement, range_after_clamp: bool) -> Sites:
    """Return what is quantized of a graph from `exported`.

    range_after_clamp: True to take the output of a sum or a layer behind the ReLU6 or Hardtanh that alone reads it,
    too, and not only behind a ReLU.
    """
    found, varies = Sites(), _varying(graph)
    clamps = _CLAMPS if range_after_clamp else _FUSED
    for node in graph.nodes:
        if node.target in LAYERS and node.args[1].op == "get_attr" and node.args[0] in varies:
            found.layers[node] = node.args[1]
            found.grids[_read(node)] = None
            if placement is Placement.every_op:
                found.grids[_end(node, clamps)] = None
        elif placement is Placement.every_op:
            _around(node, varies, clamps, found)
    return found


def _around(node: fx.Node, varies: Mapping[fx.Node, Any], clamps: set[Any], found: Sites) -> None:
    """Add the tensors around an operator that is no layer."""
    grids, sources = found.grids, node.all_input_nodes
    if node.op != "call_function" or node not in varies or not all(source in varies for source in sources):
        return
    if node.target in _JOIN and len(node.args) == 2 and all(isinstance(one, fx.Node) for one in node.args):
        for source in sources:
            grids[source, node] = None
        grids[_end(node, clamps)] = None
    elif node.target in _CONCATENATE:
        first = sources[0], node
        grids.update({(source, node): first if source is not sources[0] else None for source in sources})
        grids[node] = first
    elif node.target in _AVERAGE and sources[0] in grids:
        # They are smaller than what they are of. Where that is in float, as in generalised means, so are they.
        grids[sources[0], node] = grids[node] = None
    elif node.target in _MAXIMUM or (sources[0] in grids and _passes_on(node)):
        grids[sources[0], node] = None
        grids[node] = sources[0], node


def _passes_on(node: fx.Node) -> bool:
    """True for an operator whose output is on its input's grid: it moves values or clamps them, or adds zeros for
    another reader than the layer to which these belong (see `_read`)."""
    if node.target in _PAD:
        return zeros_around(node) is not None and [user.target in LAYERS for user in node.users] != [True]
    return node.target in _MOVE or node.target in _CLAMPS


def _read(layer: fx.Node) -> Edge:
    """The tensor that a layer reads; with zeros around it, which are on every grid, the one without."""
    source = layer.args[0]
    assert isinstance(source, fx.Node)
    if zeros_around(source) is not None and len(source.users) == 1:
        return source.all_input_nodes[0], source
    return source, layer


def _end(node: fx.Node, clamps: Collection[Any]) -> fx.Node:
    """The node itself, or the last of the clamps that alone read it."""
    return [node, *clamps_behind(node, clamps)][-1]


def clamps_behind(node: fx.Node, clamps: Collection[Any] = frozenset(_CLAMPS)) -> list[fx.Node]:
    """Return the clamps that alone read a node, one behind the other."""
    users = list(node.users)
    if len(users) == 1 and users[0].target in clamps and users[0].all_input_nodes == [node]:
        return [users[0], *clamps_behind(users[0], clamps)]
    return []


def computed_by(node: fx.Node) -> fx.Node:
    """Return the operator in front of the clamps that this node ends; the node itself if it is no clamp."""
    source = node.all_input_nodes[0] if node.target in _CLAMPS else None
    return node if source is None or source.op != "call_function" else computed_by(source)


def _varying(graph: fx.Graph) -> dict[fx.Node, None]:
    """The tensors of float32 that depend on the images, and not on their number alone."""
    found: dict[fx.Node, None] = {}
    tainted: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or (node.op == "call_function" and tainted.intersection(node.all_input_nodes)):
            tainted.add(node)
            value = node.meta.get("val")
            if isinstance(value, Tensor) and value.dtype is torch.float32:
                found[node] = None
    return found
