"""The tutorial's flow: fuse modules, put stubs around them, and swap each for its INT8 counterpart.

torch's documentation calls it eager mode quantization: https://docs.pytorch.org/docs/stable/quantization.html
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.ao.nn.intrinsic.modules.fused import _FusedModule
from torch.ao.nn.quantizable import MultiheadAttention
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import QuantStub, QuantWrapper, fuse_modules
from torch.ao.quantization import convert as torch_convert
from torch.ao.quantization import prepare as torch_prepare
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from qexp.config import schema
from qexp.config.schema import Granularity, Observer, QConfig
from qexp.errors import InputError, one_line
from qexp.models.architectures import Addition
from qexp.quantize.calibration.grid import executed_quant_max
from qexp.quantize.calibration.observers import ClampFirst, quant_max_of_observers
from qexp.quantize.flow import Flow, Prepared, QuantizationSpec, QuantizedModel
from qexp.quantize.graph.clamps import ValueRange, clamp_after
from qexp.quantize.graph.copies import by_modules, each_once, evaluation_copy, sharing_copy
from qexp.quantize.graph.hooks import attached
from qexp.quantize.graph.in_place import mark_writers, write_back, writes_back
from qexp.quantize.graph.tensor_names import OBSERVER, place, public
from qexp.quantize.graph.tracing import UntraceableError, trace
from qexp.quantize.torch_backend.deprecations import known_deprecations_silenced
from qexp.quantize.torch_backend.engines import engine
from qexp.quantize.torch_backend.float_layers import InFloat, mark_float_layers, why_float
from qexp.quantize.torch_backend.observers import RecordingObserver, fix_fewer_levels, torch_qconfig
from qexp.quantize.torch_backend.transposed_convolutions import fold
from qexp.quantize.torch_backend.workarounds import worked_around

log = logging.getLogger(__name__)

_FUSIBLE = (
    (nn.Conv2d, nn.BatchNorm2d, nn.ReLU),
    (nn.Conv2d, nn.BatchNorm2d),
    (nn.Conv2d, nn.ReLU),
    (nn.Conv1d, nn.BatchNorm1d, nn.ReLU),
    (nn.Conv1d, nn.BatchNorm1d),
    (nn.Conv1d, nn.ReLU),
    (nn.ConvTranspose1d, nn.BatchNorm1d),
    (nn.ConvTranspose2d, nn.BatchNorm2d),
    (nn.Linear, nn.BatchNorm1d),
    (nn.Linear, nn.ReLU),
    (nn.BatchNorm2d, nn.ReLU),
)
"""The chains that are fused, by exact types, the longest first; qexp folds transposed convolutions, torch the rest."""


class EagerFlow(Flow):
    """torch's eager mode quantization."""

    name = schema.FlowName.eager
    traced = False
    observes_functions = False
    folds_batchnorm = True

    def fuse(self, model: nn.Module, spec: QuantizationSpec, example: Tensor) -> nn.Module:
        """Return a copy whose Conv→BN(→ReLU) chains are single modules, if `spec.fusion` asks for that.

        The model's own fuse_model finds the chains, else tracing does. Raises InputError if neither is possible.
        """
        module = _with_float_functionals(evaluation_copy(model, example))
        if spec.fusion:
            module = _fused(module, example)
        mark_float_layers(module, example)
        mark_writers(module, example[:1])
        return module

    def prepare(self, fused: nn.Module, spec: QuantizationSpec, example: Tensor) -> Prepared:
        """Return a copy with torch's observers, and with stubs around it if the model has none."""
        module = by_modules(sharing_copy(fused).eval())
        # torchvision's quantizable models bring stubs, and a second pair would quantize twice.
        if not any(isinstance(m, QuantStub) for m in module.modules()):
            module = QuantWrapper(module).eval()
        wrapped: dict[nn.Module, nn.Module] = {
            part: InFloat(part) for part in module.modules() if why_float(part, spec.engine)
        }
        for name, part in list(module.named_modules(remove_duplicate=False)):
            if part in wrapped:
                module.set_submodule(name, wrapped[part])
        for part in set(module.modules()):
            if writes_back(part):
                wrapped.get(part, part).register_forward_hook(write_back)
        clamped = _clamped(module, example) if spec.qconfig.range_after_clamp else {}
        _choose(module, spec.qconfig, spec.observer, example)
        _refuse_batch_first(module)
        with engine(spec.engine), known_deprecations_silenced(), each_once(module):
            prepared = torch_prepare(module, inplace=True)
        _adapt(prepared, clamped)
        fix_fewer_levels(prepared, executed_quant_max(spec.qconfig))
        return Prepared(self, spec, fused, prepared)

    def convert(self, prepared: Prepared) -> QuantizedModel:
        """Return a copy in which each observed module is replaced by its INT8 counterpart."""
        module, name = sharing_copy(prepared.module), prepared.spec.engine
        with engine(name):
            with known_deprecations_silenced(), each_once(module):
                converted = torch_convert(module, inplace=True)
            return QuantizedModel(prepared, worked_around(converted, quant_max_of_observers(prepared.module), name))


def _with_float_functionals(module: nn.Module) -> nn.Module:
    """Replace the additions of qexp's own networks, in place, and return the model."""
    for part in list(module.modules()):
        for name, child in part.named_children():
            if isinstance(child, Addition):
                setattr(part, name, FloatFunctional())
    return module


def _adapt(prepared: nn.Module, clamped: Mapping[str, ValueRange]) -> None:
    """Complete torch's `prepare`, in place.

    Attention's product with a number needs no range, observers in fused modules must know that they see each tensor
    twice, and observers before a clamp see the clamped tensor. clamped: the modules whose output feeds only a clamp, by
    name.
    """
    for part in prepared.modules():
        if isinstance(part, MultiheadAttention):
            part.q_scaling_product = ByNumbers()
        watching = getattr(part, OBSERVER, None)
        if isinstance(part, _FusedModule) and isinstance(watching, RecordingObserver):
            watching.in_sequence = True
    for name, bounds in clamped.items():
        owner = prepared.get_submodule(name)
        target = getattr(owner, OBSERVER, None) if name.rpartition(".")[2] != OBSERVER else owner
        if isinstance(target, nn.Module):
            target.register_forward_pre_hook(ClampFirst(bounds.low, bounds.high))


def _fused(module: nn.Module, example: Tensor) -> nn.Module:
    if callable(getattr(module, "fuse_model", None)):
        return _fuse_by_own_method(module)
    try:
        graph_module = trace(module, example)
    except UntraceableError as error:
        raise InputError(
            f"flow=eager can't find the layers to fuse in {type(module).__name__}, which has no fuse_model() and whose "
            f"{place(error.module, error.kind)} {error.reason}"
        ) from error
    chains = list(_chains(graph_module))
    left = _unfused_batchnorm(graph_module, chains)
    if left:
        raise InputError(
            f"flow=eager can't fold the BatchNorm {left} into the convolution before it, since one of them is not a "
            "plain torch.nn module, or is called elsewhere too; flow=fx can"
        )
    names = {part: name for name, part in module.named_modules()}
    with each_once(module):
        for chain in chains:
            if isinstance(chain[0], _ConvTransposeNd) and isinstance(chain[1], _BatchNorm):
                fold(chain[0], chain[1])
                module.set_submodule(names[chain[1]], nn.Identity())
            else:
                fuse_modules(module, [names[part] for part in chain], inplace=True)
    return module


def _fuse_by_own_method(module: nn.Module) -> nn.Module:
    method: Any = module.fuse_model
    # torchvision's method takes is_qat since 0.11; models written after older examples take no argument.
    arguments = {"is_qat": False} if "is_qat" in inspect.signature(method).parameters else {}
    try:
        result = method(**arguments)
    except Exception as error:
        raise InputError(
            f"flow=eager: fuse_model() of {type(module).__name__} raised {one_line(error)}; flow=fx doesn't call it"
        ) from error
    return result.eval() if isinstance(result, nn.Module) else module


class _Calls:
    """The modules that a traced model calls, each with all its calls, whatever name they use."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._modules = dict(graph_module.named_modules(remove_duplicate=False))
        self._nodes: dict[nn.Module, list[fx.Node]] = {}
        for node in graph_module.graph.nodes:
            if node.op == "call_module":
                self._nodes.setdefault(self._modules[node.target], []).append(node)

    def __iter__(self) -> Iterator[nn.Module]:
        """In the order of their first calls."""
        return iter(self._nodes)

    def next(self, module: nn.Module) -> nn.Module | None:
        """The module that alone reads every output of this one, and reads nothing else; None if there is none."""
        readers = [list(node.users) for node in self._nodes[module]]
        if any(len(users) != 1 or users[0].op != "call_module" for users in readers):
            return None
        found = {self._modules[str(users[0].target)] for users in readers}
        after = found.pop()
        return after if not found and len(self._nodes[after]) == len(readers) else None


def _chains(graph_module: fx.GraphModule) -> Iterator[list[nn.Module]]:
    """Yield the modules to fuse together: in all their calls, each is the only reader of the one before it."""
    calls = _Calls(graph_module)
    taken: set[nn.Module] = set()
    for module in calls:
        for types in _FUSIBLE:
            chain: list[nn.Module] = [module]
            while len(chain) < len(types) and (after := calls.next(chain[-1])) is not None:
                chain.append(after)
            if [type(m) for m in chain] == list(types) and not taken.intersection(chain):
                taken.update(chain)
                yield chain
                break


def _unfused_batchnorm(graph_module: fx.GraphModule, chains: list[list[nn.Module]]) -> str:
    """Name of the first BatchNorm that follows a convolution and is in none of the chains; "" if there is none."""
    modules = dict(graph_module.named_modules(remove_duplicate=False))
    fused = {part for chain in chains for part in chain}
    for node in graph_module.graph.nodes:
        is_module = node.op == "call_module" and isinstance(modules[node.target], nn.BatchNorm2d)
        is_function = node.op == "call_function" and node.target is nn.functional.batch_norm
        if not (is_module or is_function) or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        before = node.args[0]
        follows = (
            isinstance(modules[str(before.target)], nn.Conv2d)
            if before.op == "call_module"
            else before.target in (nn.functional.conv2d, torch.conv2d)
        )
        if follows and len(before.users) == 1 and (is_function or modules[str(node.target)] not in fused):
            return str(node.target) if is_module else node.name
    return ""


def _refuse_batch_first(module: nn.Module) -> None:
    """Raise InputError for attention that torch 2.13's INT8 module computes wrongly."""
    for name, part in module.named_modules():
        if type(part) is nn.MultiheadAttention and part.batch_first and not getattr(part, "never_runs", False):
            where = place(public(name, module), type(part).__name__)
            raise InputError(
                f"flow=eager can't quantize {where} with batch_first=True: torch's INT8 one takes the batch for the "
                "sequence; use batch_first=False and transpose around it, or flow=fx, which leaves it in FP32"
            )


class ByNumbers(FloatFunctional):
    """A FloatFunctional that only adds numbers or multiplies by them, which needs no range.

    torch refuses to convert one without a range, and an unconverted FloatFunctional doesn't take INT8 tensors.
    """

    def add_scalar(self, x: Tensor, y: float) -> Tensor:
        return torch.ops.quantized.add_scalar(x, y) if x.is_quantized else super().add_scalar(x, y)

    def mul_scalar(self, x: Tensor, y: float) -> Tensor:
        return torch.ops.quantized.mul_scalar(x, y) if x.is_quantized else super().mul_scalar(x, y)


def _choose(module: nn.Module, qconfig: QConfig, observer: Observer, example: Tensor) -> None:
    """Set the qconfig of every module, in place.

    It is None for modules that never run in evaluation (GoogLeNet's auxiliary heads), where observers would see
    nothing.
    """
    everywhere: Any = torch_qconfig(qconfig, observer)
    # torch has no per-channel weights for transposed convolutions.
    transposed: Any = torch_qconfig(qconfig, observer, Granularity.per_tensor)
    nowhere: Any = None
    never: Any = True
    ran: set[int] = set()
    inner = [m for m in module.modules() if m is not module]
    hooks = (m.register_forward_hook(lambda m, inputs, output: ran.add(id(m))) for m in inner)
    with torch.inference_mode(), attached(hooks):
        module(example[:1])
    module.qconfig = everywhere
    in_float = {m.layer for m in module.modules() if isinstance(m, InFloat)}
    for m in module.modules():
        if isinstance(m, FloatFunctional):
            m.qconfig = everywhere if id(m.activation_post_process) in ran else nowhere
            if m.qconfig is nowhere and type(m) is FloatFunctional:
                m.__class__ = ByNumbers
        elif m in in_float:
            m.qconfig = nowhere
        elif isinstance(m, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            m.qconfig = transposed if id(m) in ran else nowhere
        elif m is not module and not any(id(part) in ran for part in m.modules()):
            m.qconfig = nowhere
            m.never_runs = never  # read by layers.py: convert takes the qconfig away


def _clamped(module: nn.Module, example: Tensor) -> dict[str, ValueRange]:
    """Return, by first name, the modules whose output feeds only a clamp in all their calls, with its bounds."""
    try:
        graph_module = trace(module, example)
    except UntraceableError as error:
        log.info(
            "qconfig.range_after_clamp has no effect: %s %s",
            place(public(error.module, module), error.kind),
            error.reason,
        )
        return {}
    modules = dict(graph_module.named_modules(remove_duplicate=False))
    first = {part: name for name, part in module.named_modules()}
    found: dict[str, ValueRange | None] = {}
    for node in graph_module.graph.nodes:
        if node.op != "call_module":
            continue
        after, name = clamp_after(node, modules), first[modules[str(node.target)]]
        before = found.get(name, after)
        found[name] = after.joined(before) if after is not None and before is not None else None
    return {name: bounds for name, bounds in found.items() if bounds is not None}
