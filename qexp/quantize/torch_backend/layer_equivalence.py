"""A check that every layer of the INT8 model computes the function of its float counterpart, up to rounding.

The INT8 model runs on a few images, and the inputs and outputs of each layer are recorded. Then the float model runs as
its shadow: each layer gets the input of its INT8 counterpart, and its weights, so that its output contains no noise of
earlier layers or of rounded weights; and it passes on the INT8 layer's output. So the float model's own Python carries
the INT8 model's values from layer to layer, and three things are checked separately:

- a layer's input: if the float model passes another tensor to it, something between it and the layers before was lost
  or changed in the INT8 model (an operation in place on a copy, codes of two grids that were joined);
- its function: for the same input and weights, another function differs by more than rounding explains;
- its parameters: weights within half a step of the float ones, the same bias, and the grid from calibration.

Distances are in steps of the INT8 tensor's grid, and values beyond its ends are clipped, as kernels do.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.ao.nn.quantized.dynamic as nnqd
from torch import Tensor, fx, nn
from torch.ao.nn.intrinsic.modules.fused import _FusedModule
from torch.ao.nn.quantizable import LSTM, MultiheadAttention
from torch.ao.nn.quantized import FloatFunctional, QFunctional
from torch.ao.quantization import DeQuantStub, QuantStub, QuantWrapper
from torch.fx.node import map_aggregate

from qexp.config.schema import Engine, Scheme
from qexp.errors import RunError
from qexp.quantize.calibration.grid import QUANT_MAX
from qexp.quantize.flow import QuantizedModel
from qexp.quantize.graph.tensor_names import called, public, tensor_of
from qexp.quantize.graph.tracing import standard_type
from qexp.quantize.saturation import kernels
from qexp.quantize.torch_backend import emulation
from qexp.quantize.torch_backend.engines import engine as torch_engine
from qexp.quantize.torch_backend.graph_names import has_fused_relu, only_changes_grid
from qexp.quantize.torch_backend.ignored_quant_max import quant_max_of
from qexp.quantize.torch_backend.layers import is_per_channel, weight_scales
from qexp.quantize.torch_backend.qnnpack_biases import fit_biases
from qexp.quantize.torch_backend.stride_bugs import AfterStride
from qexp.records import QParams


@dataclass(frozen=True)
class Deviation:
    """The largest distances of one INT8 layer from its float counterpart, over all images and calls.

    name: the layer, or the output tensor of an operation. computes: the class or function that torch executes. read,
    output: distance of its input, and of its output for the same input, in steps of these tensors' grids, or in
    ten-thousandths of the largest value in FP32. weight: in steps of the weight's grid; bias: in millionths of the
    largest. allowed_read, allowed: the parts of `read` and `output` that rounding explains. step: the scale of the
    output, 0 in FP32; calibrated: the scale from calibration, 0 if unknown or not the layer's own. saturated: the
    number of outputs explained by saturated 16-bit accumulators, which are not in `output`.
    """

    name: str
    computes: str
    read: float = 0.0
    output: float = 0.0
    weight: float = 0.0
    bias: float = 0.0
    allowed_read: float = 0.0
    allowed: float = 0.0
    step: float = 0.0
    calibrated: float = 0.0
    saturated: int = 0

    @property
    def fault(self) -> str:
        """The layer's fault, as the predicate of a sentence about it; "" if it has none."""
        if not self.read <= self.allowed_read:
            return (
                f"reads a tensor that is {self.read:.3g} steps of its grid away from the one that its float "
                f"counterpart reads ({self.allowed_read:g} is rounding): what is computed between it and the layers "
                "before it was lost or changed"
            )
        if not self.weight <= _ALLOWED_WEIGHT:
            return f"holds weights that are {self.weight:.3g} steps of their grid away from the float ones"
        if not self.bias <= 1:
            return f"holds a bias that differs from the float one by {self.bias / 1e5:.2g} of the largest"
        if self.calibrated and not math.isclose(self.step, self.calibrated, rel_tol=1e-5):
            return f"quantizes its output in steps of {self.step:.3g}, where calibration found {self.calibrated:.3g}"
        if not self.output <= self.allowed:
            grid = f"steps of its grid ({self.step:.3g})" if self.step else "ten-thousandths of its largest value"
            return (
                f"has, for the same input, an output {self.output:.3g} {grid} away from its float counterpart's, "
                f"where rounding explains {self.allowed:g}"
            )
        return ""


_ALLOWED_WEIGHT = 0.51
# Attention was off by 2.4 steps and an LSTM of 49 tokens by 3.8; with tokens and images mixed up it is 60 and more.
_ALLOWED_MANY = 16.0
# torch's kernels for normalisations have the variance from sums of squares: one was 1.96 steps off where it is small.
_ALLOWED_NORM = 3.0
_NORMS = ("layernorm", "groupnorm", "instancenorm")
# Emulated sums of 2,016 products were two steps off in 5 of 44,000 outputs (EfficientFormer); another function differs
# in most.
_OTHERWISE = 1e-3


def check_layers(model: QuantizedModel, images: Tensor) -> None:
    """Raise RunError, naming the first layer in the order of execution that differs from its float counterpart.

    images: float32 [n, 3, H, W], few.
    """
    for found in layer_deviations(model, images):
        if found.fault:
            raise RunError(
                f"the INT8 model of flow={model.flow.name} and engine={model.engine} computes something else than the "
                f"float model: {found.name} ({found.computes}) {found.fault}."
            )


def layer_deviations(model: QuantizedModel, images: Tensor) -> tuple[Deviation, ...]:
    """Return the deviation of each INT8 layer and operation from its float counterpart, in the order of execution.

    images: float32 [n, 3, H, W], few. Neither model is changed.
    """
    fused, int8, engine = model.fused, model.module, model.engine
    models: _Graphs | _Modules = _Graphs(fused, int8) if isinstance(int8, fx.GraphModule) else _Modules(fused, int8)
    images = images.contiguous(memory_format=torch.channels_last)
    with torch_engine(engine), torch.no_grad():
        given, calls = models.run_int8(images.clone())
        clips = isinstance(models, _Graphs)
        shadow = _Shadow(calls, model.qparams, engine, quant_max_of(int8), models.allowed_read, clips)
        output = models.run_float(images.clone(), shadow)
        shadow.compare_outputs(output, given)
    return tuple(shadow.found.values())


# ------------------------------------------------------------------------------------------------ distances


def _steps(values: Tensor, quantized: Tensor, quant_max: int, clips: bool = True) -> Tensor:
    """Return the distance of each value of a quantized tensor from a float one, in steps of its grid.

    clips: True to clip float values to the grid first; quant_max: the largest code of activations.
    """
    scale, zero_point = _grid(quantized)
    codes = quantized.int_repr()
    exact = (values / scale).add_(zero_point)
    if clips:
        limits = torch.iinfo(codes.dtype)
        exact.clamp_(limits.min, quant_max if codes.dtype is torch.uint8 else limits.max)
    return exact.sub_(codes).abs_()


def _grid(quantized: Tensor) -> tuple[Any, Any]:
    """Return scale and zero point, as numbers or as tensors that broadcast to `quantized`."""
    if not is_per_channel(quantized):
        return quantized.q_scale(), quantized.q_zero_point()
    shape = [1] * quantized.ndim
    shape[quantized.q_per_channel_axis()] = -1
    scales, zero_points = quantized.q_per_channel_scales(), quantized.q_per_channel_zero_points()
    return scales.float().view(shape), zero_points.view(shape)


def _distance(values: Tensor, given: Tensor, quant_max: int, clips: bool = True) -> float:
    """Return the largest distance of a float tensor from an INT8 model's, in steps (FP32: 10⁻⁴ of the largest value).

    It is infinite if shapes differ; NaN is ignored.
    """
    if values.shape != given.shape:
        return math.inf
    if not values.numel() or not values.is_floating_point():
        return 0.0
    if given.is_quantized:
        return _largest(_steps(values, given, quant_max, clips))
    return _largest((values - given).abs_()) / max(1e-4 * _largest(given.abs()), 1e-30)


def _largest(distances: Tensor) -> float:
    """Return the largest value, ignoring NaN."""
    largest = float(distances.max())
    return largest if not math.isnan(largest) else float(distances.nan_to_num(0.0, math.inf).max())


def _weight_distance(weight: Tensor, quantized: Tensor, as_float: Tensor) -> float:
    """Return the largest distance of a float weight from an INT8 layer's, in steps; clipped values are compared with
    the ends.

    as_float: `quantized`, dequantized; it is overwritten, to save memory.
    """
    scale, zero_point = _grid(quantized)
    off = as_float.sub_(weight.detach()).abs_()
    others = [d for d in range(off.ndim) if not is_per_channel(quantized) or d != quantized.q_per_channel_axis()]
    largest = float((off.amax(others, keepdim=True) / scale).max())
    if largest <= _ALLOWED_WEIGHT:
        return largest
    beyond, codes = off > _ALLOWED_WEIGHT * scale, quantized.int_repr()
    scales, zero_points = (torch.as_tensor(each).expand(off.shape)[beyond] for each in (scale, zero_point))
    exact = (weight.detach()[beyond] / scales + zero_points).clamp(int(codes.min()), int(codes.max()))
    return max(0.5, float((exact - codes[beyond]).abs().max()))


# ------------------------------------------------------------------------------------------------ the two passes


@dataclass(frozen=True)
class _Call:
    """A call of an INT8 layer: the module, its class or function, its inputs (passed weights included), its output."""

    module: nn.Module | None
    computes: str
    inputs: tuple[Tensor, ...]
    output: Any


def _tensors(values: Any) -> tuple[Tensor, ...]:
    """Return copies of the tensors among arguments, packed weights unpacked; originals may be overwritten later."""
    found: list[Tensor] = []

    def look(value: Any) -> Any:
        if isinstance(value, Tensor):
            found.append(value.clone())
        elif isinstance(value, torch.ScriptObject) and hasattr(value, "unpack"):
            found.append(value.unpack()[0])
        return value

    map_aggregate(values, look)
    return tuple(found)


def _as_float(value: Any) -> Any:
    return value.dequantize() if isinstance(value, Tensor) and value.is_quantized else value


class _Shadow:
    """Replaces inputs, weights and outputs of float layers by those of the INT8 model, and records their distances."""

    def __init__(
        self,
        calls: Mapping[str, deque[_Call]],
        qparams: Mapping[str, QParams],
        engine: Engine,
        quant_max: int,
        allowed_read: float,
        clips: bool,
    ):
        self._calls, self._qparams, self._engine, self._quant_max = calls, qparams, engine, quant_max
        self._allowed_read, self._clips = allowed_read, clips
        self.found: dict[str, Deviation] = {}

    def next_call(self, key: str) -> _Call | None:
        """Return the INT8 model's counterpart of the float model's next call of this name."""
        waiting = self._calls.get(key)
        return waiting.popleft() if waiting else None

    def read(self, key: str, call: _Call, arguments: Any) -> Any:
        """Return the float layer's arguments, the tensors replaced by those that its INT8 counterpart read."""
        waiting, distance = iter(call.inputs), 0.0

        def given(value: Any) -> Any:
            nonlocal distance
            mine = next(waiting, None) if isinstance(value, Tensor) else None
            if mine is None or torch.equal(value, as_float := _as_float(mine)):
                return value
            distance = max(distance, _distance(value, mine, self._quant_max, self._clips))
            return as_float if as_float.shape == value.shape else value

        arguments = map_aggregate(arguments, given)
        self._note(key, call, read=distance, allowed_read=self._allowed_read)
        return arguments

    def run(self, key: str, call: _Call, layer: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Return the output of a float layer with the INT8 layer's weights."""
        weight, bias = _weight_and_bias(call.module)
        owner = layer[0] if isinstance(layer, _FusedModule) else layer
        own = owner._parameters.get("weight")
        if weight is None or own is None or weight.shape != own.shape:
            return run(*args, **kwargs)
        if bias is not None or owner._parameters.get("bias") is not None:
            self._note(key, call, bias=_bias_distance(owner._parameters.get("bias"), bias))
        as_float = _as_float(weight)
        owner._parameters["weight"] = nn.Parameter(as_float, requires_grad=False)
        try:
            rounded = _rounded(args[0], self._engine) if isinstance(call.module, nnqd.Linear) else args[0]
            output = run(rounded, *args[1:], **kwargs)
        finally:
            owner._parameters["weight"] = own
        if weight.is_quantized:
            self._note(key, call, weight=_weight_distance(own, weight, as_float))
        return output

    def gave(self, key: str, call: _Call, output: Any) -> Any:
        """Return the INT8 layer's output in place of the float layer's."""
        theirs = iter(_tensors(call.output))

        def replaced(value: Any) -> Any:
            mine = next(theirs, None) if isinstance(value, Tensor) else None
            if mine is None:
                return value
            self._compare(key, call, value, mine)
            as_float = _as_float(mine)
            return as_float if as_float.shape == value.shape else value

        return map_aggregate(output, replaced)

    def compare_outputs(self, output: Any, given: Any) -> None:
        """Compare the outputs of the whole models: operations behind their last layers."""
        call = _Call(None, "the model's output", (), given)
        self._compare("output", call, output, given)

    def _compare(self, key: str, call: _Call, expected: Tensor, given: Tensor) -> None:
        distance, saturated = _distance(expected, given, self._quant_max), 0
        allowed = _allowed(call, given, self._engine)
        if not distance <= allowed and _saturated(call, expected, given, allowed, self._engine):
            saturated, distance = int((_steps(expected, given, self._quant_max) > allowed).sum()), 0.0
        step, calibrated = given.q_scale() if given.is_quantized else 0.0, 0.0
        if key in self._qparams and _chooses_grid(call, given):
            calibrated = float(self._qparams[key].scale[0])
        found = {"output": distance, "allowed": allowed, "step": step, "calibrated": calibrated}
        self._note(key, call, **found, saturated=saturated)

    def _note(self, key: str, call: _Call, **seen: Any) -> None:
        before = self.found.get(key, Deviation(key, call.computes))
        after = {name: max(value, getattr(before, name)) for name, value in seen.items()}
        if "saturated" in seen:
            after["saturated"] = before.saturated + seen["saturated"]
        self.found[key] = Deviation(**{**before.__dict__, **after})


def _chooses_grid(call: _Call, given: Tensor) -> bool:
    """True if a call's output has a grid of its own, from calibration: neither its input's, nor one computed from that
    and a number, as after a multiplication by it."""
    if not given.is_quantized or any(one.is_quantized and _same_grid(one, given) for one in call.inputs):
        return False
    return (
        call.computes.rpartition(".")[2].removesuffix("_relu").removesuffix("_scalar") not in ("add", "mul")
        or len(call.inputs) > 1
    )


def _same_grid(one: Tensor, other: Tensor) -> bool:
    return not is_per_channel(one) and (one.q_scale(), one.q_zero_point()) == (other.q_scale(), other.q_zero_point())


def _weight_and_bias(module: nn.Module | None) -> tuple[Tensor | None, Tensor | None]:
    """Return an INT8 layer's weight and bias; None if it has none."""
    module = module.conv if isinstance(module, AfterStride) else module
    if module is None:
        return None, None
    if callable(getattr(module, "get_weight", None)):  # torch's reference modules
        return module.get_weight(), getattr(module, "bias", None)  # type: ignore[operator]
    if not callable(getattr(module, "_weight_bias", None)):
        return None, None
    found: tuple[Tensor, Tensor | None] = module._weight_bias()  # type: ignore[operator]
    return found  # one call for both, since unpacking copies


def _bias_distance(bias: Tensor | None, given: Tensor | None) -> float:
    """Return the largest difference, in hundred-thousandths of the largest; None counts as zeros."""
    mine = torch.zeros(1) if bias is None else bias.detach()
    theirs = torch.zeros(1) if given is None else given.detach()
    return 1e5 * float((mine - theirs).abs().max()) / max(float(mine.abs().max()), 1e-30)


def _rounded(inputs: Tensor, engine: Engine) -> Tensor:
    """Round an input as a dynamic linear layer does: to 7 bits between the batch's extremes, 8 with qnnpack."""
    scale, zero_point = torch._choose_qparams_per_tensor(inputs, engine is not Engine.qnnpack)
    return torch.quantize_per_tensor(inputs, float(scale), int(zero_point), torch.quint8).dequantize()


def _allowed(call: _Call, given: Tensor, engine: Engine) -> float:
    """Return the distance that rounding explains, in steps, of an INT8 layer's output `given` from the float one.

    Kernels round once, to half a step, or twice if they average codes. qnnpack also rounds the bias, to a multiple of
    (scale of the input · scale of the weights), which exceeds a step of the output on grids of few bits. In modules of
    many operations the roundings add up.
    """
    if isinstance(call.module, MultiheadAttention | LSTM):
        return _ALLOWED_MANY
    if call.computes.rpartition(".")[2].lower().replace("_", "").startswith(_NORMS):
        return _ALLOWED_NORM
    weight = _weight_and_bias(call.module)[0] if engine is Engine.qnnpack else None
    if weight is None or not given.is_quantized or not call.inputs[0].is_quantized:
        return 1.0
    bias = float(weight_scales(weight)[0].max()) * call.inputs[0].q_scale() / given.q_scale() / 2
    return max(1.0, 0.6 + bias)


def _saturated(call: _Call, expected: Tensor, given: Tensor, allowed: float, engine: Engine) -> bool:
    """True if saturating 16-bit accumulators explain a layer's unexpected output.

    That is: this machine's kernels have such accumulators, they can overflow with the layer's input, and emulated ones
    produce the same output but for a thousandth of its values; or, if they can't be emulated, exact ones (qnnpack's)
    produce the expected output.
    """
    layer: Any = call.module
    inner = layer.conv if isinstance(layer, AfterStride) else layer
    if engine is Engine.qnnpack or layer is None or not any(one is inner for _, one in emulation.int8_layers(layer)):
        return False
    scheme = Scheme.asymmetric if bool(weight_scales(inner.weight())[1].any()) else Scheme.symmetric
    kinds = kernels.saturating_here(engine, scheme, kernels.probe())
    inputs, alone = call.inputs[0], nn.Sequential(layer)
    if not emulation.at_risk(alone, engine, kinds) or not emulation.overflow_test(layer, engine)(inputs):
        return False
    if not emulation.not_emulated(alone):
        emulated = emulation.with_emulated_accumulators(alone, engine)(inputs)
        off = (emulated.int_repr().int() - given.int_repr().int()).abs() > 1
        return float(off.float().mean()) < _OTHERWISE
    with torch_engine(Engine.qnnpack):
        exact = copy.deepcopy(layer)  # packs the weights again
        fit_biases(exact)
        return _distance(expected, exact(inputs), QUANT_MAX) <= allowed


# ------------------------------------------------------------------------------------------------ flow=eager, dynamic

_METHODS = ("add", "add_relu", "add_scalar", "cat", "matmul", "mul", "mul_scalar")  # of FloatFunctional


class _Modules:
    """Two models as modules: a layer is a module without children, or an operation of a FloatFunctional."""

    allowed_read = 1.5
    """Between two layers is the user's Python, whose functions round, too (average pooling, for example); but none of
    them may clip, since the ends of their grids are not from calibration."""

    def __init__(self, fused: nn.Module, int8: nn.Module):
        self._int8 = int8
        # The same wrapper, for the same names; it computes nothing.
        self._fused = QuantWrapper(fused) if isinstance(int8, QuantWrapper) else fused
        self._layers = dict(_layers(self._fused))
        # A module under two names may be two in the converted model.
        self._keys: dict[str, str] = {}
        first = {id(module): name for name, module in reversed(self._layers.items())}
        for name, module in self._fused.named_modules(remove_duplicate=False):
            if id(module) in first:
                self._keys[name] = first[id(module)]

    def run_int8(self, images: Tensor) -> tuple[Any, dict[str, deque[_Call]]]:
        calls: dict[str, deque[_Call]] = {}

        def around(name: str, module: nn.Module, computes: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            inputs = _tensors((args, kwargs))
            output = run(*args, **kwargs)
            kept = map_aggregate(output, lambda value: value.clone() if isinstance(value, Tensor) else value)
            if not isinstance(module, nn.Identity):
                calls.setdefault(self._keys[name], deque()).append(_Call(module, computes, inputs, kept))
            return output

        known = dict(self._int8.named_modules(remove_duplicate=False))
        counterparts = {id(known[name]): (name, known[name]) for name in reversed(self._keys) if name in known}
        with _around(counterparts.values(), around):
            return self._int8(images), calls

    def run_float(self, images: Tensor, shadow: _Shadow) -> Any:
        def around(name: str, module: nn.Module, computes: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            call = shadow.next_call(self._keys[name])
            if call is None:
                return run(*args, **kwargs)
            key = public(name, self._int8)
            own = _tensors_of((args, kwargs))
            given, named = shadow.read(key, call, (args, kwargs))
            if getattr(module, "inplace", False) and own[0] is not given[0]:
                # Other readers of the tensor must see what the layer writes to it.
                given = (own[0].copy_(given[0]), *given[1:])
            output = shadow.run(key, call, module, run, given, named)
            replaced = shadow.gave(key, call, output)
            if isinstance(output, Tensor) and any(output is value for value in own) and output is not replaced:
                return output.copy_(replaced)
            return replaced

        # torch's fast path for a whole transformer layer calls none of its modules.
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with _around(self._layers.items(), around):
                return self._fused(images)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


def _layers(fused: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    inside: tuple[str, ...] = ()
    for name, module in fused.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, FloatFunctional | _FusedModule | nn.MultiheadAttention):
            inside += (f"{name}.",)
            yield name, module
        elif isinstance(module, QuantStub | DeQuantStub) or (
            standard_type(module) is not None and not list(module.children())
        ):
            yield name, module


def _tensors_of(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_aggregate(values, lambda value: found.append(value) if isinstance(value, Tensor) else None)
    return found


@contextmanager
def _around(layers: Iterable[tuple[str, nn.Module]], around: Callable[..., Any]) -> Iterator[None]:
    """In this context `around` is called in place of each of these modules, and of each operation of a FloatFunctional.

    Its arguments are the name, the module, the class or operation, the replaced function, args and kwargs.
    """
    with ExitStack() as stack:
        for name, module in layers:
            operations = isinstance(module, FloatFunctional | QFunctional)
            for method in _METHODS if operations else ("forward",):
                computes = f"{type(module).__name__}.{method}" if operations else type(module).__name__
                _wrap(stack, around, name, module, computes, method)
        yield


def _wrap(
    stack: ExitStack, around: Callable[..., Any], name: str, module: nn.Module, computes: str, method: str
) -> None:
    before = module.__dict__.get(method)
    run = getattr(module, method)
    # Set on the instance, it hides the class's method.
    module.__dict__[method] = lambda *args, **kwargs: around(name, module, computes, run, args, kwargs)

    def restore() -> None:
        if before is None:
            del module.__dict__[method]
        else:
            module.__dict__[method] = before

    stack.callback(restore)


# ------------------------------------------------------------------------------------------------ flow=fx


class _Graphs:
    """Two models as graphs: a layer is a node, under the name of its output tensor."""

    allowed_read = 0.51
    """An FP32 tensor may be quantized on its way, which rounds it and clips it to the calibrated range."""

    def __init__(self, fused: nn.Module, int8: fx.GraphModule):
        assert isinstance(fused, fx.GraphModule)
        self._fused, self._int8 = fused, int8

    def run_int8(self, images: Tensor) -> tuple[Any, dict[str, deque[_Call]]]:
        calls: dict[str, deque[_Call]] = {}
        modules = dict(self._int8.named_modules(remove_duplicate=False))

        quantized: dict[Tensor, Tensor] = {}

        def run(node: fx.Node, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            if _dequantizes(node):
                # Its readers are compared on the grid that the tensor was rounded and clipped to.
                output = run(*args, **kwargs)
                quantized[output] = args[0]
                return output
            inputs = _tensors(
                map_aggregate((args, kwargs), lambda one: quantized.get(one, one) if isinstance(one, Tensor) else one)
            )
            output = run(*args, **kwargs)
            kept = map_aggregate(output, lambda value: value.clone() if isinstance(value, Tensor) else value)
            module = modules[str(node.target)] if node.op == "call_module" else None
            computes = type(module).__name__ if module is not None else called(node)
            calls.setdefault(tensor_of(node), deque()).append(_Call(module, computes, inputs, kept))
            return output

        nodes = {node for node in self._int8.graph.nodes if node.op.startswith("call_")}
        nodes = {node for node in nodes if _dequantizes(node) or (tensor_of(node) and not only_changes_grid(node))}
        return _Around(self._int8, nodes, run).run(images), calls

    def run_float(self, images: Tensor, shadow: _Shadow) -> Any:
        modules = dict(self._fused.named_modules(remove_duplicate=False))
        by_tensor = {tensor_of(node): node for node in self._fused.graph.nodes if tensor_of(node)}
        first = {node: tensor for tensor, node in by_tensor.items()}
        for node in self._int8.graph.nodes:
            if has_fused_relu(node):
                # torch fused a ReLU into the operation before it: the one has the input, the other the output.
                relu = by_tensor[tensor_of(node)]
                del first[relu]
                first[relu.all_input_nodes[0]] = tensor_of(node)
        running: dict[str, _Call] = {}

        def run(node: fx.Node, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            begins, ends = first.get(node, ""), tensor_of(node)
            call = shadow.next_call(begins)
            if call is not None:
                running[begins] = call
                args, kwargs = shadow.read(begins, call, (args, kwargs))
            if call is not None and node.op == "call_module":
                output = shadow.run(begins, call, modules[str(node.target)], run, args, kwargs)
            else:
                output = run(*args, **kwargs)
            call = running.pop(ends, None)
            return output if call is None else shadow.gave(ends, call, output)

        nodes = {node for node in self._fused.graph.nodes if node.op.startswith("call_")}
        return _Around(self._fused, nodes, run).run(images)


def _dequantizes(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "dequantize"


class _Around(fx.Interpreter):
    """Runs a graph, calling `around(node, run, args, kwargs)` in place of each node in `nodes`."""

    def __init__(self, graph_module: fx.GraphModule, nodes: set[fx.Node], around: Callable[..., Any]):
        super().__init__(graph_module)
        self._nodes, self._around = nodes, around

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)

        def run(*args: Any, **kwargs: Any) -> Any:
            return getattr(self, n.op)(n.target, args, kwargs)

        return self._around(n, run, args, kwargs) if n in self._nodes else run(*args, **kwargs)
