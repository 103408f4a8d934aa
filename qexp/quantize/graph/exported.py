"""A float model as a graph of aten operators, exported by torch, in the form that PT2E quantizes.

The graph holds for any number of images, computes without side effects, and is plain: it takes the images and returns
the logits, and its tensors have the names that they keep (see `tensor_names`). What depends on parameters alone is
computed once, so that a weight that the model standardises in each call is a weight; BatchNorms are folded into
convolutions, paddings into the convolutions behind them, and shapes hold no arithmetic where one size is left open.
"""

from __future__ import annotations

import logging
import operator
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from qexp.errors import InputError, first_line
from qexp.quantize.graph.tensor_names import place, set_tensor

aten = torch.ops.aten

CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
}
TRANSPOSED = {one for one in CONVOLUTIONS if "transpose" in str(one)}
LAYERS = CONVOLUTIONS | {aten.linear.default}
CUSTOM, PLACE = "custom", "place"  # torch.export keeps what nodes have in their meta under the first
_NORMALISED = {aten._native_batch_norm_legit_no_training.default, aten.batch_norm.default}
# Operators that return their input's values, whatever their other arguments.
SAME = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.dropout.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
}
VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
_PADDED_BY_A_WORD = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}
_MOST_IMAGES = 1 << 16


def is_program(model: nn.Module) -> bool:
    """True for a graph of aten operators, with or without quantize and dequantize operators."""
    if not isinstance(model, fx.GraphModule):
        return False
    called = [node for node in model.graph.nodes if node.op == "call_function"]
    plain = all(isinstance(node.target, torch._ops.OpOverload) or _of_sizes(node) for node in called)
    return bool(called) and plain and not any(node.op == "call_module" for node in model.graph.nodes)


def _of_sizes(node: fx.Node) -> bool:
    return getattr(node.target, "__module__", "") == operator.__name__ or node.target is operator.getitem


def is_size(node: fx.Node) -> bool:
    """True for a node of an exported graph that computes a size, or a number made of sizes, and no tensor."""
    return isinstance(node.meta.get("val"), int | torch.SymInt)


def exported(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """Return the graph of a model in evaluation mode. example: float32 [n, 3, H, W].

    Raises InputError, with torch's reason, where the model can't be exported.
    """
    made = _by_torch(model, example)
    graph = made.graph
    _make_plain(graph)
    with torch.no_grad():
        _fold_constants(made)
        for node in list(graph.nodes):
            _number_padding(graph, node)
        for node in list(graph.nodes):
            _take_padding_in(node)
        for node in list(graph.nodes):
            _fold_batch_norm(made, node)
    graph.eliminate_dead_code()
    _name(graph)
    plain = fx.GraphModule(made, graph).eval()  # only with the parameters that are left
    return plain.requires_grad_(False)


def _by_torch(model: nn.Module, example: Tensor) -> fx.GraphModule:
    images = torch.cat([example[:1], example[:1]])  # one image would be taken for a batch size that is fixed
    sizes = ({0: Dim("batch", min=1, max=_MOST_IMAGES)},)
    refusal: Exception | None = None
    for strict in (False, True):  # the second is slower and takes less, but follows `len(images)`
        try:
            with torch.no_grad(), _quiet():
                program = torch.export.export(model, (images,), dynamic_shapes=sizes, strict=strict)
                return cast(fx.GraphModule, program.run_decompositions({}).module(check_guards=False))
        except Exception as error:  # torch raises many classes of errors on a model that it can't export
            refusal = refusal or error
    assert refusal is not None
    listed = [line.strip(" -") for line in str(refusal).splitlines() if line.lstrip().startswith("- ")]
    reason = (listed[0] if listed else first_line(refusal, 300)).partition(". ")[0].rstrip(".")
    raise InputError(f"torch.export can't take {type(model).__name__}: {reason}") from refusal


@contextmanager
def _quiet() -> Iterator[None]:
    """In this context nothing is shown of what torch.export reports, by whatever logger: a refusal is raised too."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(before)


def _make_plain(graph: fx.Graph) -> None:
    """Let the graph take and return tensors, and write its operators in one form each."""
    graph.set_codegen(fx.graph.CodeGen())
    for node in list(graph.nodes):
        if node.op == "output":
            (returned,) = node.args
            if isinstance(returned, list | tuple) and len(returned) == 1:
                node.args = (returned[0],)
        elif node.target in SAME or (node.target is aten._to_copy.default and _same_type(node)):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target in VIEWS:
            # A view would need strides that only torch's own format of tensors has.
            source, sizes = node.args
            known = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
            node.target, node.args = aten.reshape.default, (source, known if known.count(-1) <= 1 else sizes)
        elif node.target is aten.sym_size.int:
            # TorchScript traces the method, and takes the function's result for a constant.
            node.op, node.target = "call_method", "size"
        elif node.target is aten._native_batch_norm_legit_no_training.default:
            source, weight, bias, mean, variance, momentum, eps = node.args
            (first,) = [user for user in node.users if user.args[1] == 0] or [None]
            if first is not None:
                node.target = aten.batch_norm.default
                node.args = (source, weight, bias, mean, variance, False, momentum, eps, False)
                node.meta["val"] = first.meta["val"]
                first.replace_all_uses_with(node)
                graph.erase_node(first)
        elif node.op == "call_function" and "assert" in str(node.target):
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _same_type(node: fx.Node) -> bool:
    source = node.args[0]
    return isinstance(source, fx.Node) and node.meta["val"].dtype == source.meta["val"].dtype


# ------------------------------------------------------------------------------------------------ constants


def attribute(module: nn.Module, node: fx.Node) -> Any:
    """Return the value that a `get_attr` node reads."""
    return operator.attrgetter(str(node.target))(module)


def _constant(module: fx.GraphModule, before: fx.Node, value: Tensor, name: str, like: fx.Node) -> fx.Node:
    """Add a buffer, and return a node in front of another that reads it. like: has the meta of its tensor."""
    free = name = name.replace(".", "_") or "constant"
    number = 0
    while hasattr(module, free):
        number += 1
        free = f"{name}_{number}"
    module.register_buffer(free, value.detach().contiguous())
    with module.graph.inserting_before(before):
        node = module.graph.get_attr(free)
    if "val" in like.meta:
        with like.meta["val"].fake_mode:
            node.meta["val"] = torch.empty(value.shape, dtype=value.dtype)
    return node


def _fold_constants(module: fx.GraphModule) -> None:
    """Compute what depends on parameters and numbers alone, in place."""
    known: dict[fx.Node, Any] = {}
    for node in list(module.graph.nodes):
        if node.op == "get_attr":
            known[node] = attribute(module, node)
        elif node.op != "call_function" or not all(one in known for one in node.all_input_nodes):
            continue
        elif torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
    for node, value in known.items():
        read = node.op != "get_attr" and any(user not in known for user in node.users)
        if read and isinstance(value, Tensor):
            node.replace_all_uses_with(_constant(module, node, value, "constant", node))
    module.graph.eliminate_dead_code()


# ------------------------------------------------------------------------------------------------ paddings, BatchNorms


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call by the names of the operator's schema, defaults included."""
    schema = cast(Any, node.target)._schema.arguments
    given = {one.name: one.default_value for one in schema if one.has_default_value()}
    return {**given, **dict(zip((one.name for one in schema), node.args, strict=False)), **node.kwargs}


def _number_padding(graph: fx.Graph, node: fx.Node) -> None:
    """Write a convolution's padding that is a word as numbers, in place; as a padding of its own where its two ends
    differ."""
    if node.target not in _PADDED_BY_A_WORD:
        return
    given = arguments(node)
    source, kernel = given["input"], given["weight"].meta["val"].shape[2:]
    dilation = [int(one) for one in given["dilation"]] * (len(kernel) if len(given["dilation"]) == 1 else 1)
    whole = [by * (size - 1) if given["padding"] == "same" else 0 for by, size in zip(dilation, kernel, strict=True)]
    low = [one // 2 for one in whole]
    if any(one % 2 for one in whole):
        ends = [end for one in reversed(whole) for end in (one // 2, one - one // 2)]
        with graph.inserting_before(node):
            source = graph.call_function(aten.constant_pad_nd.default, (source, ends, 0.0))
        source.meta = dict(given["input"].meta)
        source.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
        low = [0] * len(whole)
    node.target = _PADDED_BY_A_WORD[node.target]
    shape = given["stride"], low, given["dilation"], given["groups"]
    node.args, node.kwargs = (source, given["weight"], given["bias"], *shape), {}


def _is_padding(node: fx.Node) -> bool:
    return node.target in (aten.constant_pad_nd.default, aten.pad.default)


def zeros_around(node: fx.Node) -> list[int] | None:
    """Return the numbers of zeros that a node adds to a tensor, as in `F.pad`; None if it does something else."""
    if not _is_padding(node):
        return None
    given = arguments(node)
    zeros = not given.get("value") and given.get("mode", "constant") == "constant"
    ends = list(given["pad"])
    return ends if zeros and all(isinstance(end, int) and end >= 0 for end in ends) else None


def _take_padding_in(node: fx.Node) -> None:
    """Let a convolution add the zeros that are added before it, in place, where it can: the same ones at both ends."""
    if node.target not in CONVOLUTIONS - TRANSPOSED:
        return
    given = arguments(node)
    ends = zeros_around(given["input"])
    dims = given["weight"].meta["val"].dim() - 2
    if ends is None or len(ends) > 2 * dims or ends[::2] != ends[1::2]:
        return
    more = [*ends[::2], *[0] * dims][:dims][::-1]
    padding = [int(one) for one in given["padding"]] * (dims if len(given["padding"]) == 1 else 1)
    shape = given["stride"], [a + b for a, b in zip(padding, more, strict=True)], given["dilation"], given["groups"]
    node.args, node.kwargs = (given["input"].args[0], given["weight"], given["bias"], *shape), {}


def _fold_batch_norm(module: fx.GraphModule, node: fx.Node) -> None:
    """Fold a BatchNorm into the layer before it, in place, if that has no other reader."""
    if node.target is not aten.batch_norm.default:
        return
    source, *affine = node.args[:5]
    assert isinstance(source, fx.Node)
    layer = source.target in LAYERS and len(source.users) == 1
    if source.target is aten.linear.default and source.meta["val"].dim() != 2:
        layer = False  # it normalises another dimension than the one that the layer computes
    given = arguments(source) if layer else {}
    parts = [given.get("weight"), given.get("bias"), *affine]
    if not layer or any(isinstance(one, fx.Node) and one.op != "get_attr" for one in parts) or None in affine[2:]:
        _hide_from_torchao(module.graph, node)
        return
    values: list[Any] = [None if one is None else attribute(module, cast(fx.Node, one)) for one in parts]
    weight, bias, gain, shift, mean, variance = values
    eps = cast(float, node.args[7])
    if source.target is aten.linear.default:
        made = fuse_linear_bn_weights(weight, bias, mean, variance, eps, gain, shift)
    else:
        made = fuse_conv_bn_weights(weight, bias, mean, variance, eps, gain, shift, source.target in TRANSPOSED)
    name = _path(source)[0]
    folded = [_constant(module, source, value, f"{name}.{part}", cast(fx.Node, given["weight"]))
              for part, value in zip(("weight", "bias"), made, strict=True)]  # fmt: skip
    source.args = (source.args[0], *folded, *source.args[3:])
    node.replace_all_uses_with(source)
    module.graph.erase_node(node)


def _hide_from_torchao(graph: fx.Graph, node: fx.Node) -> None:
    """Put an operator that does nothing before a BatchNorm that stays: torchao would fold it into a layer whose output
    others read, too."""
    with graph.inserting_before(node):
        same = graph.call_function(aten.alias.default, (node.args[0],))
    same.meta = dict(cast(fx.Node, node.args[0]).meta)
    node.replace_input_with(cast(fx.Node, node.args[0]), same)


# ------------------------------------------------------------------------------------------------ names


def operation(node: fx.Node) -> str:
    """Return the name of a node's operator, without its overload."""
    return str(node.target).removeprefix("aten.").partition(".")[0]


def _path(node: fx.Node) -> tuple[str, str]:
    """Return the name and the class of the module that calls an operator."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path, kind = stack[-1] if stack else ("", "")
    path = str(path).removeprefix("L['self']").removeprefix(".")  # as the strict export has it
    return path, (kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}")


def _name(graph: fx.Graph) -> None:
    """Name tensors and places, in place: a tensor by its module, or by its operation where a module has several."""
    taken: Counter[str] = Counter()
    of_layers = {_path(node)[0] for node in graph.nodes if node.target in LAYERS}
    for node in graph.nodes:
        if node.op not in ("placeholder", "call_function"):
            continue
        path, kind = _path(node)
        # A layer may do something else before, such as padding its input.
        alone = node.target in LAYERS or path not in of_layers
        named = path and alone and kind.startswith("torch.nn.modules.") and ".container." not in kind
        name = path if named else ".".join(filter(None, (path, operation(node))))
        name = name if node.op == "call_function" else node.name
        taken[name] += 1
        set_tensor(node, f"{name}_{taken[name] - 1}" if taken[name] > 1 else name)
        node.meta.setdefault(CUSTOM, {})[PLACE] = place(path, kind.rpartition(".")[2] or operation(node))
