"""Observers of torch.ao's interface for a qconfig, and questions that can be asked of them."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import QConfig as TorchQConfig
from torch.ao.quantization.observer import (
    FixedQParamsObserver,
    HistogramObserver,
    MinMaxObserver,
    PerChannelMinMaxObserver,
    UniformQuantizationObserverBase,
)

from qexp.config.schema import ActivationObserver, Granularity, Observer, QConfig, Scheme, WeightObserver
from qexp.quantize.calibration.grid import QUANT_MAX, Grid, Side, executed_quant_max, grid
from qexp.quantize.calibration.ranges import range_mse, range_mse_rows
from qexp.quantize.calibration.recording_observer import Recording, RecordingObserver, destination
from qexp.quantize.calibration.statistics_collector import statistics
from qexp.records import QParams

TENSOR_SCHEME = {Scheme.symmetric: torch.per_tensor_symmetric, Scheme.asymmetric: torch.per_tensor_affine}
CHANNEL_SCHEME = {Scheme.symmetric: torch.per_channel_symmetric, Scheme.asymmetric: torch.per_channel_affine}


def bounds(grid: Grid) -> dict[str, int]:
    # A full grid is not passed: torch would call 0…255 customised, and symmetric activations would then get
    # (0 + 255) // 2 = 127 as zero point instead of torch's default 128.
    return {} if grid.full else {"quant_min": grid.qmin, "quant_max": grid.qmax}


def activation_observer(qconfig: QConfig, observer: Observer) -> Any:
    """Return the constructor of the observer of activations (quint8, per tensor): recording, or torch's histogram."""
    keywords: dict[str, Any] = {
        "dtype": torch.quint8,
        "qscheme": TENSOR_SCHEME[qconfig.activation.scheme],
        **bounds(grid(qconfig, Side.activations)),
    }
    executed = executed_quant_max(qconfig)
    if observer.name is not ActivationObserver.histogram:
        return RecordingObserver.with_args(observer=observer, executed_quant_max=executed, **keywords)
    bins = {} if observer.bins is None else {"bins": observer.bins}
    return Histogram.with_args(executed_quant_max=executed, **bins, **keywords)


class Histogram(HistogramObserver):
    """torch's HistogramObserver; executed_quant_max: as in RecordingObserver."""

    def __init__(self, executed_quant_max: int = QUANT_MAX, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.executed_quant_max = executed_quant_max


def quant_max_of_observers(prepared: nn.Module) -> int:
    """Return the largest code of activations that the converted model will let through."""
    found = [getattr(one, "executed_quant_max", QUANT_MAX) for one in observers(prepared).values()]
    return min(found, default=QUANT_MAX)


def fix_fewer_levels(prepared: nn.Module, quant_max: int) -> None:
    """Give observers with fixed parameters (sigmoid and the like) quant_max + 1 levels over their range, in place."""
    levels = (QUANT_MAX + 1) // (quant_max + 1)
    for observer in {id(o): o for o in observers(prepared).values() if isinstance(o, FixedQParamsObserver)}.values():
        observer.scale.mul_(levels)
        observer.zero_point.div_(levels, rounding_mode="floor")
        observer.quant_max = quant_max


class MseObserver(MinMaxObserver):
    """Observes a weight once; its range is the one with the smallest squared error."""

    def forward(self, x_orig: Tensor) -> Tensor:
        low, high = range_mse(statistics(x_orig.detach()), *destination(self))
        self.min_val.fill_(low)
        self.max_val.fill_(high)
        return x_orig


class PerChannelMseObserver(PerChannelMinMaxObserver):
    """Observes a weight once; each channel's range is the one with the smallest squared error."""

    def forward(self, x_orig: Tensor) -> Tensor:
        rows = x_orig.detach().movedim(self.ch_axis, 0).flatten(1).numpy()
        low, high = range_mse_rows(rows, *destination(self))
        self.min_val, self.max_val = torch.from_numpy(low), torch.from_numpy(high)
        return x_orig


_WEIGHTS: dict[tuple[WeightObserver, Granularity], Any] = {
    (WeightObserver.minmax, Granularity.per_tensor): MinMaxObserver,
    (WeightObserver.minmax, Granularity.per_channel): PerChannelMinMaxObserver,
    (WeightObserver.mse, Granularity.per_tensor): MseObserver,
    (WeightObserver.mse, Granularity.per_channel): PerChannelMseObserver,
}


def weight_observer(qconfig: QConfig, granularity: Granularity) -> Any:
    """Return the constructor of the observer of weights (qint8, per tensor or along axis 0)."""
    kind = _WEIGHTS[qconfig.weight.observer, granularity]
    limits = bounds(grid(qconfig, Side.weights))
    if granularity is Granularity.per_channel:
        return kind.with_args(dtype=torch.qint8, qscheme=CHANNEL_SCHEME[qconfig.weight.scheme], ch_axis=0, **limits)
    return kind.with_args(dtype=torch.qint8, qscheme=TENSOR_SCHEME[qconfig.weight.scheme], **limits)


def torch_qconfig(qconfig: QConfig, observer: Observer, weight_granularity: Granularity | None = None) -> TorchQConfig:
    """Return torch's QConfig for these settings; `weight_granularity` overrides theirs for layers that need it."""
    return TorchQConfig(
        activation=activation_observer(qconfig, observer),
        weight=weight_observer(qconfig, weight_granularity or qconfig.weight.granularity),
    )


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
        if isinstance(module, UniformQuantizationObserverBase | FixedQParamsObserver) or _is_torchaos(module)
    }


def _is_torchaos(module: nn.Module) -> bool:
    """True for an observer of torchao's interface, without an import of torchao."""
    return any(kind.__module__.startswith("torchao.") and "Observer" in kind.__name__ for kind in type(module).__mro__)


def records_range(observer: nn.Module) -> bool:
    """True if calibration feeds this observer (those of sigmoid and the like have fixed parameters)."""
    return not isinstance(observer, FixedQParamsObserver)


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
    if isinstance(copied, FixedQParamsObserver):
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
