"""Symbolic tracing that knows shapes: qexp's way to a model's graph, in the eager flow and in fx.

The tracer stores each symbolic value's concrete value for one example. So channels, heights and widths are numbers to
the model, and padding computed from them (TensorFlow's "same") can be traced; dtype, device and other properties are
known, too. The batch size stays symbolic.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.multiprocessing.reductions import StorageWeakRef

from qexp.errors import first_line
from qexp.quantize.graph.in_place import IN_PLACE_OPERATORS, STATE, Memory, UnsafeWriteError, functionalise, places_of
from qexp.quantize.graph.tracing_patches import patched

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
"""Layers whose subclasses count as the layer itself if they don't override forward."""


_JOINS = (torch.cat, torch.concat, torch.concatenate, torch.stack)
_SQUEEZES = ("squeeze", "squeeze_", torch.squeeze)


class UntraceableError(Exception):
    """A model's Python can't be followed. `reason` says what the module does, as a predicate: "decides by …"."""

    def __init__(self, module: str, kind: str, reason: str):
        super().__init__(module, kind, reason)  # pickle constructs it again from these
        self.module, self.kind, self.reason = module, kind, reason

    def __str__(self) -> str:
        return f"{self.module} ({self.kind}) {self.reason}"


def standard_type(module: nn.Module) -> type[nn.Module] | None:
    """Return the layer of torch.nn that computes exactly the same: the module's class, or the base whose forward it
    inherits. None for all other modules."""
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


class _Sizes(tuple[Any, ...]):
    """A torch.Size whose first number may be symbolic."""

    def numel(self) -> Any:
        return math.prod(self)

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return _Sizes(found) if isinstance(index, slice) else found


class _ShapeProxy(fx.Proxy):
    """A symbolic value; `concrete` is its value for the example."""

    concrete: Any

    def __getattr__(self, k: str) -> Any:
        """Record methods and attributes that are tensors (`x.T`); return dtype, device and the like."""
        if k == "concrete" or (k.startswith("__") and k.endswith("__")):
            return super().__getattr__(k)
        value = getattr(self.concrete, k)
        if callable(value):
            return super().__getattr__(k)
        if isinstance(self.concrete, tuple):
            # `x.max(1).values` by its position: other interpreters of the graph turn named tuples into plain ones.
            return self[next(i for i, part in enumerate(self.concrete) if part is value)]
        return self.tracer.create_proxy("call_function", getattr, (self, k), {}) if isinstance(value, Tensor) else value

    @property
    def shape(self) -> Any:
        return self.size()

    @property
    def ndim(self) -> int:
        return int(self.concrete.ndim)

    def dim(self) -> int:
        return int(self.concrete.ndim)

    ndimension = dim

    def numel(self) -> Any:
        return math.prod(self.size())

    nelement = numel

    def size(self, dim: int | None = None) -> Any:
        sizes = tuple(self.concrete.shape)
        if _is_constant(self.node):
            return sizes if dim is None else sizes[dim]
        if dim is not None and dim % max(len(sizes), 1) != 0:
            return sizes[dim]
        batch = self.tracer.create_proxy("call_method", "size", (self, 0), {})
        return batch if dim is not None else _Sizes((batch, *sizes[1:]))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice) and isinstance(self.concrete, tuple | list):
            return tuple(self[i] for i in range(*index.indices(len(self.concrete))))
        return self.tracer.create_proxy("call_function", operator.getitem, (self, index), {})

    def __len__(self) -> int:
        return len(self.concrete) if isinstance(self.concrete, tuple | list) else super().__len__()

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def _in_place(function: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _operator in IN_PLACE_OPERATORS:
    # Python would take `x += y` for `x = x + y`, and other names of x would not see the change.
    setattr(_ShapeProxy, f"__{_operator.__name__}__", _in_place(_operator))


class _ShapeTracer(fx.Tracer):
    def __init__(self, example: Tensor):
        super().__init__()
        self._example = example
        self._computing = False
        self._storages: dict[int, StorageWeakRef] = {}
        self._stack: list[tuple[str, str]] = []
        self.failed_in: tuple[str, str] = ("", "")

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Trace the call `model(images)`, with defaults for other arguments.

        It includes the model's hooks, and a `forward` of the instance takes precedence over its class's.
        """
        names = [name for name in inspect.signature(inspect.unwrap(root_fn)).parameters if name != "self"]
        variadic = inspect.unwrap(root_fn).__code__.co_argcount < 2
        image = self.create_proxy("placeholder", "x" if variadic or not names else names[0], (), {})
        assert isinstance(self.root, nn.Module)
        return self.root._call_impl, [image]

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

    def create_arg(self, a: Any) -> Any:
        if type(a) is _ShapeProxy:
            return a.node  # torch would take the value itself for a constant tensor
        return super().create_arg(tuple(a) if type(a) is _Sizes else a)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        """Return the symbolic value of a new node; the value itself if it depends on neither tensor nor batch size."""
        if target in _JOINS and args and type(args[0]) is _ShapeProxy:
            args = (list(args[0]), *args[1:])  # torch.ao doesn't support a tuple of tensors
        squeezes = kind != "call_module" and target in _SQUEEZES  # a module may have that name, too
        if squeezes and len(args) == 1 and not kwargs and not _is_constant(args[0].node):
            # Without a dimension it would also drop that of the batch if there is one image.
            args = (*args, tuple(i for i, size in enumerate(args[0].concrete.shape) if i > 0 and size == 1))
        proxy: Any = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        sources = proxy.node.all_input_nodes
        proxy.node.meta["constant"] = kind != "placeholder" and all(_is_constant(source) for source in sources)
        given = _given(args, kwargs)
        before = [(tensor._version, tensor.shape, tensor.stride()) for tensor, _ in given]
        concrete = self._compute(kind, target, args, kwargs)
        if _is_fact(target, concrete):
            self.graph.erase_node(proxy.node)
            return concrete
        proxy.concrete = concrete
        written = [one for one, (version, _, _) in zip(given, before, strict=True) if one[0]._version != version]
        reshaped = [one for one, (_, *old) in zip(given, before, strict=True) if [one[0].shape, one[0].stride()] != old]
        module = self._stack[-1] if self._stack else ("", type(self.root).__name__)
        if any(node is None for _, node in written):
            raise UnsafeWriteError(module, STATE)
        proxy.node.meta["memory"] = Memory(
            places_of(concrete, self._storages),
            tuple(node for _, node in written if node is not None),
            tuple(node for _, node in reshaped if node is not None),
            module,
        )
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
        if isinstance(concrete, tuple | list) or (isinstance(concrete, Tensor) and _is_constant(obj.node)):
            return iter([operator.getitem(obj, i) for i in range(len(concrete))])
        return super().iter(obj)


def _is_constant(node: fx.Node) -> bool:
    """True if a node's value is the same for all images."""
    return node.op == "get_attr" or node.meta.get("constant", False)


def _concrete(value: Any) -> Any:
    return value.concrete if type(value) is _ShapeProxy else value


def _given(args: Any, kwargs: Any) -> list[tuple[Tensor, fx.Node | None]]:
    """Return the tensors among a call's arguments, each with its node; None for a tensor without one."""
    found: list[tuple[Tensor, fx.Node | None]] = []

    def look(value: Any) -> Any:
        if isinstance(value, fx.Proxy):
            of_proxy = value.node
            concrete = getattr(value, "concrete", None)
            found.extend((part, of_proxy) for part in _tensors(concrete))
        else:
            found.extend((part, None) for part in _tensors(value))
        return value

    fx.node.map_aggregate((args, kwargs), look)
    return found


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, tuple | list):
        return [tensor for part in value for tensor in _tensors(part)]
    return [value] if isinstance(value, Tensor) and not value.is_inference() else []


def _is_fact(target: Any, value: Any) -> bool:
    """True if an operator's result is a property of a tensor that depends neither on the batch size nor on values.

    That is its dtype or device, its kind (`is_floating_point`), the size of its elements.
    """
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if isinstance(value, bool):
        return name.startswith("is_") and name != "is_nonzero"
    return name in ("get_device", "element_size") or isinstance(
        value, str | torch.dtype | torch.device | torch.layout | torch.memory_format
    )


def _attribute(root: Any, target: str) -> Any:
    for name in target.split("."):
        root = getattr(root, name)
    return root


def trace(module: nn.Module, example: Tensor) -> fx.GraphModule:
    """Return the graph of `module` in evaluation mode, with the submodules of `module` themselves in it (no copies).

    In-place functions and methods are replaced by their out-of-place forms. Modules are unchanged, and readers of
    tensors that they write to read their output.

    example: float32 [n, 3, H, W]; the graph is valid for this H and W, and for any n. Raises UntraceableError, naming
    the innermost module whose Python can't be followed.
    """
    with torch.inference_mode(False), torch.no_grad():
        image = example[:1].clone()  # the model may write to it
        tracer = _ShapeTracer(image)
        try:
            with patched(_ShapeProxy):
                graph = tracer.trace(module)
            rewired = functionalise(graph)
        except UnsafeWriteError as error:
            raise UntraceableError(*error.module, error.reason) from error
        except (TraceError, TypeError, ValueError, RuntimeError, AttributeError, AssertionError, NameError) as error:
            name, kind = tracer.failed_in
            raise UntraceableError(name, kind or type(module).__name__, _explained(error)) from error
        traced = fx.GraphModule(tracer.root, graph, type(module).__name__)
        # Only unused batch sizes: a module may have an effect by its hooks.
        traced.graph.eliminate_dead_code(lambda node: not (node.op == "call_method" and node.target == "size"))
        traced.recompile()
        if rewired and not _same_outputs(module, traced, torch.cat([example[:1], -example[:1]])):
            raise UntraceableError("", type(module).__name__, "writes in place in a way that can't be followed")
    return traced


def _same_outputs(module: nn.Module, traced: nn.Module, images: Tensor) -> bool:
    expected, actual = module(images.clone()), traced(images.clone())
    return not isinstance(expected, Tensor) or torch.allclose(actual, expected, rtol=1e-3, atol=1e-5, equal_nan=True)


def _explained(error: Exception) -> str:
    """Return torch's reason in words for a model's author, if it is the usual one, else its first line."""
    reason = first_line(error)
    if "control flow" in reason:
        return "decides by the values of a tensor, or by the number of images"
    return f"does what can't be followed symbolically ({reason})"
