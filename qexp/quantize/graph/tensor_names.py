"""Names of a model's tensors: those of the module or the operation that computes them.

In the eager flow modules keep their names. Nodes of graphs are renamed at every step, so there they are named once, and
names are carried from node to node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from qexp.models.class_names import derives_from
from qexp.quantize.graph.hooks import attached

OBSERVER = "activation_post_process"
"""The attribute under which torch keeps the observer of a module's output."""
PARTS = "parts_of_one_layer"
"""The attribute under which a wrapper around a layer has the names of its parts, which are the layer to the user."""
_WRAPPER = "torch.ao.quantization.stubs.QuantWrapper"
_TENSOR = "tensor"


def public(name: str, module: nn.Module) -> str:
    """Return a submodule's name in the user's model, without qexp's wrappers around models and layers."""
    owner, _, last = name.rpartition(".")
    if last in getattr(module.get_submodule(owner), PARTS, ()):
        name = owner
    if derives_from(module, _WRAPPER):
        return "" if name == "module" else name.removeprefix("module.")
    return name


def tensor_names(prepared: nn.Module) -> dict[str, str]:
    """Return the name of the observed tensor by the name of each observer."""
    if isinstance(prepared, fx.GraphModule):
        return {str(node.target): tensor_of(node) for node in prepared.graph.nodes if is_observer(node)}
    return {
        name: public(name.removesuffix(f".{OBSERVER}"), prepared)
        for name, _ in prepared.named_modules()
        if name.endswith(f".{OBSERVER}")
    }


# ------------------------------------------------------------------------------------------------ nodes of a graph


def tensor_of(node: fx.Node) -> str:
    """Return the name of a node's tensor; "" if its value has none (a size, a weight, the output)."""
    return str(node.meta.get(_TENSOR, ""))


def set_tensor(node: fx.Node, name: str) -> None:
    """Name a node's tensor."""
    node.meta[_TENSOR] = name


def name_tensors(fused: fx.GraphModule) -> None:
    """Name the tensors of a fused graph, in place.

    A name is the module's, or torch's name of the operation; later calls of a module are numbered like operations.
    """
    nodes = [node for node in fused.graph.nodes if node.op == "placeholder" or node.op.startswith("call_")]
    own = {node: str(node.target) if node.op == "call_module" else node.name for node in nodes}
    taken: set[str] = set()
    for node in nodes:
        name, number = own[node], 0
        while name in taken or (number and name in own.values()):
            number += 1
            name = f"{own[node]}_{number}"
        taken.add(name)
        node.meta[_TENSOR] = name


def called(node: fx.Node) -> str:
    """The name of the function or method that a node calls."""
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def is_observer(node: fx.Node) -> bool:
    """True if a node of a prepared graph calls the observer of a tensor."""
    return node.op == "call_module" and OBSERVER in str(node.target)


# ------------------------------------------------------------------------------------------------ sentences


def place(name: str, kind: str) -> str:
    """Return a place in a model, for messages: `module layer1.0 (BasicBlock)`."""
    return f"module {name} ({kind})" if name else f"own forward ({kind})"


@contextmanager
def running(
    module: nn.Module,
    before: Callable[[tuple[str, str], Any], None] | None = None,
    after: Callable[[tuple[str, str], Any], None] | None = None,
) -> Iterator[list[tuple[str, str]]]:
    """In this context, yield the list of modules that are running, the innermost last, each as name and class.

    `module` itself, always the first, has the name "". If a call raises, the list stays as it was then. before, after:
    called with a place and a module's inputs or its output; inputs are attributed to the module that calls it.
    """
    stack = [("", type(module).__name__)]

    def enter(name: str) -> Callable[..., None]:
        def hook(m: nn.Module, inputs: tuple[Any, ...]) -> None:
            if before is not None:
                before(stack[-1], inputs)
            stack.append((name, type(m).__name__))

        return hook

    def leave(m: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        where = stack.pop()
        if after is not None:
            after(where, output)

    called = [(public(name, module), m) for name, m in module.named_modules() if m is not module]
    with (
        attached(m.register_forward_pre_hook(enter(name), prepend=True) for name, m in called),
        attached(m.register_forward_hook(leave) for _, m in called),
    ):
        yield stack
