"""The error of each layer: every tensor of the INT8 model that has its own scale, compared with the float model's.

Both models see the same images. The INT8 model runs first, and its outputs are stored in 8 bits; then the float model
runs, and each of its layers is compared immediately. Memory doesn't grow with the number of images.

Compared are the layers of the converted model whose output is quantized with a scale of its own. Convolutions, linear
layers, BatchNorms and additions always are; ReLU, max-pooling, flatten and others that keep their input's scale are
not. They find their float counterparts by the names of tensors (see graph/tensor_names.py).

A tensor that feeds only a clamp (ReLU, ReLU6, Hardtanh; found by tracing) is clamped before it is compared, on both
sides: values that the clamp cuts are no loss, and `qconfig.range_after_clamp` lets the grid end at its bounds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.ao.nn.intrinsic.modules.fused import _FusedModule
from torch.ao.nn.quantized import FloatFunctional, QFunctional
from torch.ao.quantization import QuantWrapper
from torch.fx.node import map_aggregate

from qexp.quantize.flow import QuantizedModel
from qexp.quantize.graph.clamps import ValueRange, clamp_after
from qexp.quantize.graph.hooks import attached
from qexp.quantize.graph.tensor_names import called, public, tensor_of
from qexp.quantize.graph.tracing import UntraceableError, standard_type, trace
from qexp.quantize.inspection.parts import parts
from qexp.quantize.torch_backend.engines import engine as torch_engine
from qexp.quantize.torch_backend.graph_names import has_fused_relu
from qexp.quantize.torch_backend.ignored_quant_max import clamped, quant_max_of
from qexp.quantize.torch_backend.stride_bugs import AfterStride
from qexp.records import Fidelity
from qexp.statistics import decibels
from qexp.system import machine_lock


def layer_fidelity(model: QuantizedModel, batches: Iterable[Tensor]) -> tuple[Fidelity, ...]:
    """Return the fidelity of every layer that has a scale of its own, in the order of execution.

    batches: float32 [n, 3, H, W]. A layer that is called more than once has one row for all its calls in the eager
    flow, where these share one grid, and a row for each call in fx. The split into batches changes the numbers by a few
    hundredths of a dB at most: FP32 convolutions then differ in the last bit, and so do the codes rounded from them.
    Raises ValueError if there are no images.
    """
    fused, int8 = model.fused, model.module
    kinds = {layer.name: layer.kind for layer in model.layers}
    flow_models = _Graphs(fused, int8) if isinstance(int8, fx.GraphModule) else _Modules(fused, int8)
    sums: dict[str, _Sums] = {}
    images, quant_max = 0, quant_max_of(int8)
    with torch_engine(model.engine), torch.inference_mode():
        for part in parts(batches):
            with machine_lock.computing():
                clamps = flow_models.clamps(part)
                seen = _run_int8(flow_models, kinds, part, quant_max)
                _compare(flow_models, seen, clamps, kinds, sums, part)
            images += len(part)
    if images == 0:
        raise ValueError("the fidelity of layers needs at least one image")
    return tuple(
        Fidelity(
            name=label,
            kind=one.kind,
            sqnr_db=decibels(one.signal, one.error),
            own_sqnr_db=None if one.own_error is None else decibels(one.signal, one.own_error),
            weight_sqnr_db=flow_models.weight_sqnr_db(label),
            clipped=one.outside / one.values,
            scale=one.grid.scale,
        )
        for label, one in sums.items()
    )


# ------------------------------------------------------------------------------------------------ what is added up


@dataclass(frozen=True)
class _Grid:
    """Quantization parameters of a tensor; quant_max: the largest code that the model lets through."""

    scale: float
    zero_point: int
    dtype: torch.dtype
    quant_max: int

    def quantized(self, values: Tensor) -> Tensor:
        return clamped(torch.quantize_per_tensor(values, self.scale, self.zero_point, self.dtype), self.quant_max)

    def outside(self, values: Tensor) -> int:
        """Return the number of values that lie more than a step outside the range of the codes."""
        low, high = (0, self.quant_max) if self.dtype is torch.quint8 else (-128, 127)
        ends = [(end - self.zero_point) * self.scale for end in (low - 1, high + 1)]
        smallest, largest = torch.aminmax(values)
        if smallest >= ends[0] and largest <= ends[1]:
            return 0
        return int((values < ends[0]).sum()) + int((values > ends[1]).sum())


def _grid(tensor: Tensor, quant_max: int) -> _Grid:
    return _Grid(tensor.q_scale(), tensor.q_zero_point(), tensor.dtype, quant_max)


@dataclass
class _Sums:
    """Accumulated errors of one layer, over all images so far."""

    kind: str
    grid: _Grid
    values: int = 0
    outside: int = 0
    signal: float = 0.0
    error: float = 0.0
    own_error: float | None = 0.0

    def add(self, expected: Tensor, inside: Tensor, own: Tensor | None, clamp: ValueRange | None) -> None:
        """Add one output, given three times, in the same shape.

        expected: of the float model, float32; inside: in the INT8 model, quantized; own: of the INT8 layer for the
        float model's input, quantized, None if unknown. clamp: the clamp that follows.
        """

        def clamped(values: Tensor) -> Tensor:
            return values if clamp is None else values.clamp(clamp.low, clamp.high)

        expected = clamped(expected)
        self.values += expected.numel()
        self.outside += self.grid.outside(expected)
        self.signal += _squares(expected)
        self.error += _squares(clamped(inside.dequantize()).sub_(expected))
        if own is None or self.own_error is None:
            self.own_error = None
        else:
            self.own_error += _squares(clamped(own.dequantize()).sub_(expected))


_RUN = 4096
"""Values that are summed in float32 before float64 takes over: exact to six digits, and ten times as fast."""


def _squares(values: Tensor) -> float:
    """Return the sum of squares of a float32 tensor of any memory format."""
    if values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last):
        values = values.permute(0, 2, 3, 1)
    flat = values.reshape(-1)
    whole = flat.numel() // _RUN * _RUN
    runs = torch.linalg.vector_norm(flat[:whole].view(-1, _RUN), dim=1).double()
    rest = flat[whole:].double()
    return float(runs @ runs + rest @ rest)


# ------------------------------------------------------------------------------------------------ the two passes


@dataclass(frozen=True)
class _Call:
    """A call of a layer, to be repeated: the function, its arguments, and the kind of operation."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    operation: str


@dataclass(frozen=True)
class _Input:
    """Grid and shape of a quantized argument, in its place."""

    grid: _Grid
    shape: torch.Size


@dataclass(frozen=True)
class _Seen:
    """A call of an INT8 layer; grid: of its output."""

    call: _Call
    inputs: tuple[_Input, ...]
    output: Tensor
    grid: _Grid


_Before = Callable[[str, _Call], None]
_After = Callable[[str, Any], None]


def _run_int8(
    flow_models: _Modules | _Graphs, kinds: Mapping[str, str], images: Tensor, quant_max: int
) -> dict[str, deque[_Seen]]:
    """Return the calls of every INT8 layer that has a scale of its own, by key, in the order of execution.

    quant_max: the largest code that the model lets through.
    """
    seen: dict[str, deque[_Seen]] = {}
    running: dict[str, tuple[_Call, tuple[_Input, ...]]] = {}

    def before(key: str, call: _Call) -> None:
        inputs: list[_Input] = []

        def remember(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_quantized:
                inputs.append(_Input(_grid(value, quant_max), value.shape))
                return inputs[-1]
            return value

        args = map_aggregate(call.args, remember)
        running[key] = _Call(call.function, tuple(args), call.kwargs, call.operation), tuple(inputs)

    def after(key: str, output: Any) -> None:
        call, inputs = running.pop(key)
        if not isinstance(output, Tensor) or not output.is_quantized:
            return
        computes = flow_models.layer(key) in kinds or call.operation in ("add", "mul", "matmul")
        grid = _grid(output, quant_max)
        if computes or not inputs or any(one.grid != grid for one in inputs):
            # A copy, since a ReLU may work in place on it.
            seen.setdefault(key, deque()).append(_Seen(call, inputs, output.clone(), grid))

    flow_models.run_int8(images, before, after)
    return seen


def _compare(
    flow_models: _Modules | _Graphs,
    seen: Mapping[str, deque[_Seen]],
    clamps: Mapping[str, ValueRange],
    kinds: Mapping[str, str],
    sums: dict[str, _Sums],
    images: Tensor,
) -> None:
    """Run the float model, and add the errors of the INT8 layers to `sums`."""
    inputs: dict[str, list[Tensor] | None] = {}

    def before(key: str, call: _Call) -> None:
        if seen.get(key):
            # Before the call, since the layer may work in place on its input.
            inputs[key] = _quantized(call, seen[key][0].inputs)

    def after(key: str, output: Any) -> None:
        if not seen.get(key) or not isinstance(output, Tensor):
            return
        one = seen[key].popleft()
        if one.output.shape != output.shape:
            return
        own = _alone(one, output, inputs.pop(key, None))
        label = flow_models.label(key)
        kind = kinds.get(flow_models.layer(key), one.call.operation)
        total = sums.setdefault(label, _Sums(kind, one.grid))
        total.add(output, one.output, own, clamps.get(label))

    flow_models.run_float(images, before, after)


def _quantized(call: _Call, like: tuple[_Input, ...]) -> list[Tensor] | None:
    """Quantize a float call's first tensors to the grids of the INT8 call's; return None if their shapes differ."""
    tensors: list[Tensor] = []
    map_aggregate(call.args, lambda value: tensors.append(value) if isinstance(value, Tensor) else None)
    if len(tensors) < len(like) or any(t.shape != one.shape for t, one in zip(tensors, like, strict=False)):
        return None
    return [one.grid.quantized(tensor) for tensor, one in zip(tensors, like, strict=False)]


def _alone(one: _Seen, expected: Tensor, inputs: list[Tensor] | None) -> Tensor | None:
    """Return the INT8 layer's output for the float model's input; None if it can't be computed."""
    if one.call.operation == "quantize":
        return one.grid.quantized(expected)
    if not inputs or len(inputs) != len(one.inputs):
        return None
    waiting = iter(inputs)
    args = map_aggregate(one.call.args, lambda value: next(waiting) if isinstance(value, _Input) else value)
    output: Tensor = one.call.function(*args, **one.call.kwargs)
    return output if output.shape == expected.shape else None


# ------------------------------------------------------------------------------------------------ flow=eager

_OPERATIONS = ("add", "add_relu", "cat", "matmul", "mul")  # of FloatFunctional, those whose output it observes


class _Modules:
    """The models of the eager flow: layers are modules, and an operation is a method of a FloatFunctional.

    A key is a module's name in the converted model, wrappers included.
    """

    def __init__(self, fused: nn.Module, int8: nn.Module):
        self._int8 = int8
        # The same wrapper, so that names are the same; it computes nothing.
        self._fused = QuantWrapper(fused) if isinstance(int8, QuantWrapper) else fused
        strided = tuple(f"{name}." for name, m in int8.named_modules() if isinstance(m, AfterStride))
        self._layers = [
            name
            for name, m in int8.named_modules()
            if name
            and not name.startswith(strided)
            and (isinstance(m, AfterStride | QFunctional) or standard_type(m) is not None)
        ]
        self._clamps: dict[str, ValueRange] | None = None

    def label(self, key: str) -> str:
        return public(key, self._int8)

    def layer(self, key: str) -> str:
        return self.label(key)

    def run_int8(self, images: Tensor, before: _Before, after: _After) -> None:
        with _watched(self._int8, self._layers, before, after):
            self._int8(images)

    def run_float(self, images: Tensor, before: _Before, after: _After) -> None:
        known = dict(self._fused.named_modules())
        with _watched(self._fused, [name for name in self._layers if name in known], before, after):
            self._fused(images)

    def clamps(self, images: Tensor) -> Mapping[str, ValueRange]:
        """Return, by label, the clamp that alone reads a module's output, in all its calls."""
        if self._clamps is None:
            try:
                graph_module = trace(self._fused, images[:1])
            except UntraceableError:
                # Then no range was taken behind a clamp, either.
                self._clamps = {}
            else:
                self._clamps = {self.label(name): clamp for name, clamp in _clamps(graph_module).items()}
        return self._clamps

    def weight_sqnr_db(self, label: str) -> float | None:
        name = next(name for name in self._layers if self.label(name) == label)
        return _weight_sqnr_db(self._fused, self._int8, name)


@contextmanager
def _watched(model: nn.Module, names: Iterable[str], before: _Before, after: _After) -> Iterator[None]:
    """In this context, report calls of the named modules, and of each operation of a FloatFunctional among them."""
    with ExitStack() as stack:
        for name in names:
            module = model.get_submodule(name)
            if isinstance(module, FloatFunctional | QFunctional):
                for operation in _OPERATIONS:
                    stack.enter_context(_method_watched(module, operation, name, before, after))
            else:
                stack.enter_context(attached(_hooks(module, name, before, after)))
        yield


def _hooks(module: nn.Module, name: str, before: _Before, after: _After) -> tuple[Any, Any]:
    operation = type(module).__name__.lower()

    def enter(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before(name, _Call(m, args, kwargs, operation))

    return (
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(lambda m, args, output: after(name, output)),
    )


@contextmanager
def _method_watched(module: nn.Module, operation: str, name: str, before: _Before, after: _After) -> Iterator[None]:
    method = getattr(module, operation)

    def watched(*args: Any, **kwargs: Any) -> Any:
        before(name, _Call(method, args, kwargs, operation.removesuffix("_relu")))
        output = method(*args, **kwargs)
        after(name, output)
        return output

    # Set on the instance, it hides the class's method.
    module.__dict__[operation] = watched
    try:
        yield
    finally:
        del module.__dict__[operation]


def _clamps(graph_module: fx.GraphModule) -> dict[str, ValueRange]:
    """Return, by name of module or FloatFunctional, the clamp that alone reads its output, in all its calls."""
    modules = dict(graph_module.named_modules(remove_duplicate=False))
    found: dict[str, ValueRange | None] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            after, name = clamp_after(node, modules), str(node.target).removesuffix(".activation_post_process")
            # If readers differ from call to call, outputs are compared as they are.
            found[name] = after if found.get(name, after) == after else None
    return {name: clamp for name, clamp in found.items() if clamp is not None}


def _weight_sqnr_db(fused: nn.Module, int8: nn.Module, name: str) -> float | None:
    """Return the SQNR of a module's weights; None if it has none, or if torch fused it (a ReLU) into another module."""
    layer, converted = (dict(model.named_modules(remove_duplicate=False)).get(name) for model in (fused, int8))
    converted = converted.conv if isinstance(converted, AfterStride) else converted
    layer = layer[0] if isinstance(layer, _FusedModule) else layer
    expected, actual = getattr(layer, "weight", None), getattr(converted, "weight", None)
    if not isinstance(expected, Tensor) or not callable(actual):
        return None
    weight = expected.detach()
    return decibels(_squares(weight), _squares(actual().dequantize() - weight))


# ------------------------------------------------------------------------------------------------ flow=fx


class _Graphs:
    """The models of the fx flow: layers are nodes of two graphs.

    A key is the name of a node's output tensor.
    """

    def __init__(self, fused: nn.Module, int8: fx.GraphModule):
        assert isinstance(fused, fx.GraphModule)
        self._fused, self._int8 = fused, int8
        self._modules = dict(fused.named_modules(remove_duplicate=False))
        self._nodes = {tensor_of(node): node for node in fused.graph.nodes if tensor_of(node)}

    def label(self, key: str) -> str:
        return key

    def layer(self, key: str) -> str:
        node = self._nodes[key]
        return str(node.target) if node.op == "call_module" else key

    def run_int8(self, images: Tensor, before: _Before, after: _After) -> None:
        keys = {node: tensor_of(node) for node in self._int8.graph.nodes if tensor_of(node) in self._nodes}
        _Watching(self._int8, keys, keys, before, after).run(images)

    def run_float(self, images: Tensor, before: _Before, after: _After) -> None:
        last = {node: tensor for tensor, node in self._nodes.items()}
        first = dict(last)
        for node in self._int8.graph.nodes:
            if has_fused_relu(node):
                # torch fused a ReLU into the operation before it, whose output is then the ReLU's.
                relu = self._nodes[tensor_of(node)]
                del first[relu]
                first[relu.all_input_nodes[0]] = tensor_of(node)
        _Watching(self._fused, first, last, before, after).run(images)

    def clamps(self, images: Tensor) -> Mapping[str, ValueRange]:
        found = {tensor: clamp_after(node, self._modules) for tensor, node in self._nodes.items()}
        return {tensor: clamp for tensor, clamp in found.items() if clamp is not None}

    def weight_sqnr_db(self, label: str) -> float | None:
        node = self._nodes[label]
        return _weight_sqnr_db(self._fused, self._int8, str(node.target)) if node.op == "call_module" else None


class _Watching(fx.Interpreter):
    """Runs a graph, calling `before` at the nodes in `first` and `after` behind those in `last`, with their keys."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        first: Mapping[fx.Node, str],
        last: Mapping[fx.Node, str],
        before: _Before,
        after: _After,
    ):
        super().__init__(graph_module)
        self._first, self._last, self._before, self._after = first, last, before, after

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n in self._first:

            def function(*args: Any, **kwargs: Any) -> Any:
                return getattr(self, n.op)(n.target, args, kwargs)

            self._before(self._first[n], _Call(function, args, kwargs, _operation(n)))
        output = getattr(self, n.op)(n.target, args, kwargs)
        if n in self._last:
            self._after(self._last[n], output)
        return output


def _operation(node: fx.Node) -> str:
    """Return the name of a node's operation, the same for torch's function, operator, method and INT8 kernel."""
    if node.op == "call_module":
        module = node.graph.owning_module.get_submodule(str(node.target)) if node.graph.owning_module else None
        return type(module).__name__.lower()
    name = called(node).removesuffix("_").removesuffix("_relu")
    name = {"iadd": "add", "imul": "mul"}.get(name, name)
    return "quantize" if name.startswith("quantize_per_tensor") else name
