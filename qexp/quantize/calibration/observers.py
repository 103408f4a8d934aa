"""Questions that can be asked of the observers of a prepared model, which are of torch.ao's or torchao's interface."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qexp.config.schema import Scheme
from qexp.models.class_names import derives_from
from qexp.quantize.calibration.grid import QUANT_MAX, Grid
from qexp.quantize.calibration.recording_observer import Recording
from qexp.quantize.graph.tensor_names import OBSERVER, called, is_observer, tensor_names
from qexp.records import QParams

_LIBRARIES = ("torch.ao.quantization.observer", "torchao.quantization.pt2e.observer")
_UNIFORM = tuple(f"{library}.UniformQuantizationObserverBase" for library in _LIBRARIES)
_CLAMP = re.compile(r"(?:^|\.|add_|Conv|BN|Linear)(relu6?|hardtanh|clamp)", re.IGNORECASE)
"""In the name of a function, of an operator (`aten.relu.default`) or of a fused module (`ConvReLU2d`)."""
_FIXED = tuple(f"{library}.FixedQParamsObserver" for library in _LIBRARIES)

TENSOR_SCHEME = {Scheme.symmetric: torch.per_tensor_symmetric, Scheme.asymmetric: torch.per_tensor_affine}
CHANNEL_SCHEME = {Scheme.symmetric: torch.per_channel_symmetric, Scheme.asymmetric: torch.per_channel_affine}


def bounds(grid: Grid) -> dict[str, int]:
    # A full grid is not passed: torch would call 0…255 customised, and symmetric activations would then get
    # (0 + 255) // 2 = 127 as zero point instead of torch's default 128.
    return {} if grid.full else {"quant_min": grid.qmin, "quant_max": grid.qmax}


def quant_max_of_observers(prepared: nn.Module) -> int:
    """Return the largest code of activations that the converted model will let through."""
    found = [getattr(one, "executed_quant_max", QUANT_MAX) for one in observers(prepared).values()]
    return min(found, default=QUANT_MAX)


@dataclass(frozen=True)
class ClampFirst:
    """A forward pre-hook by which an observer sees a tensor as the clamp behind it will leave it.

    The observer returns the clamped tensor. That changes nothing, since the clamp is its only reader.
    """

    low: float
    high: float

    def __call__(self, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0].clamp(self.low, self.high),)


def observers(prepared: nn.Module) -> dict[str, Any]:
    """Return every observer by its module name; a shared one appears under each of its names."""
    return {
        name: module
        for name, module in prepared.named_modules(remove_duplicate=False)
        # Others (that of torch's `reshape`, for one) only return what their input's observer computes.
        if derives_from(module, *_UNIFORM, *_FIXED)
    }


def records_range(observer: nn.Module) -> bool:
    """True if calibration feeds this observer (those of sigmoid and the like have fixed parameters)."""
    return not derives_from(observer, *_FIXED)


def is_fed(observer: Any) -> bool:
    """True if an observer that records a range has seen any value."""
    if isinstance(observer, Recording):
        return observer.recorder.fed
    return bool(observer.min_val.numel()) and float(observer.min_val.min()) != math.inf


def is_finite(observer: Any) -> bool:
    """True if an observer that was fed has seen neither NaN nor infinity."""
    if isinstance(observer, Recording):
        return observer.recorder.finite
    return bool(observer.min_val.isfinite().all() and observer.max_val.isfinite().all())


def on_grid(observer: Any, finer: Grid) -> Any:
    """Return a copy of an observer that maps what it has seen onto a finer grid than its own."""
    copied = copy.deepcopy(observer)
    times = finer.levels / (observer.quant_max - observer.quant_min + 1)
    if not records_range(copied):
        copied.scale.div_(times)
        copied.zero_point.mul_(int(times))
    else:
        copied.has_customized_qrange = True
        copied.eps = observer.eps / times  # of a scale, whose range may be as small as on its own grid
        copied.dst_nbins = finer.levels  # in which torch's histogram searches for the range
    copied.quant_min, copied.quant_max = finer.qmin, finer.qmax
    copied.executed_quant_max = finer.qmax
    return copied


def to_qparams(observer: Any, axis: int | None = None) -> QParams:
    """Return exactly the parameters that torch's convert will read from this observer, and the executed codes."""
    scale, zero_point = observer.calculate_qparams()
    return QParams(
        scale=scale.detach().to(torch.float32).reshape(-1).numpy().copy(),
        zero_point=zero_point.detach().to(torch.int64).reshape(-1).numpy().copy(),
        qmin=int(observer.quant_min),
        qmax=int(getattr(observer, "executed_quant_max", observer.quant_max)),
        axis=axis,
    )


def observed_qparams(prepared: nn.Module) -> dict[str, QParams]:
    """Return the parameters of all observed tensors by their names."""
    names = tensor_names(prepared)
    return {
        names[name]: to_qparams(observer, getattr(observer, "ch_axis", None))
        for name, observer in observers(prepared).items()
        if name in names
    }


def ranges_taken(prepared: nn.Module) -> dict[str, str]:
    """Return where the range of each observed activation was taken, by its name.

    `output` as it is computed, `after relu6` (and other operators) behind the clamp that follows, `after clamp to 0…6`
    where the clamp is the observer's own, `fixed` by the function that computes it.
    """
    names = tensor_names(prepared)
    found = {name: one for name, one in observers(prepared).items() if name in names}
    computed = _computed(prepared)
    return {names[name]: _taken(one, computed[name]) for name, one in found.items() if name in computed}


def _computed(prepared: nn.Module) -> dict[str, str]:
    """Return the function or the class that computes the activation that an observer sees, by the observer's name."""
    if not isinstance(prepared, fx.GraphModule):
        owners = {name: name.removesuffix(f".{OBSERVER}") for name in observers(prepared)}
        return {name: type(prepared.get_submodule(owner)).__name__ for name, owner in owners.items()}

    def computed_by(node: fx.Node) -> str:
        return type(prepared.get_submodule(str(node.target))).__name__ if node.op == "call_module" else called(node)

    sources = {str(node.target): node.all_input_nodes[0] for node in prepared.graph.nodes if is_observer(node)}
    return {name: computed_by(source) for name, source in sources.items() if source.op != "get_attr"}


def _taken(observer: nn.Module, computed: str) -> str:
    if not records_range(observer):
        return "fixed"
    for hook in observer._forward_pre_hooks.values():
        if isinstance(hook, ClampFirst):
            return f"after clamp to {hook.low:g}…{hook.high:g}"
    clamp = _CLAMP.search(computed)
    return f"after {clamp.group(1).lower()}" if clamp else "output"
