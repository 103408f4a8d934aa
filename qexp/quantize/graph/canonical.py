"""The canonical form of a traced graph, which torch.ao can fuse: plain modules, nothing between convolution and norm.

FX folds and fuses by exact type. After a functional convolution, or a subclass that pads on its own, BatchNorm would
stay a layer of its own; and a convolution without its padding misses FBGEMM's fast depthwise kernel.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from qexp.quantize.graph.clamps import RELU, clamp_of
from qexp.quantize.graph.copies import evaluation_copy, number_padding
from qexp.quantize.graph.in_place import memory, shared_writers
from qexp.quantize.graph.tracing import standard_type, trace
from qexp.quantize.torch_backend.float_layers import norm_is_random
from qexp.quantize.torch_backend.stride_bugs import strides_are_ambiguous
from qexp.quantize.torch_backend.transposed_convolutions import fold

_NOTHING_IN_EVALUATION = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout)
_DROPOUTS = (F.dropout, F.dropout2d, F.alpha_dropout)
_QUANTIZABLE_PAIRS = (operator.add, operator.mul, torch.add, torch.mul)


def canonicalise(module: nn.Module, example: Tensor) -> fx.GraphModule:
    """Return an equivalent traced copy in canonical form. Raises tracing.UntraceableError.

    example: float32 [n, 3, H, W]; the graph holds for this H and W.
    """
    graph_module = trace(evaluation_copy(module, example), example)
    for step in (
        _write_nothing,
        _make_reshapes,
        _keep_dimensions,
        _make_float,
        _scale_before_adding,
        _free_norms,
        _free_head,
        _free_resizing,
        _make_plain,
        _drop_idle,
        _make_pads,
        _make_modules,
        _make_relus,
        _free_prelus,
        _unshare,
        _number_padding,
        _pad_before,
        _fold_transposed,
        _move_padding,
    ):
        step(graph_module)
        graph_module.graph.lint()
    # Removes weights that are now in modules, and sizes that only padding read.
    graph_module.graph.eliminate_dead_code(
        lambda node: node.op != "get_attr" and not (node.op == "call_method" and node.target == "size")
    )
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    return graph_module


def _nodes(graph_module: fx.GraphModule, operation: str) -> Iterator[fx.Node]:
    return iter([node for node in graph_module.graph.nodes if node.op == operation])


def _module(graph_module: fx.GraphModule, node: fx.Node) -> nn.Module:
    return graph_module.get_submodule(str(node.target))


def _write_nothing(graph_module: fx.GraphModule) -> None:
    """Stop modules from writing to tensors that others read too, since torch moves nodes."""
    for node in shared_writers(graph_module.graph):
        module: Any = _module(graph_module, node)
        module.inplace = False


def _make_reshapes(graph_module: fx.GraphModule) -> None:
    """Replace `view` by reshape, since INT8 layers return channels-last, and methods by the function.

    torch leaves a layer after the method reshape in FP32 if nothing before it is in INT8.
    """
    for node in _nodes(graph_module, "call_method"):
        if node.target == "view_as":
            node.target = "reshape_as"
        elif node.target in ("view", "reshape") and not isinstance(_argument(node, 1, "dtype"), torch.dtype):
            source, *sizes = node.args
            shape: Any = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else tuple(sizes)
            shape = node.kwargs.get("shape", node.kwargs.get("size", shape))
            node.op, node.target, node.args, node.kwargs = "call_function", torch.reshape, (source, shape), {}


def _keep_dimensions(graph_module: fx.GraphModule) -> None:
    """Let a mean of tensors with ambiguous strides (1x1 maps, one channel) keep dimensions, which a reshape then drops.

    Such tensors are contiguous and channels-last at once, and torch refuses their mean in INT8 otherwise.
    """
    for node in list(graph_module.graph.nodes):
        if node.target not in ("mean", torch.mean) or _argument(node, 2, "keepdim", False):
            continue
        sizes = [_size(source) for source in node.all_input_nodes[:1]] + [_size(node)]
        dims = _argument(node, 1, "dim")
        if dims is None or None in sizes or not strides_are_ambiguous(sizes[0] or ()) or not sizes[1]:
            continue
        node.args, node.kwargs = (node.args[0], dims, True), {}
        with graph_module.graph.inserting_after(node):
            shape = (-1, *sizes[1][1:])
            flat = graph_module.graph.call_function(torch.reshape, (node, shape))
        node.replace_all_uses_with(flat, delete_user_cb=lambda user, flat=flat: user is not flat)


def _make_float(graph_module: fx.GraphModule) -> None:
    """Convert other operands of float additions and products to float: torch would quantize positions and masks."""
    for node in _nodes(graph_module, "call_function"):
        if node.target not in _QUANTIZABLE_PAIRS or _dtype(graph_module, node) != torch.float32:
            continue
        for source in node.all_input_nodes:
            if _dtype(graph_module, source) not in (None, torch.float32):
                with graph_module.graph.inserting_before(node):
                    node.replace_input_with(source, graph_module.graph.call_method("float", (source,)))


def _scale_before_adding(graph_module: fx.GraphModule) -> None:
    """Replace `torch.add(x, y, alpha=3)` by `x + 3 * y`: torch's INT8 addition ignores the factor."""
    for node in list(graph_module.graph.nodes):
        alpha = node.kwargs.get("alpha")
        if alpha is None or node.target not in (torch.add, torch.sub, "add", "sub"):
            continue
        first, second = _argument(node, 0, "input"), _argument(node, 1, "other")
        with graph_module.graph.inserting_before(node):
            second = graph_module.graph.call_function(operator.mul, (second, alpha))
        name = str(getattr(node.target, "__name__", node.target))
        node.op, node.target, node.args, node.kwargs = "call_function", getattr(operator, name), (first, second), {}


def _free_norms(graph_module: fx.GraphModule) -> None:
    """Make an InstanceNorm of small maps the function that torch leaves in FP32 (see float_layers.py)."""
    for node in list(graph_module.graph.nodes):
        module = _module(graph_module, node) if node.op == "call_module" else None
        if not isinstance(module, _InstanceNorm) and node.target is not F.instance_norm:
            continue
        sizes = _size(node)
        if sizes is None or not norm_is_random(math.prod(sizes[2:])):
            continue
        source, names = _argument(node, 0, "input"), ("weight", "bias")
        weights = [_argument(node, position, name) for position, name in zip((3, 4), names, strict=True)]
        eps = _argument(node, 7, "eps", 1e-5)
        if isinstance(module, _InstanceNorm):
            eps = module.eps
            with graph_module.graph.inserting_before(node):
                weights = [
                    None if getattr(module, name) is None else graph_module.graph.get_attr(f"{node.target}.{name}")
                    for name in names
                ]
        node.op, node.target = "call_function", torch.instance_norm
        node.args, node.kwargs = (source, *weights, None, None, True, 0.1, eps, False), {}


_SOFTMAXES = (F.softmax, torch.softmax, "softmax")
_SIGMOIDS = (F.sigmoid, torch.sigmoid, "sigmoid")
_SAME_VALUES = (torch.flatten, torch.reshape, torch.squeeze, operator.getitem, "flatten", "squeeze", "contiguous")


def _free_head(graph_module: fx.GraphModule) -> None:
    """Make a softmax or sigmoid at the model's output a function that torch leaves in FP32.

    In INT8 it has a fixed scale of 1/256, which is coarse for flat probabilities.
    """
    node = next(iter(_nodes(graph_module, "output"))).args[0]
    while isinstance(node, fx.Node) and node.target in _SAME_VALUES:
        node = node.args[0]
    if not isinstance(node, fx.Node):
        return
    module = _module(graph_module, node) if node.op == "call_module" else None
    source = _argument(node, 0, "input")
    if isinstance(module, nn.Softmax) or node.target in _SOFTMAXES:
        dim = module.dim if isinstance(module, nn.Softmax) else _argument(node, 1, "dim")
        dim = 1 if dim is None else dim  # torch's default for logits
        node.op, node.target, node.args, node.kwargs = "call_function", torch.softmax, (source, dim), {}
    elif isinstance(module, nn.Sigmoid) or node.target in _SIGMOIDS:
        node.op, node.target, node.args, node.kwargs = "call_function", torch.special.expit, (source,), {}


def _free_resizing(graph_module: fx.GraphModule) -> None:
    """Make bicubic resizing the module, which torch leaves in FP32: the function has no INT8 kernel."""
    names = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")
    for node in _nodes(graph_module, "call_function"):
        given = {name: _argument(node, position, name) for position, name in enumerate(names, start=1)}
        constant = not any(isinstance(value, fx.Node) for value in (*node.args[1:], *node.kwargs.values()))
        plain = constant and not node.kwargs.get("antialias", False)
        if node.target is F.interpolate and given["mode"] == "bicubic" and plain:
            name, source = f"{node.name}_module", _argument(node, 0, "input")
            graph_module.add_submodule(name, nn.Upsample(**given))
            node.op, node.target, node.args, node.kwargs = "call_module", name, (source,), {}


def _dtype(graph_module: fx.GraphModule, node: fx.Node) -> torch.dtype | None:
    if node.op == "get_attr":
        return getattr(operator.attrgetter(str(node.target))(graph_module), "dtype", None)
    places = memory(node).places if "memory" in node.meta else ()
    return places[0].dtype if len(places) == 1 else None


def _size(node: fx.Node) -> tuple[int, ...] | None:
    """Return a tensor's shape for one image, as traced; None if the value is no single tensor."""
    places = memory(node).places if "memory" in node.meta else ()
    return places[0].size if len(places) == 1 else None


def _make_plain(graph_module: fx.GraphModule) -> None:
    """Replace subclasses that compute the same as torch.nn's layer by that layer."""
    done: dict[int, nn.Module] = {}
    for node in _nodes(graph_module, "call_module"):
        module = _module(graph_module, node)
        kind = standard_type(module)
        if kind is None or kind is type(module) or module._forward_pre_hooks or module._forward_hooks:
            continue
        if id(module) not in done:
            done[id(module)] = _as_plain(module, kind)
        graph_module.set_submodule(str(node.target), done[id(module)])


def _as_plain(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    plain = kind.__new__(kind)
    plain.__dict__.update(module.__dict__)
    plain._parameters, plain._modules = dict(module._parameters), {}
    return plain


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().clone(), requires_grad=False)


def _drop_idle(graph_module: fx.GraphModule) -> None:
    for node in list(graph_module.graph.nodes):
        idle = (
            isinstance(_module(graph_module, node), _NOTHING_IN_EVALUATION)
            if node.op == "call_module"
            else node.op == "call_function" and node.target in _DROPOUTS and not _argument(node, 2, "training", True)
        )
        if idle:
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph_module.graph.erase_node(node)


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _constant(graph_module: fx.GraphModule, value: Any) -> Any:
    """Return an argument's value: itself, or that of a node. Raises LookupError if it depends on the input."""
    if not isinstance(value, fx.Node):
        return value
    if value.op == "placeholder":
        raise LookupError(value.name)
    if value.op == "get_attr":
        return operator.attrgetter(str(value.target))(graph_module)
    if value.op == "call_module":
        function: Callable[..., Any] = _module(graph_module, value)
    elif value.op == "call_method":
        function = getattr(Tensor, str(value.target))
    else:
        function = value.target  # type: ignore[assignment]
    named = {key: _constant(graph_module, v) for key, v in value.kwargs.items()}
    return function(*_constants(graph_module, value.args), **named)


def _constants(graph_module: fx.GraphModule, values: Any) -> list[Any]:
    return [
        type(value)(_constants(graph_module, value))
        if isinstance(value, tuple | list)
        else _constant(graph_module, value)
        for value in values
    ]


def _make_pads(graph_module: fx.GraphModule) -> None:
    """Make modules that pad with zeros functions, so that a convolution that contains them can be replaced."""
    for node in _nodes(graph_module, "call_module"):
        module = _module(graph_module, node)
        if isinstance(module, nn.ZeroPad2d) or (isinstance(module, nn.ConstantPad2d) and module.value == 0):
            node.op, node.target, node.args, node.kwargs = "call_function", F.pad, (node.args[0], [*module.padding]), {}


def _make_modules(graph_module: fx.GraphModule) -> None:
    """Make functional (transposed) convolutions, linear layers and norms with constant weights modules."""
    makers: dict[Any, Callable[..., nn.Module | None]] = {
        F.conv1d: _conv_maker(nn.Conv1d),
        torch.conv1d: _conv_maker(nn.Conv1d),
        F.conv2d: _conv_maker(nn.Conv2d),
        torch.conv2d: _conv_maker(nn.Conv2d),
        F.conv_transpose1d: _transposed_maker(nn.ConvTranspose1d),
        F.conv_transpose2d: _transposed_maker(nn.ConvTranspose2d),
        F.linear: _linear,
        F.batch_norm: _batch_norm,
        F.instance_norm: _instance_norm,
    }
    for node in _nodes(graph_module, "call_function"):
        maker = makers.get(node.target)
        if maker is None:
            continue
        try:
            arguments = _constants(graph_module, node.args[1:])
            named = {key: _constant(graph_module, v) for key, v in node.kwargs.items() if key != "input"}
        except LookupError:
            continue
        source = _argument(node, 0, "input")
        module = maker(*arguments, ndim=node.meta.get("ndim", 4), **named)
        if module is None or not isinstance(source, fx.Node):
            continue
        name = _name_for(graph_module, node)
        graph_module.set_submodule(name, module.eval())
        with graph_module.graph.inserting_before(node):
            call = graph_module.graph.call_module(name, (source,))
        node.replace_all_uses_with(call)
        graph_module.graph.erase_node(node)


def _conv_maker(kind: type[nn.Conv1d] | type[nn.Conv2d]) -> Callable[..., nn.Module | None]:
    def make(
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        ndim: int = 4,
    ) -> nn.Module:
        channels_out, per_group, *size = weight.shape
        conv: nn.Module = kind(
            per_group * groups,
            channels_out,
            _numbers(size),
            stride=_numbers(stride),
            padding=padding if isinstance(padding, str) else _numbers(padding),
            dilation=_numbers(dilation),
            groups=groups,
            bias=bias is not None,
            device="meta",
        )
        return _filled(conv, weight, bias)

    return make


def _transposed_maker(kind: type[nn.ConvTranspose1d] | type[nn.ConvTranspose2d]) -> Callable[..., nn.Module | None]:
    def make(
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
        ndim: int = 4,
    ) -> nn.Module:
        channels_in, per_group, *size = weight.shape
        conv: nn.Module = kind(
            channels_in,
            per_group * groups,
            _numbers(size),
            stride=_numbers(stride),
            padding=_numbers(padding),
            output_padding=_numbers(output_padding),
            groups=groups,
            bias=bias is not None,
            dilation=_numbers(dilation),
            device="meta",
        )
        return _filled(conv, weight, bias)

    return make


def _numbers(value: Any) -> Any:
    """Return an int, or a tuple of ints: models also pass lists, and lists of one."""
    if isinstance(value, int):
        return value
    return tuple(int(v) for v in value) if len(value) > 1 else int(value[0])


def _filled(module: nn.Module, weight: Tensor | None, bias: Tensor | None) -> nn.Module:
    module.weight = None if weight is None else _frozen(weight)  # type: ignore[assignment]
    module.bias = None if bias is None else _frozen(bias)  # type: ignore[assignment]
    return module


def _linear(weight: Tensor, bias: Tensor | None = None, ndim: int = 2) -> nn.Module:
    return _filled(nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta"), weight, bias)


def _batch_norm(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    ndim: int = 4,
) -> nn.Module | None:
    if training or running_mean is None or running_var is None:
        return None
    kind = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(ndim, nn.BatchNorm1d)
    features = len(running_mean)
    module = kind(features, eps=eps)
    module.running_mean, module.running_var = running_mean.detach().clone(), running_var.detach().clone()
    # Folding needs both; a BatchNorm without them has a weight of 1 and a bias of 0.
    _filled(
        module,
        torch.ones(features) if weight is None else weight,
        torch.zeros(features) if bias is None else bias,
    )
    return module


def _instance_norm(
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    ndim: int = 4,
) -> nn.Module | None:
    """Return a BatchNorm if there are running statistics (see copies.py)."""
    return _batch_norm(running_mean, running_var, weight, bias, use_input_stats, momentum, eps, ndim)


def _name_for(graph_module: fx.GraphModule, node: fx.Node) -> str:
    """Return the user's name of the layer: that of the module that owns the weight, if this name is free."""
    weights = [str(n.target) for n in node.all_input_nodes[1:] if n.op == "get_attr"]
    owner, _, attribute = weights[0].rpartition(".") if weights else ("", "", "")
    name = owner if attribute in ("weight", "running_mean") and owner else f"{owner}.{node.name}".lstrip(".")
    used = {str(n.target) for n in graph_module.graph.nodes if n.op == "call_module"}
    if name in used or any(target.startswith(f"{name}.") for target in used) or hasattr(graph_module, node.name):
        name = f"{node.name}_module"
    return name


def _make_relus(graph_module: fx.GraphModule) -> None:
    """Replace every spelling of ReLU by the function that torch fuses with the layer before it."""
    modules = dict(graph_module.named_modules(remove_duplicate=False))
    for node in list(graph_module.graph.nodes):
        if node.op in ("call_function", "call_method") and clamp_of(node, modules) == RELU:
            node.op, node.target, node.args, node.kwargs = "call_function", F.relu, node.args[:1], {}


def _free_prelus(graph_module: fx.GraphModule) -> None:
    """Make PReLU modules functions, which stay in FP32.

    torch's INT8 module computes something else (logits off by more than the largest, on a net of two layers).
    """
    for node in _nodes(graph_module, "call_module"):
        if isinstance(_module(graph_module, node), nn.PReLU):
            with graph_module.graph.inserting_before(node):
                weight = graph_module.graph.get_attr(f"{node.target}.weight")
            node.op, node.target, node.args, node.kwargs = "call_function", F.prelu, (node.args[0], weight), {}


def _number_padding(graph_module: fx.GraphModule) -> None:
    """Move padding="same" that is not symmetric before the convolution (see copies.py for the rest)."""
    for node in _nodes(graph_module, "call_module"):
        module = _module(graph_module, node)
        if isinstance(module, _ConvNd) and isinstance(module.padding, str) and not number_padding(module):
            # Two for each dimension, the last first, as F.pad expects.
            pads = list(module._reversed_padding_repeated_twice)
            module.padding = (0,) * len(module.kernel_size)
            with graph_module.graph.inserting_before(node):
                padded = graph_module.graph.call_function(F.pad, (node.args[0], pads))
            node.args = (padded,)


def _pad_before(graph_module: fx.GraphModule) -> None:
    """Move circular and replicate padding out of convolutions, whose INT8 counterparts don't support it."""
    for node in _nodes(graph_module, "call_module"):
        conv = _module(graph_module, node)
        if isinstance(conv, _ConvNd) and conv.padding_mode in ("circular", "replicate"):
            pads = list(conv._reversed_padding_repeated_twice)
            with graph_module.graph.inserting_before(node):
                padded = graph_module.graph.call_function(F.pad, (node.args[0], pads, conv.padding_mode))
            node.args = (padded,)
            conv.padding, conv.padding_mode = (0,) * len(conv.kernel_size), "zeros"
            conv._reversed_padding_repeated_twice = [0] * len(pads)


def _unshare(graph_module: fx.GraphModule) -> None:
    """Copy a module for each of its calls, which have different neighbours to be fused with.

    ReLU, too: its other calls would otherwise find it inside the module that it was fused into. And every module with
    an INT8 counterpart: that has a single scale, which would serve all calls, whatever calibration found for each.
    """
    seen: set[int] = set()
    for node in _nodes(graph_module, "call_module"):
        module = _module(graph_module, node)
        if id(module) in seen:
            module = copy.deepcopy(module)
            name = f"{node.target}_{node.name}"
            graph_module.set_submodule(name, module)
            node.target = name
        seen.add(id(module))


def _fold_transposed(graph_module: fx.GraphModule) -> None:
    """Fold BatchNorms into the transposed convolutions before them: torch doesn't if a ReLU follows, or with groups."""
    for node in _nodes(graph_module, "call_module"):
        source, norm = node.args[0], _module(graph_module, node)
        if not isinstance(norm, _BatchNorm) or not isinstance(source, fx.Node) or source.op != "call_module":
            continue
        conv = _module(graph_module, source)
        if isinstance(conv, _ConvTransposeNd) and len(source.users) == 1 and norm.track_running_stats:
            fold(conv, norm)
            node.replace_all_uses_with(source)
            graph_module.graph.erase_node(node)


def _move_padding(graph_module: fx.GraphModule) -> None:
    """Move symmetric zero padding that only a convolution reads into that convolution."""
    for node in list(graph_module.graph.nodes):
        pads = _zero_padding(node)
        if pads is None:
            continue
        if any(pads) and not _absorbed(graph_module, node, pads):
            continue
        node.replace_all_uses_with(node.all_input_nodes[0])
        graph_module.graph.erase_node(node)


def _absorbed(graph_module: fx.GraphModule, node: fx.Node, pads: list[int]) -> bool:
    """Move padding into the convolution that alone reads it. Return False, without a change, if that isn't possible."""
    users = list(node.users)
    if len(users) != 1 or users[0].op != "call_module":
        return False
    conv = _module(graph_module, users[0])
    if not isinstance(conv, nn.Conv1d | nn.Conv2d) or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    dimensions = len(conv.kernel_size)
    before, after = pads[::2], pads[1::2]
    if before != after or min(before) < 0 or len(before) > dimensions:
        return False
    # F.pad begins with the last dimension.
    extra = [*before, *[0] * (dimensions - len(before))][::-1]
    padding: Any = tuple(old + new for old, new in zip(conv.padding, extra, strict=True))
    conv.padding = padding
    # The arguments of F.pad for other padding modes, kept consistent.
    conv._reversed_padding_repeated_twice = [p for p in reversed(padding) for _ in range(2)]
    return True


def _zero_padding(node: fx.Node) -> list[int] | None:
    """Return the pads of a padding with zeros, two for each dimension, the last first; None for other nodes."""
    if node.op != "call_function" or node.target is not F.pad:
        return None
    if _argument(node, 2, "mode", "constant") != "constant" or _argument(node, 3, "value", None):
        return None
    pads: Any = _argument(node, 1, "pad")
    return list(pads) if all(isinstance(p, int) for p in pads) else None
