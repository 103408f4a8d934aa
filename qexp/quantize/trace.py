"""Symbolic tracing that knows shapes: how qexp sees a model's graph, in the eager flow as in fx.

Beside each symbolic value the tracer keeps what it is for one example. Channels, heights and widths are numbers to the
model then, so that padding computed from them (TensorFlow's "same") can be traced; the batch size stays symbolic.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.nn.modules.batchnorm import _BatchNorm

_LEAVES = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose2d,
    nn.Linear,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.ReLU,
    nn.ReLU6,
    nn.Hardtanh,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Sigmoid,
    nn.Identity,
    nn.Dropout,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Flatten,
)
"""Layers whose subclasses count as the layer itself as long as they compute the same."""


class UntraceableError(Exception):
    """The model's Python needs values that only a run has."""

    def __init__(self, module: str, kind: str, reason: str):
        super().__init__(module, kind, reason)  # as given, for pickle makes it again from these
        self.module, self.kind, self.reason = module, kind, reason

    def __str__(self) -> str:
        return f"{self.module} ({self.kind}): {self.reason}"


def standard_type(module: nn.Module) -> type[nn.Module] | None:
    """The layer of torch.nn that this module computes exactly: its own class, or that of a subclass whose forward is
    unchanged. None for everything else."""
    cls = type(module)
    if cls.__module__.startswith(("torch.nn.", "torch.ao.nn.")) and not isinstance(module, nn.Sequential):
        return cls
    if "forward" in module.__dict__:
        return None
    for base in _LEAVES:
        if isinstance(module, base) and all(
            getattr(cls, method) is getattr(base, method)
            for method in ("forward", "_conv_forward", "__call__")
            if hasattr(base, method)
        ):
            return base
    return None


class _ShapeProxy(fx.Proxy):
    """A symbolic value that knows, in `concrete`, what it is for the example."""

    concrete: Any

    @property
    def shape(self) -> Any:
        return self.size()

    @property
    def ndim(self) -> int:
        return int(self.concrete.ndim)

    def dim(self) -> int:
        return int(self.concrete.ndim)

    def size(self, dim: int | None = None) -> Any:
        sizes = tuple(self.concrete.shape)
        if self.node.op == "get_attr":
            return sizes if dim is None else sizes[dim]
        if dim is not None and dim % max(len(sizes), 1) != 0:
            return sizes[dim]
        batch = self.tracer.create_proxy("call_method", "size", (self, 0), {})
        return batch if dim is not None else (batch, *sizes[1:])


class _ShapeTracer(fx.Tracer):
    def __init__(self, example: Tensor):
        super().__init__()
        self._example = example
        self._computing = False
        self._stack: list[tuple[str, str]] = []
        self.failed_in: tuple[str, str] = ("", "")

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return standard_type(m) is not None

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._computing:
            return forward(*args, **kwargs)
        self._stack.append((self.path_of_module(m), type(m).__name__))
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed_in = self.failed_in if self.failed_in[1] else self._stack[-1]
            raise
        finally:
            self._stack.pop()

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._computing else super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _ShapeProxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Proxy:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        concrete = self._compute(kind, target, args, kwargs)
        proxy.concrete = concrete  # type: ignore[attr-defined]
        if isinstance(concrete, Tensor):
            proxy.node.meta["ndim"] = concrete.ndim
        return proxy

    def _compute(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "placeholder":
            return self._example
        if kind == "output":
            return None
        values = fx.node.map_aggregate(args, _concrete)
        named = fx.node.map_aggregate(kwargs, _concrete)
        self._computing = True
        try:
            with torch.no_grad():
                if kind == "call_function":
                    return target(*values, **named)
                if kind == "call_method":
                    return getattr(values[0], target)(*values[1:], **named)
                attribute = _attribute(self.root, target)
                return attribute(*values, **named) if kind == "call_module" else attribute
        finally:
            self._computing = False

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        concrete = getattr(obj, "concrete", None)
        if isinstance(concrete, tuple | list):
            return iter([operator.getitem(obj, i) for i in range(len(concrete))])
        return super().iter(obj)


def _concrete(value: Any) -> Any:
    return value.concrete if isinstance(value, _ShapeProxy) else value


def _attribute(root: Any, target: str) -> Any:
    for name in target.split("."):
        root = getattr(root, name)
    return root


def trace(module: nn.Module, example: Tensor) -> fx.GraphModule:
    """The graph of `module` in evaluation mode, with the very submodules of `module` in it (no copies).

    example: float32 [n, 3, H, W]; the graph holds for this H and W, and for any n.
    Raises UntraceableError, which names the innermost module whose Python can't be followed.
    """
    tracer = _ShapeTracer(example[:1])
    # It asks for the number of dimensions with an `if`, which only subclasses that call BatchNorm's forward run into.
    check = _BatchNorm._check_input_dim
    _BatchNorm._check_input_dim = lambda self, input: None  # type: ignore[method-assign]
    try:
        graph = tracer.trace(module)
    except (TraceError, TypeError, ValueError, RuntimeError, AttributeError, AssertionError, NameError) as error:
        name, kind = tracer.failed_in
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UntraceableError(name, kind or type(module).__name__, reason) from error
    finally:
        _BatchNorm._check_input_dim = check  # type: ignore[method-assign]
    traced = fx.GraphModule(tracer.root, graph, type(module).__name__)
    # Only the batch sizes that nobody used: to fx every method is free of side effects, `x.add_(y)` too.
    traced.graph.eliminate_dead_code(lambda node: not (node.op == "call_method" and node.target == "size"))
    traced.recompile()
    return traced
