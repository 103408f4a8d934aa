"""The operators that a model executes, recorded with their values, so that a graph can be made of them.

The dispatcher sees modules, functions and methods alike, in whatever flow the model was made. It sees one batch size,
so a model is recorded with two: the numbers among an operator's arguments that differ were computed from the batch
size, and all others hold for any.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qexp.errors import RunError
from qexp.quantize.graph.tensor_names import place, running, tensor_of
from qexp.quantize.inspection.executed_operators import watched
from qexp.quantize.torch_backend.plain_clamps import plain_clamps

_BATCH_SIZES = (2, 3)


class UnsupportedError(RunError):
    """A model can't be written as a program of float operators with quantize and dequantize operators."""


@dataclass(frozen=True)
class OfBatch:
    """A number that was computed from the batch size n: images * n + others."""

    images: int
    others: int


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an operator. given: its arguments by their names, numbers that depend on the batch size as `OfBatch`;
    result: what it returned for the recorded images; name, kind: the module that called it and its class."""

    function: Any
    given: Mapping[str, Any]
    result: Any
    name: str
    kind: str

    @property
    def place(self) -> str:
        return place(self.name, self.kind)


@dataclass(frozen=True, eq=False)
class Recording:
    """The calls that a model executes for `images`, float32 [n, 3, H, W], up to its `output`."""

    images: Tensor
    calls: Sequence[Call]
    output: Tensor


def record(model: nn.Module, example: Tensor) -> Recording:
    """Run a model and return its calls of operators. example: float32 [n, 3, H, W]; for INT8, torch's engine must be
    set.

    Raises UnsupportedError where it executes other operators for other batch sizes.
    """
    first, second = (_run(model, example[:1].expand(size, -1, -1, -1).contiguous()) for size in _BATCH_SIZES)
    if [call.function for call in first.calls] != [call.function for call in second.calls]:
        other = next((a for a, b in zip(first.calls, second.calls, strict=False) if a.function != b.function), None)
        where = other.place if other else "model"
        raise UnsupportedError(f"{where} executes other operators for {_BATCH_SIZES[1]} images than for "
                               f"{_BATCH_SIZES[0]}, so no program holds for any number of them")  # fmt: skip
    calls = [
        Call(a.function, _merged(a.given, b.given, a.place), a.result, a.name, a.kind)
        for a, b in zip(first.calls, second.calls, strict=True)
    ]
    return Recording(first.images, calls, first.output)


def _run(model: nn.Module, images: Tensor) -> Recording:
    calls: list[Call] = []
    with torch.no_grad(), plain_clamps(), _attention_by_layers(), running(model) as here:

        def record(func: Any, given: Mapping[str, Any], result: object) -> None:
            calls.append(Call(func, given, result, *here[-1]))

        with watched(record):
            output = _Nodes(model, here).run(images) if isinstance(model, fx.GraphModule) else model(images)
    return Recording(images, calls, output)


@contextmanager
def _attention_by_layers() -> Iterator[None]:
    """In this context attention is computed by operators of its parts, for which there are counterparts elsewhere."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Nodes(fx.Interpreter):
    """Runs a graph, whose functions are places too, under the names of their tensors."""

    def __init__(self, graph_module: fx.GraphModule, here: list[tuple[str, str]]) -> None:
        super().__init__(graph_module)
        self._here = here

    def run_node(self, n: fx.Node) -> Any:
        self._here.append((tensor_of(n) or n.name, getattr(n.target, "__name__", str(n.target))))
        try:
            return super().run_node(n)
        finally:
            self._here.pop()


def _merged(a: Any, b: Any, where: str) -> Any:
    """The first of two calls' arguments, with `OfBatch` for a number that differs."""
    if isinstance(a, Mapping):
        return {name: _merged(a[name], b[name], where) for name in a}
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            raise UnsupportedError(f"{where} takes as many tensors or numbers as there are images")
        return [_merged(one, other, where) for one, other in zip(a, b, strict=True)]
    if isinstance(a, int) and not isinstance(a, bool) and a != b:
        small, large = _BATCH_SIZES
        images = (b - a) // (large - small)
        return OfBatch(images, a - images * small)
    if isinstance(a, float) and a != b:
        raise UnsupportedError(f"{where} computes {a:g} from the number of images")
    return a
