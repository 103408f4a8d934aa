"""The operators that a converted model executes, with their arguments: models with the same ones take the same time.

Scales and zero points are left out, since kernels aren't chosen by them. Whether a zero point is 0 is included: kernels
then skip a sum (FBGEMM's ReQuantizeOutput and fbgemmConv have a variant for each case).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qexp.config.schema import Engine
from qexp.quantize.torch_backend.engines import engine

_PER_CHANNEL = (torch.per_channel_affine, torch.per_channel_symmetric, torch.per_channel_affine_float_qparams)
# Methods of torch's packed convolutions that return their settings.
_PACKED = ("stride", "padding", "output_padding", "dilation", "groups", "transpose")


def executed(converted: nn.Module, engine_name: Engine, images: Tensor) -> tuple[str, ...]:
    """Return the operators that `converted` executes for images, float32 [n, 3, H, W], in order, with their arguments.

    Tensors are described by dtype, shape and strides and, if quantized, by their scheme (per tensor or per channel) and
    whether their zero points are 0; packed weights also by stride, padding, dilation and groups. Numbers are included,
    but for scales and zero points of outputs and the bounds of a clamp of quantized tensors.
    """
    calls: list[str] = []

    def record(function: Any, given: Mapping[str, Any], result: object) -> None:
        ends = ("min", "max") if function is _CLAMP and given["self"].is_quantized else ()
        # These bounds depend on the tensor's scale (see torch_backend/ignored_quant_max.py).
        told = [(name, "end" if name in ends else _described(name, value)) for name, value in given.items()]
        calls.append(f"{function} {told}")

    with watched(record), engine(engine_name), torch.inference_mode():
        converted(images)
    return tuple(calls)


def beyond(converted: nn.Module, engine_name: Engine, images: Tensor, quant_max: int) -> str:
    """Return the first operator whose result has codes beyond `quant_max` and is read by another; "" if there is none.

    images: float32 [n, 3, H, W].
    """
    made: dict[int, tuple[Tensor, str]] = {}  # keeps tensors alive, so that no id is used twice
    found: list[str] = []

    def look(function: Any, given: Mapping[str, Any], result: object) -> None:
        results = list(_leaves([result]))
        if results and function not in (_CLAMP, torch.ops.aten.int_repr.default):
            found.extend(made[id(value)][1] for value in _leaves(given.values()) if id(value) in made)
        for value in results:
            if value.dtype is torch.quint8 and int(torch.int_repr(value).max()) > quant_max:
                made[id(value)] = value, str(function).split(".")[1]

    with watched(look), engine(engine_name), torch.inference_mode():
        converted(images)
    return found[0] if found else ""


def _leaves(values: Iterable[object]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _leaves(value)


_CLAMP = torch.ops.aten.clamp.default


class DispatchMode(TorchDispatchMode):
    """torch's, without its compiler: torch would wrap `__torch_dispatch__` for that, whose import takes two seconds."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


@contextmanager
def watched(see: Callable[[Any, Mapping[str, Any], object], None]) -> Iterator[None]:
    """In this context, pass each call of torch's operators to `see`: the operator, arguments by name, and the result.

    The dispatcher sees functions, methods and modules alike, in the eager flow as in fx.
    """

    class Watcher(DispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            names = [argument.name for argument in func._schema.arguments]
            given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            result = func(*args, **(kwargs or {}))
            see(func, given, result)
            return result

    with Watcher():
        yield


def _described(name: str, value: Any) -> object:
    """Describe one argument of an operator by plain values."""
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, torch.ScriptObject):
        settings = [str(getattr(value, method)()) for method in _PACKED if hasattr(value, method)]
        return [_described(name, part) for part in value.unpack()] + settings  # type: ignore[attr-defined]
    if isinstance(value, list | tuple):
        return [_described(name, item) for item in value]
    if "zero_point" in name:
        return value == 0
    return "scale" if "scale" in name and isinstance(value, float) else str(value)


def _tensor(value: Tensor) -> list[object]:
    plain: list[object] = [str(value.dtype), list(value.shape), list(value.stride())]
    if not value.is_quantized:
        return plain
    if value.qscheme() in _PER_CHANNEL:
        zero, axis = not bool(value.q_per_channel_zero_points().any()), value.q_per_channel_axis()
        return [*plain, str(value.qscheme()), axis, zero]
    return [*plain, str(value.qscheme()), value.q_zero_point() == 0]
