"""Activations of fewer than 8 bits, held on the grid that was asked for.

torch's INT8 kernels clamp to the 8-bit type and know no quant_max: with 4 bits they give codes up to 255 where 15 is
the largest, wherever a value lies beyond its range: an observer cut that, or calibration saw no value as large.
So what gives a quantized tensor is followed by a clamp of its codes, in the eager flow as in fx. What only hands codes
on (ReLU, pooling, flatten) needs none.

`torch.clamp` of a quantized tensor is exact, is traced, and takes 4 µs for 65,536 codes (Zen 4, one thread), a tenth of
what `int_repr` and back take. A zero point moved up by 255 - qmax would let the type's own end cut, for nothing; but it
cuts the lower end behind a ReLU only, and pairs of codes near 255 are what overflows 16 bits.
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
from qexp.quantize.calibration.grid import HIGHEST

# What torch's kernels give on 256 levels between fixed ends, whatever is asked for; nnq.Softmax takes a scale.
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
_GIVE_CODES = {torch.quantize_per_tensor, torch.cat, torch.concat, torch.stack}


def clamped(tensor: Tensor, highest: int) -> Tensor:
    """A quantized uint8 tensor with no code beyond `highest`, on the same grid; anything else as it is."""
    if not isinstance(tensor, Tensor) or tensor.dtype is not torch.quint8 or highest >= HIGHEST:
        return tensor
    scale, zero_point = tensor.q_scale(), tensor.q_zero_point()
    end = (highest - zero_point) * scale
    if torch.backends.quantized.engine != Engine.qnnpack.value:
        return torch.clamp(tensor, max=end)
    # qnnpack wants both ends, and takes codes in the order of memory for those of a contiguous tensor (torch 2.13).
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    in_memory = tensor.permute(order)
    flat = torch.clamp(in_memory.reshape(-1), min=-zero_point * scale, max=end)
    return flat.view(in_memory.shape).permute([order.index(dim) for dim in range(tensor.ndim)])


def coarser(tensor: Tensor, highest: int) -> Tensor:
    """A quantized uint8 tensor whose ends are fixed, on highest + 1 levels between the same ends."""
    if not isinstance(tensor, Tensor) or tensor.dtype is not torch.quint8:
        return tensor
    levels = (HIGHEST + 1) // (highest + 1)
    return _quantized(_values(tensor), tensor.q_scale() * levels, tensor.q_zero_point() // levels, highest)


def _values(tensor: Tensor) -> Tensor:
    return (tensor.int_repr().float() - tensor.q_zero_point()) * tensor.q_scale()


def _quantized(values: Tensor, scale: float, zero_point: int, highest: int) -> Tensor:
    return clamped(torch.quantize_per_tensor(values, scale, zero_point, torch.quint8), highest)


def _with_number(function: Callable[..., Tensor], name: str, tensor: Tensor, number: float, highest: int) -> Tensor:
    """Sum or product of a quantized tensor and a number, on the narrowest grid that holds whatever the tensor can be.

    function, name: of torch's operator, which takes 0…255 for the tensor's codes when it chooses the output's grid.
    """
    if not isinstance(tensor, Tensor) or tensor.dtype is not torch.quint8:
        return function(tensor, number)
    relu, compute = name.endswith("relu"), operator.add if name.startswith("add") else operator.mul

    def computed(values: Any) -> Any:
        return compute(values, number)

    scale, zero_point = tensor.q_scale(), tensor.q_zero_point()
    ends = sorted(computed((code - zero_point) * scale) for code in (0, highest))
    low, high = 0.0 if relu else min(ends[0], 0.0), max(ends[1], 0.0)
    scale = max((high - low) / highest, torch.finfo(torch.float32).eps)
    values = computed(_values(tensor))
    return _quantized(values.relu() if relu else values, scale, round(-low / scale), highest)


# ------------------------------------------------------------------------------------------------ modules


class _Held:
    """Mixed into a class of torch's modules that give quantized tensors: those stay within 0…highest."""

    highest: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return clamped(super().forward(*args, **kwargs), self.highest)  # type: ignore[misc]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, highest={self.highest}".removeprefix(", ")  # type: ignore[misc]


class _Coarser(_Held):
    """The same of one whose 8-bit grid is fixed."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return coarser(super(_Held, self).forward(*args, **kwargs), self.highest)  # type: ignore[misc]


class _HeldFunctional(_Held):
    """The same of a QFunctional, which has a method for each operation. What most of them give goes through its
    `activation_post_process` (see `hold`)."""

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        return clamped(super().matmul(x, y), self.highest)  # type: ignore[misc]

    def add_scalar(self, x: Tensor, y: float) -> Tensor:
        return _with_number(super().add_scalar, "add", x, y, self.highest)  # type: ignore[misc]

    def mul_scalar(self, x: Tensor, y: float) -> Tensor:
        return _with_number(super().mul_scalar, "mul", x, y, self.highest)  # type: ignore[misc]


@cache
def _held_class(kind: Any, highest: int) -> Any:
    """A subclass, so that names, states and whatever asks by isinstance are the same, and torch's own ways to copy an
    INT8 layer, which leave hooks behind, keep it."""
    mixin = _HeldFunctional if issubclass(kind, nnq.QFunctional) else _Coarser if kind in _FIXED_MODULES else _Held
    made = {"highest": highest, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (mixin, kind), made)


def torch_class(module: nn.Module) -> type[nn.Module]:
    """The class that torch gave a module which may be held."""
    return type(module).__mro__[2] if isinstance(module, _Held) else type(module)


def is_held(module: nn.Module) -> bool:
    """Whether a module's `highest` is the largest code that it gives."""
    return isinstance(module, _Held)


def _gives_codes(module: nn.Module) -> bool:
    kind = type(module)
    if kind in _FIXED_MODULES:
        return True
    int8 = kind.__module__.startswith("torch.ao.nn.") and ".quantized" in kind.__module__
    return int8 and any(hasattr(module, name) for name in ("scale", "output_scale"))


# ------------------------------------------------------------------------------------------------ functions


@dataclass(frozen=True)
class HeldFunction:
    """What fx calls in place of a function that gives a quantized tensor, which then stays within 0…highest."""

    function: Callable[..., Tensor]
    highest: int

    @property
    def __name__(self) -> str:
        return self.function.__name__

    def __str__(self) -> str:
        return str(self.function)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.function in _FIXED_FUNCTIONS:
            return coarser(self.function(*args, **kwargs), self.highest)
        if self.__name__ in ("add", "add_relu", "mul", "mul_relu") and not isinstance(args[1], Tensor):
            return _with_number(self.function, self.__name__, args[0], args[1], self.highest)
        return clamped(self.function(*args, **kwargs), self.highest)


def torch_function(target: Any) -> Any:
    """What torch called at a node whose target may be held."""
    return target.function if isinstance(target, HeldFunction) else target


def _held_function(node: fx.Node) -> Callable[..., Tensor] | None:
    """The function that a node of a converted graph calls, if what it gives is to be held."""
    target: Any = node.target
    if node.op in ("call_function", "call_method") and target in _FIXED_FUNCTIONS:
        target = _FIXED_FUNCTIONS[target]
    elif node.op != "call_function" or not (target in _GIVE_CODES or str(target).startswith("quantized.")):
        return None
    function: Callable[..., Tensor] = target
    return function


# ------------------------------------------------------------------------------------------------ whole models


def hold(converted: nn.Module, highest: int) -> nn.Module:
    """The converted model, in place, with every activation within 0…highest; as it is where that is 255."""
    if highest >= HIGHEST:
        return converted
    for module in list(converted.modules()):
        if _gives_codes(module):
            kind: Any = type(module)
            module.__class__ = _held_class(kind, highest)
        if isinstance(module, nnq.QFunctional):
            module.activation_post_process = _held_class(nn.Identity, highest)()
    if isinstance(converted, fx.GraphModule):
        for node in converted.graph.nodes:
            if (function := _held_function(node)) is not None:
                node.op, node.target = "call_function", HeldFunction(function, highest)
        converted.recompile()
    return converted


def highest_code(converted: nn.Module) -> int:
    """The largest code that any activation of a converted model can have: 255, unless it is held."""
    found = [module.highest for module in converted.modules() if isinstance(module, _Held)]
    if isinstance(converted, fx.GraphModule):
        found += [node.target.highest for node in converted.graph.nodes if isinstance(node.target, HeldFunction)]
    return min(found, default=HIGHEST)
