"""16-bit accumulators in a Q/DQ program, whose module computes in float what kernels with exact sums do, and the guard
`overflow=layers` of such a program.

A layer's input and weights are on their grids, so the codes that a kernel multiplies are known, and so is what it loses
where a sum of two products is clamped to int16 (see `accumulators`): that is added to the layer's exact output. Layers
are two-dimensional convolutions and linear ones; others are left alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qexp.config.schema import Engine, Overflow, QConfig
from qexp.quantize.calibration.grid import QUANT_MAX, Side
from qexp.quantize.graph.copies import sharing_copy
from qexp.quantize.graph.exported import LAYERS, arguments, aten, attribute, zeros_around
from qexp.quantize.graph.placement import clamps_behind
from qexp.quantize.graph.tensor_names import tensor_of
from qexp.quantize.inspection.programs import kind_of
from qexp.quantize.qdq.operators import decomposed
from qexp.quantize.qdq.program import clamped_codes
from qexp.quantize.saturation.accumulators import LayerSaturation, lost, overflowing, paired, parts, run_length
from qexp.quantize.saturation.narrowing import Reader, ReducedRange, narrowed, noise, set_grid

_EMULATED = {aten.conv2d.default, aten.linear.default}
_QUANTIZE, _DEQUANTIZE = decomposed.quantize_per_tensor.default, decomposed.dequantize_per_tensor.default
_DEQUANTIZE_WEIGHTS = {_DEQUANTIZE, decomposed.dequantize_per_channel.default}


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer of a program whose input and weights are INT8, as kernels see it.

    pairs: int16 [out, pairs, 2], its weights as they are paired; run: see `run_length`; scale, zero_point: of its
    input; highest: the largest code that its input can have; weight_scale: [out] or of one element.
    """

    node: fx.Node
    kind: str
    pairs: Tensor
    run: int
    groups: int
    scale: float
    zero_point: int
    highest: int
    weight_scale: Tensor

    @property
    def can_overflow(self) -> bool:
        return bool(overflowing(self.pairs, torch.tensor(self.highest)).any())

    def codes(self, values: Tensor) -> Tensor:
        """The codes of its input as float32, of the same shape."""
        return (values / self.scale).round() + self.zero_point

    def lost(self, codes: Tensor, like: Tensor) -> Tensor:
        """The change that 16-bit sums make to its output, float32 of the shape of `like`, which is its output."""
        if self.node.target is aten.linear.default:
            rows = codes.flatten(0, -2).T[None]
            change = [self._lost(some) for some in rows.split(parts(rows.shape[1]), dim=2)]
            return torch.cat(change, dim=1).T.reshape(like.shape)
        given = arguments(self.node)
        (above, left), kernel = _two(given["padding"]), given["weight"].meta["val"].shape[2:]
        codes = F.pad(codes, (left, left, above, above), value=self.zero_point)
        whole = codes.shape[1] * kernel.numel() * like.shape[2] * like.shape[3]
        change = []
        for some in codes.split(parts(whole)):
            windows = F.unfold(some, kernel, _two(given["dilation"]), 0, _two(given["stride"]))
            windows = windows.unflatten(1, (self.groups, -1, kernel.numel()))
            of_images = self._lost(windows.permute(1, 3, 2, 0, 4).flatten(1, 2).flatten(2))
            change.append(of_images.unflatten(1, (len(some), *like.shape[2:])).transpose(0, 1))
        return torch.cat(change)

    def _lost(self, rows: Tensor) -> Tensor:
        """The same, float32 [out, positions]. rows: float32 [groups, terms, positions], codes in the order of sums."""
        return (lost(paired(rows, self.run), self.pairs) * self.scale * self.weight_scale[:, None]).float()


def _two(values: Any) -> tuple[int, int]:
    first, *second = (int(value) for value in values)
    return first, (second or [first])[0]


def _layers(program: fx.GraphModule, order: Engine, kinds: Collection[str]) -> dict[fx.Node, _Layer]:
    """The layers of these kinds that are INT8, with weights paired as `order` adds them up."""
    found: dict[fx.Node, _Layer] = {}
    for node in program.graph.nodes:
        if node.target not in _EMULATED or node.args[1].target not in _DEQUANTIZE_WEIGHTS or kind_of(node) not in kinds:
            continue
        source = cast(fx.Node, node.args[0])
        while zeros_around(source) is not None:
            source = source.all_input_nodes[0]
        if source.target is not _DEQUANTIZE:
            continue
        before, scale, zero_point = cast(Any, source.args[:3])
        weight, weight_scale = (
            attribute(program, one) if isinstance(one, fx.Node) else torch.tensor([one])
            for one in node.args[1].args[:2]
        )
        groups = int(arguments(node).get("groups", 1))
        run = run_length(order, weight.shape, groups)
        flat = weight.to(torch.int16).reshape(*weight.shape[:2], -1).transpose(1, 2).flatten(1)
        found[node] = _Layer(
            node=node,
            kind=kind_of(node),
            pairs=paired(flat, run),
            run=run,
            groups=groups,
            scale=scale,
            zero_point=zero_point,
            highest=_highest(before),
            weight_scale=weight_scale.double(),
        )
    return found


def _highest(codes: fx.Node) -> int:
    """The largest of the codes that a node computes."""
    if codes.target is aten.clamp.default:
        return min(cast(int, codes.args[2]), clamped_codes(codes.all_input_nodes[0])[1])
    return clamped_codes(codes)[1]


def at_risk(program: fx.GraphModule, order: Engine, kinds: Collection[str]) -> bool:
    """True if the weights of any layer of these kinds let 16-bit sums overflow. order: as in `Kernels`."""
    return any(layer.can_overflow for layer in _layers(program, order, kinds).values())


def not_emulated(program: fx.GraphModule) -> tuple[str, ...]:
    """Names of the INT8 layers that `SaturatingProgram` leaves alone."""
    layers = (node for node in program.graph.nodes if node.target in LAYERS - _EMULATED)
    return tuple(tensor_of(node) for node in layers if node.args[1].target in _DEQUANTIZE_WEIGHTS)


class SaturatingProgram(nn.Module):
    """A Q/DQ program with 16-bit sums in its layers of some kinds: float32 [n, 3, H, W] to logits.

    order: as in `Kernels`. saturating: False to go on with exact sums behind each layer, so that the logits are exact.
    found: by name, each layer's outputs with 16-bit sums compared with exact ones for the same input, over all calls.
    """

    def __init__(self, program: fx.GraphModule, order: Engine, kinds: Collection[str], saturating: bool = True) -> None:
        super().__init__()
        self.program, self.saturating = program, saturating
        self.found: dict[str, LayerSaturation] = {}
        self._layers = _layers(program, order, kinds)
        self._risky = {node for node, layer in self._layers.items() if layer.can_overflow}

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = _Run(self).run(images)
        return logits

    def output(self, node: fx.Node, inputs: Tensor, exact: Tensor) -> Tensor:
        """A layer's output, given its input and the output with exact sums."""
        layer, name = self._layers[node], tensor_of(node)
        before = self.found.get(name, LayerSaturation(name, layer.kind, 0, 0, 0))
        steps, highest, changed = torch.zeros(1), 0, exact
        if node in self._risky:
            codes = layer.codes(inputs)
            changed = exact + layer.lost(codes, exact)
            steps, highest = _steps(node, exact, changed), int(codes.max())
        self.found[name] = LayerSaturation(
            name,
            layer.kind,
            before.outputs + exact.numel(),
            before.different + int((steps > 1).sum()),
            max(before.largest, int(steps.max())),
            max(before.highest, highest),
        )
        return changed if self.saturating else exact

    def __contains__(self, node: fx.Node) -> bool:
        return node in self._layers


class _Run(fx.Interpreter):
    def __init__(self, saturating: SaturatingProgram) -> None:
        super().__init__(saturating.program)
        self._saturating = saturating

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        return self._saturating.output(n, self.env[n.all_input_nodes[0]], value) if n in self._saturating else value


def _steps(layer: fx.Node, exact: Tensor, changed: Tensor) -> Tensor:
    """The difference of a layer's outputs in steps of the grid on which they are quantized behind the clamps that
    follow; where they stay in float, in 255ths of their range."""
    clamps = clamps_behind(layer)
    for clamp in clamps:
        exact, changed = (cast(Any, clamp.target)(one, *clamp.args[1:], **clamp.kwargs) for one in (exact, changed))
    reader = next((one for one in (clamps or [layer])[-1].users if one.target is _QUANTIZE), None)
    if reader is None:
        low, high = exact.aminmax()
        return ((changed - exact).abs() * QUANT_MAX / (high - low).clamp(min=1e-30)).round()
    first, second = (cast(Any, _QUANTIZE)(one, *reader.args[1:]).int() for one in (exact, changed))
    return (second - first).abs()


# ------------------------------------------------------------------------------------------------ 7 bits on one side


def reduce_range_of_program(
    prepared: fx.GraphModule, risky: Collection[str], qconfig: QConfig, example: Tensor
) -> tuple[fx.GraphModule, tuple[ReducedRange, ...]]:
    """Return a copy of a calibrated graph with 7 bits on one side of the layers `risky`, and which side that is.

    example: calibration images on which the noise is measured, float32 [n, 3, H, W].
    """
    prepared = cast(fx.GraphModule, sharing_copy(prepared))
    readers: list[Reader] = []

    def look(layer: fx.Node, inputs: Tensor, shape: tuple[Any, ...]) -> None:
        source, (observer, weight) = cast(fx.Node, layer.args[0]), _observed(prepared, cast(fx.Node, layer.args[1]))
        while zeros_around(source) is not None:
            source = source.all_input_nodes[0]
        before = _observed(prepared, source)[0] if source.op == "call_module" else None
        reduced, name = copy.deepcopy(observer), tensor_of(layer)
        _narrow(reduced, weight, qconfig)

        def compute(values: Tensor, weights: Tensor) -> Tensor:
            output: Tensor = cast(Any, layer.target)(values, weights, None, *shape)
            return output

        found = noise(compute, inputs, weight, before, (observer, reduced), qconfig)
        readers.append(Reader(name, before, name in risky, found, partial(_narrow, observer, weight, qconfig)))

    with torch.inference_mode():
        _Inputs(prepared, look).run(example)
    return prepared, narrowed(readers, qconfig)


def _observed(prepared: fx.GraphModule, call: fx.Node) -> tuple[Any, Any]:
    """The observer that a node calls, and the tensor of the model that it sees, None where that is computed."""
    (source,) = call.all_input_nodes
    return prepared.get_submodule(str(call.target)), attribute(prepared, source) if source.op == "get_attr" else None


def _narrow(observer: Any, weight: Tensor, qconfig: QConfig) -> None:
    """Reduce the range of an observer of weights, in place."""
    set_grid(observer, replace(qconfig, overflow=Overflow.weights), Side.weights)
    observer.feed(weight)


class _Inputs(fx.Interpreter):
    """Runs a prepared graph without its observers. look: is called with each layer whose weights are observed, the
    tensor that it reads, and its arguments behind the bias."""

    def __init__(self, prepared: fx.GraphModule, look: Callable[[fx.Node, Tensor, tuple[Any, ...]], None]) -> None:
        super().__init__(prepared)
        self._look = look

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_module":
            return self.env[n.all_input_nodes[0]]
        if n.target in LAYERS and cast(fx.Node, n.args[1]).op == "call_module":
            inputs, *_ = args = self.fetch_args_kwargs_from_env(n)[0]
            self._look(n, cast(Tensor, inputs), tuple(args[3:]))
        return super().run_node(n)
