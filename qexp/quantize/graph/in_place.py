"""In-place operators of a traced graph replaced by out-of-place ones, with every later reader rewired.

In a graph each node is a value; in PyTorch `F.relu_(x)` changes x for every later reader, under any name and through
any view. torch.ao doesn't handle that, and its INT8 kernels mostly ignore `inplace`. The tracer computes each node for
an example, and so knows exactly which memory every tensor lies in (`Place`) and which operators wrote to it: no list of
operators is needed for either.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes


@dataclass(frozen=True)
class Place:
    """The memory that a tensor lies in; two tensors in the same place always have the same values.

    storage: a number that is unique while a weak reference to the storage is kept; offset, stride: in elements.
    """

    storage: int
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def elements(self) -> Tensor:
        """Return the elements' positions in the storage, in the tensor's order: int64 [number of elements]."""
        positions = torch.full((1,), self.offset, dtype=torch.int64)
        for size, stride in zip(self.size, self.stride, strict=True):
            positions = (positions.unsqueeze(-1) + torch.arange(size) * stride).flatten()
        return positions

    def overlaps(self, other: Place) -> bool:
        if self.storage != other.storage:
            return False
        return self == other or bool(torch.isin(self.elements(), other.elements()).any())


Places = tuple[Place, ...]


@dataclass(frozen=True)
class Memory:
    """The effects of a node on memory, observed by the tracer.

    places: of its value, one for a tensor, several for a tuple; written: arguments that it wrote to; reshaped:
    arguments whose shape it changed; module: name and class of the module that it belongs to.
    """

    places: Places
    written: tuple[fx.Node, ...]
    reshaped: tuple[fx.Node, ...]
    module: tuple[str, str]


class UnsafeWriteError(Exception):
    """An operator writes to memory in a way that a graph of values can't express."""

    def __init__(self, module: tuple[str, str], reason: str):
        super().__init__(module, reason)
        self.module, self.reason = module, reason


def places_of(value: Any, storages: dict[int, StorageWeakRef]) -> Places:
    """Return the places of a tensor, or of those in a tuple or list; `storages` keeps their numbers unique."""
    if isinstance(value, tuple | list):
        return tuple(place for part in value for place in places_of(part, storages))
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return ()
    reference = StorageWeakRef(value.untyped_storage())
    storages.setdefault(reference.cdata, reference)
    return (
        Place(reference.cdata, value.dtype, int(value.storage_offset()), tuple(value.shape), tuple(value.stride())),
    )


def memory(node: fx.Node) -> Memory:
    found: Memory = node.meta["memory"]
    return found


def functionalise(graph: fx.Graph) -> bool:
    """Rewrite a traced graph, in place, so that no function or method writes to its arguments.

    Every reader gets the same value as before. Modules keep their `inplace`, which only affects values that have no
    reader anymore. Returns True if any reader was rewired. Raises UnsafeWriteError if a part of a tensor is written
    that is read as a whole, or if a weight or buffer is written.
    """
    rewriting = _Rewriting(graph)
    for node in list(graph.nodes):
        rewriting.visit(node)
    rewriting.tidy()
    return rewriting.rewired


class _Rewriting:
    """The current value of every place while the nodes are visited in order.

    A value is a node, and the number of writes that it includes; `made_by` is the node that first produced a place,
    from which it can be computed again.
    """

    def __init__(self, graph: fx.Graph):
        self._graph = graph
        self._values: dict[Places, tuple[fx.Node, int]] = {}
        self._made_by: dict[Places, fx.Node] = {}
        self._seen_writes: dict[fx.Node, int] = {}
        self._writes: list[tuple[Place, fx.Node]] = []
        self._added: list[fx.Node] = []
        self.rewired = False

    def visit(self, node: fx.Node) -> None:
        self._read_current(node)
        found = memory(node) if "memory" in node.meta else Memory((), (), (), ("", ""))
        self._seen_writes[node] = len(self._writes)
        if found.reshaped:
            self._give_result_instead(node, found)
        elif found.written:
            self._write(node, found)
        elif found.places:
            self._made_by.setdefault(found.places, node)
            self._values[found.places] = (node, len(self._writes))
        if node.op == "call_function" and node.target in _IN_PLACE_OPERATORS:
            node.target = _IN_PLACE_OPERATORS[node.target]  # `n += 1` of a size writes nothing

    def tidy(self) -> None:
        """Remove the added nodes that have no readers."""
        for node in reversed(self._added):
            if not node.users:
                self._graph.erase_node(node)

    # ---- reading

    def _read_current(self, node: fx.Node) -> None:
        """Let `node` read the current values of its arguments' places."""
        for source in node.all_input_nodes:
            if "memory" not in source.meta or not self._changed(memory(source).places, self._seen_writes[source]):
                continue
            current = self._current(memory(source).places, node)
            if current is not source:
                node.replace_input_with(source, current)
                self.rewired = True

    def _changed(self, places: Places, since: int) -> list[tuple[Place, fx.Node]]:
        return [
            (written, writer)
            for written, writer in self._writes[since:]
            if any(place.overlaps(written) for place in places)
        ]

    def _current(self, places: Places, reader: fx.Node) -> fx.Node:
        """Return the node with the current value of these places; insert one before `reader` if there is none."""
        node, seen = self._values[places]
        changes = self._changed(places, seen)
        if not changes:
            return node
        maker = self._made_by[places]
        viewed = self._viewed(maker)
        if viewed is None:
            raise UnsafeWriteError(memory(changes[-1][1]).module, _PART)
        source = self._current(memory(viewed).places, reader)
        with self._graph.inserting_before(reader):
            again = self._graph.node_copy(maker, lambda n: source if n is viewed else n)
        again.meta = dict(maker.meta)
        return self._added_value(places, again)

    def _added_value(self, places: Places, node: fx.Node) -> fx.Node:
        """Register an added node as the current value of these places, and return it."""
        self._values[places] = (node, len(self._writes))
        self._seen_writes[node] = len(self._writes)
        self._added.append(node)
        return node

    @staticmethod
    def _viewed(maker: fx.Node) -> fx.Node | None:
        """Return the argument that `maker`'s result is a view of; None if it is no view."""
        storages = {place.storage for place in memory(maker).places}
        for source in maker.all_input_nodes:
            if "memory" in source.meta and storages & {place.storage for place in memory(source).places}:
                return source
        return None

    # ---- writing

    def _write(self, node: fx.Node, found: Memory) -> None:
        target = next((source for source in found.written if memory(source).places == found.places), None)
        if target is None or node.target in (operator.setitem, "__setitem__"):
            # The operator doesn't return the tensor that it writes to.
            self._writes.extend((place, node) for source in found.written for place in memory(source).places)
            raise UnsafeWriteError(found.module, _PART)
        if self._is_state(found.places):
            raise UnsafeWriteError(found.module, STATE)
        out_of_place(node, found)
        self._writes.extend((place, node) for place in found.places)
        self._values[found.places] = (node, len(self._writes))
        self._seen_writes[node] = len(self._writes)
        self._write_through(found.places, node)

    def _is_state(self, places: Places) -> bool:
        storages = {place.storage for place in places}
        return any(
            node.op == "get_attr" and storages & {place.storage for place in made}
            for made, node in self._made_by.items()
        )

    def _give_result_instead(self, node: fx.Node, found: Memory) -> None:
        """Let later readers of x read the result of, for example, `x.squeeze_()`, which changes no value."""
        out_of_place(node, found)
        self._made_by.setdefault(found.places, node)
        self._values[found.places] = (node, len(self._writes))
        for source in found.reshaped:
            for reader in list(source.users):
                if node < reader:
                    reader.replace_input_with(source, node)
                    self.rewired = True

    def _write_through(self, places: Places, written: fx.Node) -> None:
        """Update the tensors that these places are a view of, as far as the view can be inverted."""
        while (viewed := self._viewed(self._made_by[places])) is not None:
            whole = memory(viewed).places
            if len(whole) != 1 or len(places) != 1:
                return
            restore = _restored(places[0], whole[0])
            if restore is None:
                return
            method, arguments = restore
            with self._graph.inserting_after(written):
                written = self._graph.call_method(method, (written, *arguments))
            written.meta = {**viewed.meta}
            self._added_value(whole, written)
            places = whole


_PART = (
    "writes in place into a part or a view of a tensor that is read afterwards in another form; assign the result to a "
    "new tensor instead (torch.cat joins parts)"
)
STATE = "changes a weight, buffer or constant in place in evaluation, so that its output depends on earlier inputs"


def _restored(view: Place, whole: Place) -> tuple[str, tuple[Any, ...]] | None:
    """Return the method and its arguments that turn a view back into the whole tensor; None if there is none.

    The first dimension is assumed to be the batch.
    """
    if sorted(view.size) == sorted(whole.size) and view.offset == whole.offset:
        dimensions = list(zip(view.size, view.stride, strict=True))
        wanted = list(zip(whole.size, whole.stride, strict=True))
        if sorted(dimensions) == sorted(wanted) and len(set(wanted)) == len(wanted):
            return "permute", tuple(dimensions.index(one) for one in wanted)
    same = view.offset == whole.offset and math.prod(view.size) == math.prod(whole.size) and len(whole.size) > 0
    return ("reshape", (-1, *whole.size[1:])) if same and _in_order(view) and _in_order(whole) else None


def _in_order(place: Place) -> bool:
    """True if the elements are contiguous in memory, in the tensor's order."""
    expected = 1
    for size, stride in zip(reversed(place.size), reversed(place.stride), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


# ------------------------------------------------------------------------------------------------ out of place

_IN_PLACE_OPERATORS: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.imatmul: operator.matmul,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
    operator.ilshift: operator.lshift,
    operator.irshift: operator.rshift,
}
IN_PLACE_OPERATORS = tuple(_IN_PLACE_OPERATORS)
_FILLING: dict[str, Any] = {"zero_": torch.zeros_like, "fill_": torch.full_like}


def out_of_place(node: fx.Node, found: Memory) -> None:
    """Replace a node's operator by its out-of-place form; modules are left as they are.

    Raises UnsafeWriteError if torch has no such operator.
    """
    if node.op == "call_module":
        return
    name = str(getattr(node.target, "__name__", node.target))
    written: Any = node.args[0] if node.args else None
    if node.target in _IN_PLACE_OPERATORS:
        node.target = _IN_PLACE_OPERATORS[node.target]
    elif name.startswith("__i") and hasattr(operator, name.strip("_")):
        node.op, node.target = "call_function", _IN_PLACE_OPERATORS[getattr(operator, name.strip("_"))]
    elif "out" in node.kwargs:
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "out"}
    elif name in _FILLING:
        node.op, node.target = "call_function", _FILLING[name]
    elif name == "copy_" and _same_size(node.args[1], found):
        node.op, node.target, node.args, node.kwargs = "call_method", "clone", (node.args[1],), {}
    elif (counterpart := _counterpart_of(node, name)) is not None and isinstance(written, fx.Node):
        node.target = counterpart
    elif not _without_inplace(node):
        raise UnsafeWriteError(found.module, f"writes in place ({name}), for which torch has no other form")


def _same_size(value: Any, found: Memory) -> bool:
    places = memory(value).places if isinstance(value, fx.Node) else ()
    return [(p.size, p.dtype) for p in places] == [(p.size, p.dtype) for p in found.places]


def _counterpart_of(node: fx.Node, name: str) -> Any:
    """Return torch's operator of this name without the `_` at its end; None if there is none."""
    if not name.endswith("_") or name.endswith("__"):
        return None
    if node.op == "call_method":
        return name[:-1] if hasattr(Tensor, name[:-1]) else None
    return getattr(torch, name[:-1], None) or getattr(F, name[:-1], None)


def _without_inplace(node: fx.Node) -> bool:
    """Remove `inplace=True` from a function's arguments. Return False if it wasn't there."""
    if node.kwargs.get("inplace"):
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}
        return True
    try:
        names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    position = names.index("inplace") if "inplace" in names else len(node.args)
    if position >= len(node.args) or node.args[position] is not True:
        return False
    node.args = (*node.args[:position], False, *node.args[position + 1 :])
    return True


def shared_writers(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield calls of modules that write to a value which other nodes read, or which is a view."""
    for node in graph.nodes:
        if node.op == "call_module" and "memory" in node.meta and memory(node).written:
            written = [source for source in node.all_input_nodes if len(source.users) > 1 or not _owns(source)]
            if written:
                yield node


def _owns(node: fx.Node) -> bool:
    """True if no input of `node` shares memory with its value."""
    storages = {place.storage for place in memory(node).places}
    return not any(
        storages & {place.storage for place in memory(source).places}
        for source in node.all_input_nodes
        if "memory" in source.meta
    )


# ------------------------------------------------------------------------------------------------ flow=eager

_WRITES_BACK = "writes_back"
_WRITE_IN_INT8 = (nn.ReLU, nn.Hardtanh)  # ReLU6 is one of these


def mark_writers(module: nn.Module, image: Tensor) -> None:
    """Mark, in place, the layers that write to a tensor which the model reads by another name afterwards, and whose
    INT8 counterparts ignore `inplace`.

    image: float32 [1, 3, H, W]. A layer is marked if the model's output changes once it no longer works in place.
    """
    layers: list[Any] = [
        layer
        for layer in module.modules()
        if getattr(layer, "inplace", False) is True and not isinstance(layer, _WRITE_IN_INT8)
    ]
    with torch.inference_mode():

        def run(writing: list[Any]) -> Any:
            for layer in layers:
                layer.inplace = layer in writing
            return module(image.clone())

        if not layers or _same(expected := run(layers), run([])):
            found = []
        else:
            found = [layer for layer in layers if not _same(expected, run([one for one in layers if one is not layer]))]
    for layer in layers:
        layer.inplace = True
    for layer in found:
        layer.__dict__[_WRITES_BACK] = True


def _same(one: Any, other: Any) -> bool:
    return not isinstance(one, Tensor) or torch.equal(one, other)


def writes_back(layer: nn.Module) -> bool:
    """True if `mark_writers` marked this layer."""
    return bool(getattr(layer, _WRITES_BACK, False))


def write_back(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Write the output to the input's memory, with the output's grid, and return it: a forward hook."""
    if output is inputs[0]:
        return output
    with _disable_current_modes():  # hidden from modes that check functions on INT8 tensors
        return inputs[0].copy_(output)
