"""Names of tensors, carried from graph to graph of torch's fx flow, which renames nodes at every step."""

from __future__ import annotations

import torch
from torch import fx

from qexp.quantize.graph.clamps import RELU, clamp_of
from qexp.quantize.graph.tensor_names import is_observer, set_tensor, tensor_of
from qexp.quantize.torch_backend.ignored_quant_max import torch_function


def carry_to_prepared(fused: fx.GraphModule, prepared: fx.GraphModule) -> None:
    """Name the tensors of a prepared graph, in place, which is the fused one with observers."""
    before = {(node.op, node.name, str(node.target)): node for node in fused.graph.nodes}
    for node in prepared.graph.nodes:
        if is_observer(node):
            set_tensor(node, tensor_of(node.all_input_nodes[0]))
        elif node.op == "placeholder" or node.op.startswith("call_"):
            set_tensor(node, tensor_of(before[node.op, node.name, str(node.target)]))


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
            set_tensor(node, after_relu.get(origin, origin) if has_fused_relu(node) else origin)
        elif only_changes_grid(node):
            set_tensor(node, tensor_of(node.all_input_nodes[0]))


def only_changes_grid(node: fx.Node) -> bool:
    """True if a node of a converted graph only quantizes or dequantizes a tensor."""
    return torch_function(node.target) in (torch.quantize_per_tensor, "dequantize", "to")


def has_fused_relu(node: fx.Node) -> bool:
    """True if a node of a converted graph is an operation into which torch fused the ReLU behind it."""
    operation = str(node.target)
    return node.op == "call_function" and operation.endswith("_relu") and not operation.endswith("leaky_relu")
