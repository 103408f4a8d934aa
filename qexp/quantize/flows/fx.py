"""torch's FX flow: any model that can be traced, without stubs or changes.

https://docs.pytorch.org/docs/stable/quantization.html#prototype-fx-graph-mode-quantization
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.fx.config
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.nn.quantized.modules.utils import WeightedQuantizedModule
from torch.ao.quantization import QConfig as TorchQConfig
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.fx.tracer import QuantizationTracer
from torch.ao.quantization.observer import default_placeholder_observer
from torch.ao.quantization.qconfig_mapping import QConfigMapping
from torch.ao.quantization.quantize_fx import convert_fx, fuse_fx, prepare_fx

from qexp.config import schema
from qexp.config.schema import Engine, Granularity, Observer, QConfig
from qexp.errors import InputError
from qexp.quantize.calibration.grid import executed_quant_max
from qexp.quantize.calibration.observers import ClampFirst, observers, quant_max_of_observers
from qexp.quantize.flow import Flow, Prepared, QuantizationSpec, QuantizedModel
from qexp.quantize.graph.canonical import canonicalise
from qexp.quantize.graph.clamps import EVERYTHING, ValueRange, clamp_after, clamp_of
from qexp.quantize.graph.copies import sharing_copy
from qexp.quantize.graph.tensor_names import name_tensors, place
from qexp.quantize.graph.tracing import UntraceableError
from qexp.quantize.torch_backend.deprecations import known_deprecations_silenced
from qexp.quantize.torch_backend.engines import engine
from qexp.quantize.torch_backend.float_layers import why_float
from qexp.quantize.torch_backend.graph_names import carry_to_converted, carry_to_prepared, note_origins
from qexp.quantize.torch_backend.layers import is_per_channel
from qexp.quantize.torch_backend.observers import (
    RecordingObserver,
    activation_observer,
    fix_fewer_levels,
    torch_qconfig,
)
from qexp.quantize.torch_backend.workarounds import worked_around

_TRANSPOSED = (
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
)
_COMPUTED_WEIGHTS = (F.conv1d, F.conv2d)
"""Functions whose weights the model computes (the others have become modules); INT8 kernels need packed weights."""
_LAYER_NORMS = (nn.LayerNorm, F.layer_norm)
_KEEP_VALUES = (nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.AdaptiveMaxPool2d)
_KEEP_VALUES_FUNCTIONS = {
    torch.flatten,
    torch.mean,
    torch.squeeze,
    torch.unsqueeze,
    torch.transpose,
    torch.permute,
    F.adaptive_avg_pool2d,
    F.max_pool2d,
    "contiguous",
    "flatten",
    "mean",
    "permute",
    "reshape",
    "squeeze",
    "transpose",
    "unsqueeze",
    "view",
}
_JOIN_VALUES = {torch.cat, torch.stack, torch.concat}


class FxFlow(Flow):
    """torch's FX graph mode quantization."""

    name = schema.FlowName.fx
    traced = True
    observes_functions = True
    folds_batchnorm = True

    def fuse(self, model: nn.Module, spec: QuantizationSpec, example: Tensor) -> nn.Module:
        """Return a traced copy with BatchNorms folded into convolutions. Raises InputError if it can't be traced."""
        try:
            graph_module = canonicalise(model, example)
        except UntraceableError as error:
            what = f"{place(error.module, error.kind)} {error.reason}"
            raise InputError(f"flow={self.name} can't trace {type(model).__name__}: its {what}") from error
        return _named(fuse_fx(graph_module))

    def prepare(self, fused: nn.Module, spec: QuantizationSpec, example: Tensor) -> Prepared:
        """Return a copy with an observer at every tensor that torch can quantize."""
        mapping = _mapping(spec.qconfig, spec.observer)
        for name, module in fused.named_modules():
            if why_float(module, spec.engine):
                mapping.set_module_name(name, None)
        with engine(spec.engine), known_deprecations_silenced(), _without_origins():
            prepared = prepare_fx(sharing_copy(fused).eval(), mapping, (example[:1],))
        carry_to_prepared(cast(fx.GraphModule, fused), prepared)
        _drop_idle_observers(prepared, example[:1])
        _part_from_scaled(prepared)
        if spec.qconfig.range_after_clamp:
            _clamp_first(prepared)
        fix_fewer_levels(prepared, executed_quant_max(spec.qconfig))
        return Prepared(self, spec, fused, prepared)

    def convert(self, prepared: Prepared) -> QuantizedModel:
        """Return a copy in which observed modules and functions are replaced by their INT8 counterparts."""
        observed, name = cast(fx.GraphModule, prepared.module), prepared.spec.engine
        copied = cast(fx.GraphModule, sharing_copy(observed))
        note_origins(copied)
        with engine(name):
            with known_deprecations_silenced():
                converted = convert_fx(copied)
            carry_to_converted(observed, converted)
            _clamp_weights(converted, observed)
            return QuantizedModel(prepared, worked_around(converted, quant_max_of_observers(observed), name))


def _named(fused: fx.GraphModule) -> fx.GraphModule:
    """Return the graph with named tensors, traced as prepare_fx will trace it, so that nodes have the same names."""
    with _without_origins():
        named = fx.GraphModule(fused, QuantizationTracer([], []).trace(fused))
    name_tensors(named)
    return named


class _Unobserved(fx.Interpreter):
    """Runs a prepared graph without its observers; `idle` lists the calls of those that would see no float tensor."""

    def __init__(self, prepared: fx.GraphModule) -> None:
        super().__init__(prepared)
        self._observers, self.idle = observers(prepared), list[fx.Node]()

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_module" or n.target not in self._observers:
            return super().run_node(n)
        (value,), _ = self.fetch_args_kwargs_from_env(n)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            self.idle.append(n)
        return value


def _drop_idle_observers(prepared: fx.GraphModule, example: Tensor) -> None:
    """Remove, in place, observers of indices, masks and complex numbers, which can't be quantized.

    torch inserts them wherever it knows the operation.
    """
    run = _Unobserved(prepared)
    with torch.inference_mode():
        run.run(example)
    for node in run.idle:
        node.replace_all_uses_with(node.all_input_nodes[0])
        prepared.graph.erase_node(node)
        prepared.delete_submodule(str(node.target))
    if run.idle:
        prepared.recompile()


def _part_from_scaled(prepared: fx.GraphModule) -> None:
    """Give tensors that result from adding or multiplying by a number observers of their own, in place.

    torch lets them share the observer of the other operand, whose grid must then cover both: beside `100 * x`, two
    steps are left for `x`. INT8 kernels fold the number into the scale and need no range for their output.
    """
    modules, watching = dict(prepared.named_modules(remove_duplicate=False)), observers(prepared)
    parted: dict[fx.Node, tuple[nn.Module, nn.Module]] = {}  # by an observer's call: the old observer and the new one
    for node in prepared.graph.nodes:
        made = node.all_input_nodes[0] if node.op == "call_module" and node.target in watching else None
        if made is None or len(made.all_input_nodes) != 1:
            continue
        observer, source = prepared.get_submodule(node.target), made.all_input_nodes[0]
        if clamp_of(made, modules) is not None and _is_by_a_number(source):
            made, source = source, source.all_input_nodes[0]  # one INT8 kernel for both
        if _is_by_a_number(made) and watching.get(str(source.target)) is observer:
            parted[node] = (
                observer,
                observer.another() if isinstance(observer, RecordingObserver) else copy.deepcopy(observer),
            )
        elif source in parted and parted[source][0] is observer:
            parted[node] = parted[source]
    for node, (_, own) in parted.items():
        prepared.set_submodule(str(node.target), own)


def _is_by_a_number(node: fx.Node) -> bool:
    return node.target in (operator.add, operator.mul, torch.add, torch.mul) and len(node.all_input_nodes) == 1


@contextmanager
def _without_origins() -> Iterator[None]:
    """Keep torch's tracer from recording each node's place in the code, for which it would import torch's compiler: a
    second in every process."""
    before = torch.fx.config.do_not_emit_stack_traces
    torch.fx.config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        torch.fx.config.do_not_emit_stack_traces = before


def _mapping(qconfig: QConfig, observer: Observer) -> QConfigMapping:
    """Return torch's default mapping (with fixed parameters for sigmoid and the like) with this qconfig in it."""
    # x86's for every engine: all differences between them are replaced here, and onednn's raises a warning.
    mapping = get_default_qconfig_mapping(Engine.x86.value).set_global(torch_qconfig(qconfig, observer))
    for kind in _TRANSPOSED:
        # torch has no per-channel weights for these.
        mapping.set_object_type(kind, torch_qconfig(qconfig, observer, Granularity.per_tensor))
    for function in _COMPUTED_WEIGHTS:
        mapping.set_object_type(function, None)
    for norm in _LAYER_NORMS:
        unweighted = TorchQConfig(activation_observer(qconfig, observer), default_placeholder_observer)
        mapping.set_object_type(norm, unweighted)
    return mapping


def _clamp_weights(converted: fx.GraphModule, prepared: nn.Module) -> None:
    """Clamp weights to their observer's grid, in place, as torch does in its eager flow only."""
    layers: dict[str, Any] = {n: m for n, m in converted.named_modules() if isinstance(m, WeightedQuantizedModule)}
    for name, module in layers.items():
        made_from: Any = prepared.get_submodule(name)
        observer, weight = made_from.qconfig.weight(), module.weight()
        codes = weight.int_repr()
        clamped = codes.clamp(observer.quant_min, observer.quant_max)
        if not torch.equal(clamped, codes):
            module.set_weight_bias(_with_codes(weight, clamped), module.bias())


def _with_codes(weight: Tensor, codes: Tensor) -> Tensor:
    """Return a quantized weight with other codes, int8 of the same shape."""
    if not is_per_channel(weight):
        return torch._make_per_tensor_quantized_tensor(codes, weight.q_scale(), weight.q_zero_point())
    scales, zero_points = weight.q_per_channel_scales(), weight.q_per_channel_zero_points()
    return torch._make_per_channel_quantized_tensor(codes, scales, zero_points, weight.q_per_channel_axis())


def _clamp_first(prepared: fx.GraphModule) -> None:
    """Let observers of tensors that feed only a clamp see the clamped tensors, in place.

    FX shares one observer among tensors with the same parameters (around pooling, concatenation, a clamp itself): it
    may clamp only if that changes none of the other tensors.
    """
    modules = dict(prepared.named_modules(remove_duplicate=False))
    watching = observers(prepared)
    bounds = _bounds(prepared.graph, modules)
    sites: dict[int, list[fx.Node]] = {}
    for node in prepared.graph.nodes:
        if node.op == "call_module" and node.target in watching:
            sites.setdefault(id(watching[node.target]), []).append(node)
    for nodes in sites.values():
        clamps = [clamp_after(node, modules) if _alone(node) else None for node in nodes]
        found = [clamp for clamp in clamps if clamp is not None]
        if not found:
            continue
        hull = found[0]
        for clamp in found[1:]:
            hull = hull.joined(clamp)
        if all(clamp is not None or hull.contains(bounds[node]) for node, clamp in zip(nodes, clamps, strict=True)):
            watching[str(nodes[0].target)].register_forward_pre_hook(ClampFirst(hull.low, hull.high))


def _alone(observer_call: fx.Node) -> bool:
    """True if every reader of the observed tensor reads this observer's output."""
    return all(len(source.users) == 1 for source in observer_call.all_input_nodes)


def _bounds(graph: fx.Graph, modules: dict[str, nn.Module]) -> dict[fx.Node, ValueRange]:
    """Return, for each node, bounds of its values that hold for any input."""
    bounds: dict[fx.Node, ValueRange] = {}
    for node in graph.nodes:
        sources = [bounds.get(source, EVERYTHING) for source in node.all_input_nodes]
        clamp = clamp_of(node, modules)
        if clamp is not None:
            bounds[node] = clamp
        elif sources and _keeps_values(node, modules):
            bounds[node] = sources[0]
        elif sources and node.target in _JOIN_VALUES:
            joined = sources[0]
            for source in sources[1:]:
                joined = joined.joined(source)
            bounds[node] = joined
        else:
            bounds[node] = EVERYTHING
    return bounds


def _keeps_values(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        module = modules[str(node.target)]
        return isinstance(module, _KEEP_VALUES) or "activation_post_process" in str(node.target)
    return node.op in ("call_function", "call_method") and node.target in _KEEP_VALUES_FUNCTIONS
