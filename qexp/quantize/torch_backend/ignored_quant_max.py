"""Clamps for activations of fewer than 8 bits, whose quant_max torch's kernels ignore.

torch's INT8 kernels clamp to the 8-bit type only: with 4 bits, quant_max is 15, but values beyond the calibrated range
(clipped by the observer, or larger than any that calibration saw) get codes up to 255. So every module and function
that returns a quantized tensor is followed by a clamp of its codes, in the eager flow and in fx. Those that only pass
codes on (ReLU, pooling, flatten) need none.

`torch.clamp` of a quantized tensor is exact, can be traced, and takes 4 µs for 65,536 codes (Zen 4, one thread), a
tenth of `int_repr` and back. Moving the zero point up by 255 - quant_max, so that the type's own end clamps, would be
free; but it clamps the lower end only behind a ReLU, and pairs of codes near 255 are those that overflow 16 bits.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.ao.nn.quantized as nnq
from torch import Tensor, fx, nn

from qexp.config.schema import Engine
from qexp.quantize.calibration.grid import QUANT_MAX
from qexp.quantize.torch_backend.plain_clamps import clamps_are_plain

# Modules and functions whose kernels return 256 levels over a fixed range; nnq.Softmax has a scale.
_FIXED_MODULES = (nn.Sigmoid, nn.Hardsigmoid, nn.Tanh)
_FIXED_FUNCTIONS: dict[Any, Callable[..., Tensor]] = {
    torch.sigmoid: torch.sigmoid,
    torch.nn.functional.sigmoid: torch.sigmoid,
    "sigmoid": torch.sigmoid,
    "sigmoid_": torch.sigmoid,
    torch.tanh: torch.tanh,
    torch.nn.functional.tanh: torch.tanh,
    "tanh": torch.tanh,
    "tanh_": torch.tanh,
    torch.nn.functional.hardsigmoid: torch.nn.functional.hardsigmoid,
}
_RETURN_CODES = {torch.quantize_per_tensor, torch.cat, torch.concat, torch.stack}


def clamped(tensor: Tensor, quant_max: int) -> Tensor:
    """Return a quint8 tensor clamped to codes up to `quant_max`, with the same scale; anything else as it is."""
    if not isinstance(tensor, Tensor) or tensor.dtype is not torch.quint8 or quant_max >= QUANT_MAX:
        return tensor
    scale, zero_point = tensor.q_scale(), tensor.q_zero_point()
    end = (quant_max - zero_point) * scale
    if torch.backends.quantized.engine != Engine.qnnpack.value:
        return torch.clamp(tensor, max=end)
    if clamps_are_plain():
        return torch.clamp(tensor, min=-zero_point * scale, max=end)
    # qnnpack needs both bounds, and treats every tensor as contiguous (torch 2.13).
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    in_memory = tensor.permute(order)
    flat = torch.clamp(in_memory.reshape(-1), min=-zero_point * scale, max=end)
    return flat.view(in_memory.shape).permute([order.index(dim) for dim in range(tensor.ndim)])


def coarser(tensor: Tensor, quant_max: int) -> Tensor:
    """Return a quint8 tensor requantized to quant_max + 1 levels over its fixed range; anything else as it is."""
    if not isinstance(tensor, Tensor) or tensor.dtype is not torch.quint8:
        return tensor
    levels = (QUANT_MAX + 1) // (quant_max + 1)
    return _quantized(_values(tensor), tensor.q_scale() * levels, tensor.q_zero_point() // levels, quant_max)


def _values(tensor: Tensor) -> Tensor:
    return (tensor.int_repr().float() - tensor.q_zero_point()) * tensor.q_scale()


def _quantized(values: Tensor, scale: float, zero_point: int, quant_max: int) -> Tensor:
    return clamped(torch.quantize_per_tensor(values, scale, zero_point, torch.quint8), quant_max)


def _with_number(function: Callable[..., Tensor], name: str, tensor: Tensor, number: float, quant_max: int) -> Tensor:
    """Return the sum or product of a quantized tensor and a number, on the finest grid that covers all its codes.

    function, name: torch's operator, which assumes codes of 0…255 when it chooses the output's grid.
    """
    if not isinstance(tensor, Tensor) or tensor.dtype is not torch.quint8:
        return function(tensor, number)
    relu, compute = name.endswith("relu"), operator.add if name.startswith("add") else operator.mul

    def computed(values: Any) -> Any:
        return compute(values, number)

    scale, zero_point = tensor.q_scale(), tensor.q_zero_point()
    ends = sorted(computed((code - zero_point) * scale) for code in (0, quant_max))
    low, high = 0.0 if relu else min(ends[0], 0.0), max(ends[1], 0.0)
    scale = max((high - low) / quant_max, torch.finfo(torch.float32).eps)
    values = computed(_values(tensor))
    return _quantized(values.relu() if relu else values, scale, round(-low / scale), quant_max)


# ------------------------------------------------------------------------------------------------ modules


class _Clamped:
    """A mixin for torch's modules that return quantized tensors, which clamps their codes to 0…quant_max."""

    quant_max: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return clamped(super().forward(*args, **kwargs), self.quant_max)  # type: ignore[misc]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, quant_max={self.quant_max}".removeprefix(", ")  # type: ignore[misc]


class _Coarser(_Clamped):
    """A mixin for modules with a fixed range, which makes their grid coarser."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return coarser(super(_Clamped, self).forward(*args, **kwargs), self.quant_max)  # type: ignore[misc]


class _ClampedFunctional(_Clamped):
    """A mixin for QFunctional, which has a method for each operation.

    Most outputs pass through its `activation_post_process`, which is clamped (see `clamp_codes`).
    """

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        return clamped(super().matmul(x, y), self.quant_max)  # type: ignore[misc]

    def add_scalar(self, x: Tensor, y: float) -> Tensor:
        return _with_number(super().add_scalar, "add", x, y, self.quant_max)  # type: ignore[misc]

    def mul_scalar(self, x: Tensor, y: float) -> Tensor:
        return _with_number(super().mul_scalar, "mul", x, y, self.quant_max)  # type: ignore[misc]


@cache
def _clamped_class(kind: Any, quant_max: int) -> Any:
    """Return a subclass with the mixin.

    Names, states and isinstance stay the same, and torch's own copies of INT8 layers, which lose hooks, keep the clamp.
    """
    mixin = (
        _ClampedFunctional if issubclass(kind, nnq.QFunctional) else _Coarser if kind in _FIXED_MODULES else _Clamped
    )
    made = {"quant_max": quant_max, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (mixin, kind), made)


def torch_class(module: nn.Module) -> type[nn.Module]:
    """Return the original class of a module that may be clamped."""
    return type(module).__mro__[2] if isinstance(module, _Clamped) else type(module)


def is_clamped(module: nn.Module) -> bool:
    """True if a module clamps its output to its `quant_max`."""
    return isinstance(module, _Clamped)


def _returns_codes(module: nn.Module) -> bool:
    kind = type(module)
    if kind in _FIXED_MODULES:
        return True
    int8 = kind.__module__.startswith("torch.ao.nn.") and ".quantized" in kind.__module__
    return int8 and any(hasattr(module, name) for name in ("scale", "output_scale"))


# ------------------------------------------------------------------------------------------------ functions


@dataclass(frozen=True)
class ClampedFunction:
    """Replaces a function in an fx graph that returns a quantized tensor, and clamps its codes to 0…quant_max."""

    function: Callable[..., Tensor]
    quant_max: int

    @property
    def __name__(self) -> str:
        return self.function.__name__

    def __str__(self) -> str:
        return str(self.function)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.function in _FIXED_FUNCTIONS:
            return coarser(self.function(*args, **kwargs), self.quant_max)
        if self.__name__ in ("add", "add_relu", "mul", "mul_relu") and not isinstance(args[1], Tensor):
            return _with_number(self.function, self.__name__, args[0], args[1], self.quant_max)
        return clamped(self.function(*args, **kwargs), self.quant_max)


def torch_function(target: Any) -> Any:
    """Return the original target of a node that may be clamped."""
    return target.function if isinstance(target, ClampedFunction) else target


def _function_to_clamp(node: fx.Node) -> Callable[..., Tensor] | None:
    """Return the function that a node of a converted graph calls if its output must be clamped, else None."""
    target: Any = node.target
    if node.op in ("call_function", "call_method") and target in _FIXED_FUNCTIONS:
        target = _FIXED_FUNCTIONS[target]
    elif node.op != "call_function" or not (target in _RETURN_CODES or str(target).startswith("quantized.")):
        return None
    function: Callable[..., Tensor] = target
    return function


# ------------------------------------------------------------------------------------------------ whole models


def clamp_codes(converted: nn.Module, quant_max: int) -> nn.Module:
    """Clamp every activation of a converted model to 0…quant_max, in place, and return it; no change if that is 255."""
    if quant_max >= QUANT_MAX:
        return converted
    for module in list(converted.modules()):
        if _returns_codes(module):
            kind: Any = type(module)
            module.__class__ = _clamped_class(kind, quant_max)
        if isinstance(module, nnq.QFunctional):
            module.activation_post_process = _clamped_class(nn.Identity, quant_max)()
    if isinstance(converted, fx.GraphModule):
        for node in converted.graph.nodes:
            if (function := _function_to_clamp(node)) is not None:
                node.op, node.target = "call_function", ClampedFunction(function, quant_max)
        converted.recompile()
    return converted


def quant_max_of(converted: nn.Module) -> int:
    """Return the largest code that activations of a converted model can have: 255, unless they are clamped."""
    found = [module.quant_max for module in converted.modules() if isinstance(module, _Clamped)]
    if isinstance(converted, fx.GraphModule):
        found += [node.target.quant_max for node in converted.graph.nodes if isinstance(node.target, ClampedFunction)]
    return min(found, default=QUANT_MAX)
