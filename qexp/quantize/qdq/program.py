"""The Q/DQ program of a model: its operators in float, with quantize and dequantize operators that say what is in INT8.

It is made from what torch executes, so it has the executed scales, zero points and INT8 weights, and what torch runs in
FP32 is in FP32. One rule makes it: an INT8 kernel computes its float function of the dequantized inputs, and quantizes
the result to its output's grid, where it differs from the kernel by rounding alone. So the program has a function for
each of torch's `quantized` operators; all others are their own. Around these, the runtimes that read the program fuse
more if

- a clamp of codes (a fused ReLU, ReLU6, fewer than 8 bits) is one of uint8 codes behind the quantize operator, and none
  where the grid's ends already are the bounds;
- a padding with zeros is inside the convolution, and has no pair of its own where the convolution can't express it;
- shapes hold no arithmetic: a reshape computes the batch from the other sizes;
- a BatchNorm of a quantized concatenation is a convolution of each channel: compiling the product that it is otherwise,
  OpenVINO 2026.4 crashes.

A float model gives a program, too, without such operators.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef

from qexp.quantize.calibration.grid import QUANT_MAX
from qexp.quantize.graph.copies import sharing_copy
from qexp.quantize.graph.exported import CUSTOM, PLACE, SAME, VIEWS, is_program
from qexp.quantize.qdq.operators import decomposed
from qexp.quantize.qdq.recording import Call, OfBatch, UnsupportedError, record

aten = torch.ops.aten
INPUT = "images"
TENSOR = "tensor"  # in the custom meta of nodes, which torch.export keeps
BOUNDS = "bounds"  # of values, in the custom meta of a clamp of codes

_CONVS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
_TRANSPOSED = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}
_CLAMPS = {aten.relu.default, aten.clamp.default, aten.hardtanh.default, torch.ops.quantized.relu6.default}
_TO_FLOAT = {aten.dequantize.self, aten.dequantize.tensors}
_QUANTIZE = {aten.quantize_per_tensor.default, aten.quantize_per_tensor.tensor_qparams}
_NOT_VALUES = {aten.q_scale.default, aten.q_zero_point.default, aten._local_scalar_dense.default}


@dataclass(frozen=True, eq=False)
class _Value:
    """A tensor of the program.

    node: in float, whatever torch has. For a quantized tensor also scale, zero_point, codes: the node of its codes,
    uint8, low and high: bounds of these, and bounds: the same as values. padded: the tensor that this one pads with
    zeros, and by how much, as in `F.pad`; every: the tensor of which this one takes every so manieth row and column,
    and these two numbers; before: of a tensor in float, the quantized one that it was.
    """

    node: fx.Node
    scale: float = 0.0
    zero_point: int = 0
    codes: fx.Node | None = None
    low: int = 0
    high: int = QUANT_MAX
    bounds: tuple[float, float] = (-math.inf, math.inf)
    padded: tuple[_Value, list[int]] | None = None
    every: tuple[_Value, tuple[int, int]] | None = None
    before: _Value | None = None


def program(model: nn.Module, example: Tensor, every_clamp: bool = False) -> fx.GraphModule:
    """Return the program of a converted model, or of a float one: from float32 [n, 3, H, W] to float32 logits.

    example: float32 [n, 3, H, W]; torch's engine must be set as the model needs. every_clamp: keep those that the
    grid's ends make idle. The names of what its nodes quantize, modules or operations, are those that `tensors`
    returns. Raises UnsupportedError, which names the module, for
    operators without a counterpart. Of a model that is a program, a copy.
    """
    if is_program(model):
        made = _checked(cast(fx.GraphModule, sharing_copy(model)))
        return made if every_clamp else _with_clamps_of_codes(made)  # codes are those of 8 bits
    writer = _Writer(every_clamp)
    recording = record(model, example)
    writer.values[id(recording.images)] = _Value(writer.graph.placeholder(INPUT))
    for call in recording.calls:
        written = len(writer.graph.nodes)
        writer.write(call)
        for node in itertools.islice(reversed(writer.graph.nodes), len(writer.graph.nodes) - written):
            node.meta.setdefault(CUSTOM, {})[PLACE] = call.place
    return writer.finished(recording.output)


def _checked(made: fx.GraphModule) -> fx.GraphModule:
    for node in made.graph.nodes:
        if node.target in _CONVS.values() and isinstance(node.args[-1], fx.Node) and len(node.args) == 7:
            where = node.meta[CUSTOM][PLACE]
            raise UnsupportedError(f"{where} has groups for each image, and a program a fixed number of them")
    return made


def _with_clamps_of_codes(made: fx.GraphModule) -> fx.GraphModule:
    """Replace clamps of what is quantized by clamps of its codes, in place, where the bounds are within the grid.

    Runtimes fuse these with the layer in front.
    """
    for node in quantizing(made.graph):
        clamp, (low, high) = cast(fx.Node, node.args[0]), clamped_codes(node)
        if (low, high) == (0, QUANT_MAX) or len(clamp.users) > 1:
            continue
        node.replace_input_with(clamp, clamp.all_input_nodes[0])
        reader = next(iter(node.users))
        if reader.target is aten.clamp.default:
            least, most = cast(tuple[int, int], reader.args[1:])
            reader.args = (node, max(low, least), min(high, most))
            continue
        with made.graph.inserting_after(node):
            codes = made.graph.call_function(aten.clamp.default, (node, low, high))
        node.replace_all_uses_with(codes)
        codes.args = (node, low, high)
    made.graph.eliminate_dead_code()
    made.recompile()
    return made


def clamped_codes(node: fx.Node) -> tuple[int, int]:
    """Return the lowest and the highest code that a quantize operator's output has behind the clamp that it reads."""
    clamp, scale, zero_point = cast(Any, node.args[:3])
    low, high = {
        aten.relu.default: (0.0, None),
        aten.relu6.default: (0.0, 6.0),
        aten.clamp.default: (*clamp.args[1:], None, None)[:2],
        aten.hardtanh.default: (*clamp.args[1:], -1.0, 1.0)[:2] if len(clamp.args) > 2 else (-1.0, 1.0),
    }.get(clamp.target, (None, None))
    value = _Value(node, scale, zero_point)
    return 0 if low is None else _code(low, value), QUANT_MAX if high is None else _code(high, value)


_Kernel = Callable[["_Writer", Sequence[Any]], fx.Node]


class _Writer:
    """Writes a graph, call by call. values: the tensors that depend on the images, by the ids of those recorded."""

    def __init__(self, every_clamp: bool) -> None:
        self.graph, self.values = fx.Graph(), dict[int, _Value]()
        self._every_clamp, self._name = every_clamp, ""
        self._root = nn.Module()
        self._constants: dict[int, tuple[Tensor, fx.Node]] = {}
        self._memory: dict[int, StorageWeakRef] = {}
        self._batch: fx.Node | None = None

    def finished(self, output: Tensor) -> fx.GraphModule:
        self.graph.output(self.values[id(output)].node)
        self.graph.eliminate_dead_code()
        made = fx.GraphModule(self._root, self.graph)
        _drop_unused(made)
        return made

    # ---------------------------------------------------------------------------------------- calls

    def write(self, call: Call) -> None:
        """Add what a call computes to the graph, unless it is the same for all images."""
        function = call.function
        if function in _NOT_VALUES:
            return
        if function._schema.is_mutable:
            function = self._out_of_place(call)
        call = replace(call, function=function)
        self._name = call.name
        if not self._depends(call.given):
            return  # its results are constants, read where they are needed
        if _is_random(call):
            raise UnsupportedError(f"{call.place} is random")
        if function in SAME or (function is aten._to_copy.default and _same_type(call)):
            self._alias(call.result, call.given)
        elif function in _TO_FLOAT:
            self._dequantized(call)
        elif function is aten.int_repr.default:
            codes = self._value(call.given["self"]).codes
            assert codes is not None
            self.values[id(call.result)] = _Value(codes)
        elif function in _CLAMPS and self._is_quantized(call.given):
            self._clamp(call)
        elif function is aten.constant_pad_nd.default:
            self._pad(call)
        elif function in _QUANTIZE:
            self._quantize(call)
        elif function.namespace == "quantized":
            self._kernel(call)
        else:
            self._operator(call)
        for result in call.result if isinstance(call.result, list | tuple) else [call.result]:
            if isinstance(result, Tensor):
                self._memory[id(result)] = StorageWeakRef(result.untyped_storage())

    def _depends(self, given: object) -> bool:
        """True if an argument depends on the images, or on their number."""
        if isinstance(given, Mapping):
            return any(map(self._depends, given.values()))
        if isinstance(given, list | tuple):
            return any(map(self._depends, given))
        return isinstance(given, OfBatch) or (isinstance(given, Tensor) and id(given) in self.values)

    def _out_of_place(self, call: Call) -> Any:
        """The operator that computes the same without writing to its first argument.

        Raises UnsupportedError where another tensor shares its memory, and would change too.
        """
        namespace, _, name = call.function._schema.name.partition("::")
        written, *_ = call.given.values()
        packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None) if name.endswith("_") else None
        overloads = [getattr(packet, one) for one in packet.overloads()] if packet is not None else []
        arguments = [argument.name for argument in call.function._schema.arguments]
        fitting = [one for one in overloads if [argument.name for argument in one._schema.arguments] == arguments]
        if not fitting or not isinstance(written, Tensor) or self._shared(written):
            raise UnsupportedError(f"{call.place} writes to a tensor in place ({name})")
        return fitting[0]

    def _shared(self, tensor: Tensor) -> bool:
        """True if another tensor of the program shares this one's memory."""
        memory = StorageWeakRef(tensor.untyped_storage())
        return any(memory == other and one != id(tensor) for one, other in self._memory.items())

    def _alias(self, result: Any, given: Mapping[str, Any]) -> None:
        self.values[id(result)] = self._value(next(iter(given.values())))

    def _dequantized(self, call: Call) -> None:
        results = call.result if isinstance(call.result, list | tuple) else [call.result]
        sources = next(iter(call.given.values()))
        for result, source in zip(results, sources if isinstance(sources, list | tuple) else [sources], strict=True):
            value = self._value(source)
            self.values[id(result)] = _Value(value.node, before=value)

    def _is_quantized(self, given: Mapping[str, Any]) -> bool:
        return self._value(next(iter(given.values()))).codes is not None

    def _operator(self, call: Call) -> None:
        """A call of an operator that computes the same in float."""
        function, given = call.function, dict(call.given)
        if function is aten.quantized_max_pool2d.default:
            function = aten.max_pool2d.default
        if function in VIEWS:
            # A view of the float tensor would need strides that only the quantized one has.
            function, sizes = aten.reshape.default, next(value for name, value in given.items() if name != "self")
            given = {"self": given["self"], "shape": _without_arithmetic(sizes)}
        given.pop("memory_format", None)
        if isinstance(given.get("groups"), OfBatch):
            raise UnsupportedError(f"{call.place} has groups for each image, and a program a fixed number of them")
        node = self._emit(function, given)
        self._keep(call.result, node, call)
        if function is aten.slice.Tensor and self.values[id(call.result)].codes is not None:
            self._note_every(call)

    def _keep(self, result: Any, node: fx.Node, call: Call) -> None:
        """Make `node`, in float, the value of a result, quantized where that is."""
        if isinstance(result, list | tuple):
            for index, part in enumerate(result):
                if isinstance(part, Tensor):
                    self._keep(part, self.graph.call_function(_getitem, (node, index)), call)
        elif isinstance(result, Tensor):
            self.values[id(result)] = self._quantized(node, result, call) if result.is_quantized else _Value(node)

    def _quantized(self, node: fx.Node, result: Tensor, call: Call) -> _Value:
        if result.dtype is not torch.quint8 or result.qscheme() not in (torch.per_tensor_affine,
                                                                        torch.per_tensor_symmetric):  # fmt: skip
            raise UnsupportedError(f"{call.place} returns {result.dtype}, {result.qscheme()}")
        scale, zero_point = result.q_scale(), result.q_zero_point()
        codes = self.graph.call_function(
            decomposed.quantize_per_tensor.default, (node, scale, zero_point, 0, QUANT_MAX, torch.uint8)
        )
        codes.meta[CUSTOM] = {TENSOR: call.name}
        return _Value(self._dequantize(codes, scale, zero_point), scale, zero_point, codes)

    def _dequantize(self, codes: fx.Node, scale: float, zero_point: int) -> fx.Node:
        bounds = 0, QUANT_MAX, torch.uint8
        return self.graph.call_function(decomposed.dequantize_per_tensor.default, (codes, scale, zero_point, *bounds))

    # ---------------------------------------------------------------------------------------- codes

    def _clamp(self, call: Call) -> None:
        given = list(call.given.values())
        low, high = {
            "relu": (0.0, None),
            "relu6": (0.0, 6.0),
            "clamp": (*given[1:], None, None)[:2],
            "hardtanh": (*given[1:], -1.0, 1.0)[:2] if len(given) > 2 else (-1.0, 1.0),
        }[call.function._schema.name.partition("::")[2]]
        self.values[id(call.result)] = self._clipped(self._value(given[0]), low, high)

    def _clipped(self, value: _Value, low: float | None, high: float | None) -> _Value:
        """A quantized tensor clamped to these values, in codes: rounding is monotone, so that this is the same."""
        least = max(value.low, 0 if low is None else _code(low, value))
        most = min(value.high, QUANT_MAX if high is None else _code(high, value))
        if (least, most) == (value.low, value.high) and not self._every_clamp:
            return value
        assert value.codes is not None
        source = value.codes if value.codes.target is not aten.clamp.default else value.codes.all_input_nodes[0]
        codes = self.graph.call_function(aten.clamp.default, (source, least, most))
        lower, upper = (-math.inf if low is None else low), (math.inf if high is None else high)
        bounds = max(value.bounds[0], lower), min(value.bounds[1], upper)
        codes.meta[CUSTOM] = {**value.codes.meta[CUSTOM], BOUNDS: bounds}
        keeps_zeros = least <= value.zero_point <= most
        return replace(
            value,
            node=self._dequantize(codes, value.scale, value.zero_point),
            codes=codes,
            low=least,
            high=most,
            bounds=bounds,
            padded=(self._clipped(value.padded[0], low, high), value.padded[1])
            if value.padded and keeps_zeros
            else None,
            every=(self._clipped(value.every[0], low, high), value.every[1]) if value.every else None,
        )

    def _pad(self, call: Call) -> None:
        source = self._value(call.given["self"])
        node = self._emit(aten.constant_pad_nd.default, call.given)
        made = self._quantized(node, call.result, call) if call.result.is_quantized else _Value(node)
        if not call.given.get("value"):
            made = replace(made, padded=(source, list(call.given["pad"])))
        self.values[id(call.result)] = made

    def _quantize(self, call: Call) -> None:
        """A call that quantizes; where the tensor has these codes already, they are those."""
        source, result = self._value(call.given["self"]), call.result

        def on_grid(value: _Value) -> _Value:
            grid, before = (result.q_scale(), result.q_zero_point()), value.before
            if before is not None and (before.scale, before.zero_point) == grid:
                return before
            return self._quantized(value.node, result, call)

        made = on_grid(source)
        if source.padded:
            # The same: 0 is on every grid.
            made = replace(made, padded=(on_grid(source.padded[0]), source.padded[1]))
        self.values[id(result)] = made

    def _note_every(self, call: Call) -> None:
        """Remember that this is every so manieth row or column of another tensor."""
        given = call.given
        dim, step = given.get("dim", 0), given.get("step", 1)
        whole = not given.get("start") and (given.get("end") is None or given["end"] >= call.result.shape[dim] * step)
        if call.result.ndim != 4 or not whole or (dim % 4 < 2 and step != 1):
            return
        source = self._value(given["self"])
        before, steps = source.every or (source, (1, 1))
        taken = {2: (step, 1), 3: (1, step)}.get(dim % 4, (1, 1))
        every = before, (steps[0] * taken[0], steps[1] * taken[1])
        self.values[id(call.result)] = replace(self.values[id(call.result)], every=every)

    # ---------------------------------------------------------------------------------------- INT8 kernels

    def _kernel(self, call: Call) -> None:
        name = call.function._schema.name.removeprefix("quantized::")
        relu = name.endswith("_relu") and name not in _KERNELS
        compute = _KERNELS.get(name.removesuffix("_relu") if relu else name)
        if compute is None:
            raise UnsupportedError(f"{call.place} executes quantized.{name}, which has no counterpart in float")
        node = compute(self, list(call.given.values()))
        self._keep(call.result, node, call)
        if relu:
            self.values[id(call.result)] = self._clipped(self.values[id(call.result)], 0.0, None)

    def float_of(self, tensor: Any) -> fx.Node:
        """The node of a tensor in float."""
        return self._value(tensor).node

    def concatenates(self, tensor: Any) -> bool:
        """True of a quantized concatenation, as it is."""
        codes = self._value(tensor).codes
        return codes is not None and getattr(codes.args[0], "target", None) is aten.cat.default

    def conv(self, given: Sequence[Any], dims: int) -> fx.Node:
        value, packed = self._value(given[0]), given[1]
        weight, bias = packed.unpack()
        if dims == 1:  # torch packs it as one of two dimensions, the first of size 1
            weight, bias = torch.ops.quantized.conv1d_unpack(packed)
        arguments = value.node, self.weights(weight), None if bias is None else self.constant(bias)
        stride, padding, dilation = (list(one())[-dims:] for one in (packed.stride, packed.padding, packed.dilation))
        if packed.transpose():
            more = stride, padding, list(packed.output_padding())[-dims:], packed.groups(), dilation
            return self.graph.call_function(_TRANSPOSED[dims], (*arguments, *more))
        node, stride, padding = self._into_conv(value, weight, stride, padding)
        shape = stride, padding, dilation, packed.groups()
        return self.graph.call_function(_CONVS[dims], (node, *arguments[1:], *shape))

    def _into_conv(
        self, value: _Value, weight: Tensor, stride: list[int], padding: list[int]
    ) -> tuple[fx.Node, list[int], list[int]]:
        """A convolution's input, stride and padding, with a stride or padding before it taken into it."""
        dims = weight.dim() - 2
        pointwise = all(size == 1 for size in weight.shape[2:]) and not any(padding)
        if value.every and pointwise and set(stride) == {1}:
            source, steps = value.every
            return source.node, list(steps), padding
        if value.padded:
            source, pads = value.padded
            ends = [*pads, *[0] * (2 * dims - len(pads))]
            if len(ends) == 2 * dims and min(ends) >= 0:
                low, high = ends[::2][::-1], ends[1::2][::-1]  # `F.pad` begins with the last dimension
                if low == high:
                    return source.node, stride, [a + b for a, b in zip(padding, low, strict=True)]
                # Without a pair: ONNX's convolution can take it.
                unpaired = self.graph.call_function(aten.constant_pad_nd.default, (source.node, pads, 0.0))
                return unpaired, stride, padding
        return value.node, stride, padding

    def linear(self, given: Sequence[Any]) -> fx.Node:
        weight, bias = given[1].unpack()
        arguments = self.float_of(given[0]), self.weights(weight), None if bias is None else self.constant(bias)
        return self.graph.call_function(aten.linear.default, arguments)

    def weights(self, weight: Tensor) -> fx.Node:
        """A quantized weight: its codes, int8, and how they are dequantized."""
        codes = self.constant(weight.int_repr())
        codes.meta[CUSTOM] = {TENSOR: f"{self._name}.weight"}
        bounds = -128, 127, torch.int8
        if weight.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            return self.graph.call_function(
                decomposed.dequantize_per_tensor.default, (codes, weight.q_scale(), weight.q_zero_point(), *bounds)
            )
        scales = self.constant(weight.q_per_channel_scales().float())
        zero_points = self.constant(weight.q_per_channel_zero_points().to(torch.int8))
        return self.graph.call_function(
            decomposed.dequantize_per_channel.default,
            (codes, scales, zero_points, weight.q_per_channel_axis(), *bounds),
        )

    # ---------------------------------------------------------------------------------------- values

    def _value(self, tensor: Tensor) -> _Value:
        if id(tensor) in self.values:
            return self.values[id(tensor)]
        return _Value(self.constant(tensor))

    def constant(self, tensor: Tensor) -> fx.Node:
        """The node of a tensor that is the same for all images."""
        if id(tensor) not in self._constants:
            name = f"constant_{len(self._constants)}"
            value = tensor.dequantize() if tensor.is_quantized else tensor
            self._root.register_buffer(name, value.detach().clone().contiguous())
            self._constants[id(tensor)] = tensor, self.graph.get_attr(name)  # keeps it alive, and so its id
        return self._constants[id(tensor)][1]

    def _emit(self, function: Any, given: Mapping[str, Any]) -> fx.Node:
        positional: list[Any] = []
        named: dict[str, Any] = {}
        for argument in function._schema.arguments:
            if argument.name not in given:
                continue
            value = given[argument.name]
            if isinstance(value, Tensor) and "Tensor" not in str(argument.type):
                value = value.item()  # a number that the dispatcher passes on as a tensor
            value = self._written(value)
            if argument.kwarg_only or named or len(positional) < function._schema.arguments.index(argument):
                named[argument.name] = value
            else:
                positional.append(value)
        return self.graph.call_function(function, tuple(positional), named)

    def _written(self, value: Any) -> Any:
        """An argument as the graph has it."""
        if isinstance(value, Tensor):
            return self._value(value).node
        if isinstance(value, OfBatch):
            return self._number(value)
        return [self._written(one) for one in value] if isinstance(value, list | tuple) else value

    def _number(self, number: OfBatch) -> Any:
        if self._batch is None:
            first = next(iter(self.graph.nodes))
            with self.graph.inserting_after(first):
                self._batch = self.graph.call_function(aten.sym_size.int, (first, 0))
        found: Any = self._batch
        if number.images != 1:
            found = self.graph.call_function(_mul, (found, number.images))
        return self.graph.call_function(_add, (found, number.others)) if number.others else found


def _getitem(values: Any, index: int) -> Any:
    return values[index]


def _mul(a: Any, b: int) -> Any:
    return a * b


def _add(a: Any, b: int) -> Any:
    return a + b


def _is_random(call: Call) -> bool:
    if torch.Tag.nondeterministic_seeded not in call.function.tags or call.function in SAME:
        return False
    defaults = {one.name: one.default_value for one in call.function._schema.arguments if one.has_default_value()}
    return bool({**defaults, **call.given}.get("dropout_p", True))


def _same_type(call: Call) -> bool:
    return bool(call.result.dtype == next(iter(call.given.values())).dtype)


def _without_arithmetic(sizes: Sequence[Any]) -> list[Any]:
    """A shape in which the batch size, where it is the only size that isn't known, is left to be computed."""
    unknown = [isinstance(size, OfBatch) for size in sizes]
    if sum(unknown) == 1 and -1 not in sizes:
        return [-1 if open_ else size for open_, size in zip(unknown, sizes, strict=True)]
    return list(sizes)


def _code(bound: float, value: _Value) -> int:
    """The code of a bound, as torch rounds it."""
    if math.isinf(bound):
        return 0 if bound < 0 else QUANT_MAX
    return int(
        torch.quantize_per_tensor(torch.tensor(float(bound)), value.scale, value.zero_point, torch.quint8).int_repr()
    )


def quantizing(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that quantize, in their order."""
    return [node for node in graph.nodes if node.target is decomposed.quantize_per_tensor.default]


def tensors(graph: fx.Graph) -> list[str]:
    """The names of the tensors that they quantize."""
    return [node.meta[CUSTOM][TENSOR] for node in quantizing(graph)]


def place_of(operator: str, graph: fx.Graph) -> str:
    """The module that calls an operator, `aten.hardswish.default`, in a sentence; empty where none does."""
    found = (node for node in graph.nodes if str(node.target) == operator)
    return next((str(node.meta[CUSTOM][PLACE]) for node in found if PLACE in node.meta.get(CUSTOM, {})), "")


def _drop_unused(made: fx.GraphModule) -> None:
    used = {str(node.target) for node in made.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in made.named_buffers() if name not in used]:
        delattr(made, name)


def _conv(dims: int) -> _Kernel:
    return lambda writer, given: writer.conv(given, dims)


def _same(function: Any, inputs: int = 1, more: slice = slice(0)) -> _Kernel:
    """A float operator of the first `inputs` arguments, tensors, and of `more` of them as they are."""

    def compute(writer: _Writer, given: Sequence[Any]) -> fx.Node:
        tensors = [None if one is None else writer.float_of(one) for one in given[:inputs]]
        return writer.graph.call_function(function, (*tensors, *given[more]))

    return compute


def _cat(writer: _Writer, given: Sequence[Any]) -> fx.Node:
    return writer.graph.call_function(aten.cat.default, ([writer.float_of(one) for one in given[0]], given[1]))


def _elementwise(tensors: Any, numbers: Any) -> _Kernel:
    def compute(writer: _Writer, given: Sequence[Any]) -> fx.Node:
        if all(isinstance(one, Tensor) for one in given[:2]):
            return writer.graph.call_function(tensors, tuple(map(writer.float_of, given[:2])))
        tensor, number = given[:2] if isinstance(given[0], Tensor) else (given[1], given[0])
        return writer.graph.call_function(numbers, (writer.float_of(tensor), number))

    return compute


def _batch_norm(writer: _Writer, given: Sequence[Any]) -> fx.Node:
    scale, shift, mean, variance = given[1:5]
    if given[0].dim() == 4 and scale is not None and shift is not None and writer.concatenates(given[0]):
        factors = scale / torch.sqrt(variance + given[5])
        weight, bias = writer.constant(factors[:, None, None, None]), writer.constant(shift - mean * factors)
        shape = [1, 1], [0, 0], [1, 1], len(factors)
        return writer.graph.call_function(aten.conv2d.default, (writer.float_of(given[0]), weight, bias, *shape))
    tensors = [None if one is None else writer.float_of(one) for one in given[:5]]
    return writer.graph.call_function(aten.batch_norm.default, (*tensors, False, 0.0, given[5], False))


def _layer_norm(writer: _Writer, given: Sequence[Any]) -> fx.Node:
    source, *affine = (None if one is None else writer.float_of(one) for one in (given[0], *given[2:4]))
    return writer.graph.call_function(aten.layer_norm.default, (source, given[1], *affine, given[4]))


def _group_norm(writer: _Writer, given: Sequence[Any]) -> fx.Node:
    source, *affine = (None if one is None else writer.float_of(one) for one in (given[0], *given[2:4]))
    return writer.graph.call_function(aten.group_norm.default, (source, given[1], *affine, given[4]))


def _instance_norm(writer: _Writer, given: Sequence[Any]) -> fx.Node:
    tensors = [None if one is None else writer.float_of(one) for one in given[:3]]
    rest = None, None, True, 0.0, given[3], False
    return writer.graph.call_function(aten.instance_norm.default, (*tensors, *rest))


_ADD, _MUL = (_elementwise(one.Tensor, one.Scalar) for one in (aten.add, aten.mul))

# The float counterparts of torch.ops.quantized, without a ReLU that is fused into them.
_KERNELS: Mapping[str, _Kernel] = {
    **{f"conv{dims}d": _conv(dims) for dims in (1, 2, 3)},
    **{f"conv_transpose{dims}d": _conv(dims) for dims in (1, 2, 3)},
    **{f"batch_norm{dims}": _batch_norm for dims in ("", "1d", "2d", "3d")},
    "linear": _Writer.linear,
    "add": _ADD,
    "add_scalar": _ADD,
    "mul": _MUL,
    "mul_scalar": _MUL,
    "matmul": _same(aten.matmul.default, 2),
    "cat": _cat,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "hardswish": _same(aten.hardswish.default),
    "leaky_relu": _same(aten.leaky_relu.default, more=slice(1, 2)),
    "elu": _same(aten.elu.default, more=slice(3, None)),
    "celu": _same(aten.celu.default, more=slice(3, None)),
    "prelu": _same(aten.prelu.default, 2),
    "softmax": _same(aten.softmax.int, more=slice(1, 2)),
    "sigmoid": _same(aten.sigmoid.default),
    "max_pool1d": _same(aten.max_pool1d.default, more=slice(1, None)),
    "max_pool2d": _same(aten.max_pool2d.default, more=slice(1, None)),
    "dropout": _same(aten.alias.default),
}
