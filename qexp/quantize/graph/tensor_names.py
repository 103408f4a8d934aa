"""Names of a model's tensors: those of the module or the operation that computes them.

In the eager flow modules keep their names. torch's fx flow renames a graph's nodes at every step, so there the fused
graph's nodes are named once, and names are carried from node to node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.ao.quantization import QuantWrapper

from qexp.quantize.graph.clamps import RELU, clamp_of
from qexp.quantize.graph.hooks import attached
from qexp.quantize.torch_backend.float_layers import InFloat
from qexp.quantize.torch_backend.ignored_quant_max import torch_function
from qexp.quantize.torch_backend.stride_bugs import AfterStride

OBSERVER = "activation_post_process"
"""The attribute under which torch keeps the observer of a module's output."""
_TENSOR = "tensor"


def public(name: str, module: nn.Module) -> str:
    """Return a submodule's name in the user's model, without qexp's wrappers around models and layers."""
    owner, _, last = name.rpartition(".")
    if last in ("conv", "layer", "quant") and isinstance(module.get_submodule(owner), AfterStride | InFloat):
        name = owner
    if isinstance(module, QuantWrapper):
        return "" if name == "module" else name.removeprefix("module.")
    return name


def tensor_names(prepared: nn.Module) -> dict[str, str]:
    """Return the name of the observed tensor by the name of each observer."""
    if isinstance(prepared, fx.GraphModule):
        return {str(node.target): tensor_of(node) for node in prepared.graph.nodes if _is_observer(node)}
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


def carry_to_prepared(fused: fx.GraphModule, prepared: fx.GraphModule) -> None:
    """Name the tensors of a prepared graph, in place, which is the fused one with observers."""
    before = {(node.op, node.name, str(node.target)): node for node in fused.graph.nodes}
    for node in prepared.graph.nodes:
        if _is_observer(node):
            node.meta[_TENSOR] = tensor_of(node.all_input_nodes[0])
        elif node.op == "placeholder" or node.op.startswith("call_"):
            node.meta[_TENSOR] = tensor_of(before[node.op, node.name, str(node.target)])


def note_origins(prepared: fx.GraphModule) -> None:
    """Write each name, in place, to `stack_trace`: convert_fx copies only this from a node to its replacements.

    qexp's tracing leaves it empty.
    """
    for node in prepared.graph.nodes:
        node.stack_trace = tensor_of(node) or None


def carry_to_converted(prepared: fx.GraphModule, converted: fx.GraphModule) -> None:
    """Name the tensors of a graph, in place, that was converted from a prepared one after `note_origins`."""
    after_relu, modules = {}, dict(prepared.named_modules(remove_duplicate=False))
    for node in prepared.graph.nodes:
        users = list(node.users)
        if len(users) == 1 and clamp_of(users[0], modules) == RELU:
            after_relu[tensor_of(node)] = tensor_of(users[0])
    for node in converted.graph.nodes:
        origin, node.stack_trace = node.stack_trace, None
        if origin is not None:
            # If torch fused a ReLU into an operation, the output is the ReLU's.
            node.meta[_TENSOR] = after_relu.get(origin, origin) if has_fused_relu(node) else origin
        elif only_changes_grid(node):
            node.meta[_TENSOR] = tensor_of(node.all_input_nodes[0])


def only_changes_grid(node: fx.Node) -> bool:
    """True if a node of a converted graph only quantizes or dequantizes a tensor."""
    return torch_function(node.target) in (torch.quantize_per_tensor, "dequantize", "to")


def called(node: fx.Node) -> str:
    """The name of the function or method that a node calls."""
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def has_fused_relu(node: fx.Node) -> bool:
    """True if a node of a converted graph is an operation into which torch fused the ReLU behind it."""
    operation = str(node.target)
    return node.op == "call_function" and operation.endswith("_relu") and not operation.endswith("leaky_relu")


def _is_observer(node: fx.Node) -> bool:
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
