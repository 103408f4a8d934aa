"""From a qconfig to observers of torch's kind, and what may be asked of them."""

from __future__ import annotations

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
from qexp.quantize.calibration.recording_observer import RecordingObserver, destination
from qexp.quantize.calibration.statistics_collector import statistics
from qexp.records import QParams

_TENSOR_SCHEME = {Scheme.symmetric: torch.per_tensor_symmetric, Scheme.asymmetric: torch.per_tensor_affine}
_CHANNEL_SCHEME = {Scheme.symmetric: torch.per_channel_symmetric, Scheme.asymmetric: torch.per_channel_affine}


def _bounds(grid: Grid) -> dict[str, int]:
    # A full grid is not handed over: told 0…255, torch calls it customised, and symmetric activations then take
    # (0 + 255) // 2 = 127 as zero point instead of torch's default 128.
    return {} if grid.full else {"quant_min": grid.qmin, "quant_max": grid.qmax}


def activation_observer(qconfig: QConfig, observer: Observer) -> Any:
    """A constructor of the observer for activations (quint8, per tensor): a recording one, or torch's own histogram."""
    keywords: dict[str, Any] = {
        "dtype": torch.quint8,
        "qscheme": _TENSOR_SCHEME[qconfig.activation.scheme],
        **_bounds(grid(qconfig, Side.activations)),
    }
    executed = executed_quant_max(qconfig)
    if observer.name is not ActivationObserver.histogram:
        return RecordingObserver.with_args(observer=observer, executed_quant_max=executed, **keywords)
    bins = {} if observer.bins is None else {"bins": observer.bins}
    return Histogram.with_args(executed_quant_max=executed, **bins, **keywords)


class Histogram(HistogramObserver):
    """torch's own; quant_max: as of a RecordingObserver."""

    def __init__(self, executed_quant_max: int = QUANT_MAX, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.executed_quant_max = executed_quant_max


def quant_max_of_observers(prepared: nn.Module) -> int:
    """The largest code of an activation that is let through once the model is converted."""
    found = [one for one in observers(prepared).values() if isinstance(one, RecordingObserver | Histogram)]
    return min((observer.executed_quant_max for observer in found), default=QUANT_MAX)


def fix_fewer_levels(prepared: nn.Module, quant_max: int) -> None:
    """In place, let observers with fixed parameters (of sigmoid and its like) have quant_max + 1 levels between their
    ends."""
    levels = (QUANT_MAX + 1) // (quant_max + 1)
    for observer in {id(o): o for o in observers(prepared).values() if isinstance(o, FixedQParamsObserver)}.values():
        observer.scale.mul_(levels)
        observer.zero_point.div_(levels, rounding_mode="floor")
        observer.quant_max = quant_max


class MseObserver(MinMaxObserver):
    """Of a weight, seen once: the range with the smallest squared error."""

    def forward(self, x_orig: Tensor) -> Tensor:
        low, high = range_mse(statistics(x_orig.detach()), *destination(self))
        self.min_val.fill_(low)
        self.max_val.fill_(high)
        return x_orig


class PerChannelMseObserver(PerChannelMinMaxObserver):
    """Of a weight, seen once: the range of each channel with the smallest squared error."""

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
    """A constructor of the observer for weights (qint8, per tensor or along axis 0)."""
    kind = _WEIGHTS[qconfig.weight.observer, granularity]
    bounds = _bounds(grid(qconfig, Side.weights))
    if granularity is Granularity.per_channel:
        return kind.with_args(dtype=torch.qint8, qscheme=_CHANNEL_SCHEME[qconfig.weight.scheme], ch_axis=0, **bounds)
    return kind.with_args(dtype=torch.qint8, qscheme=_TENSOR_SCHEME[qconfig.weight.scheme], **bounds)


def torch_qconfig(qconfig: QConfig, observer: Observer, weight_granularity: Granularity | None = None) -> TorchQConfig:
    """torch's QConfig for these settings; `weight_granularity` overrides the qconfig's for layers that need it."""
    return TorchQConfig(
        activation=activation_observer(qconfig, observer),
        weight=weight_observer(qconfig, weight_granularity or qconfig.weight.granularity),
    )


@dataclass(frozen=True)
class ClampFirst:
    """A forward pre-hook that lets an observer see a tensor as the clamp that follows will leave it.

    The observer hands the clamped tensor on. That changes nothing, for its only consumer is that clamp.
    """

    low: float
    high: float

    def __call__(self, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0].clamp(self.low, self.high),)


def observers(prepared: nn.Module) -> dict[str, Any]:
    """Every observer by its module name; one that is shared appears under each of its names."""
    return {
        name: module
        for name, module in prepared.named_modules(remove_duplicate=False)
        # Others (of torch's `reshape`, for one) only pass on what their input's observer says.
        if isinstance(module, UniformQuantizationObserverBase | FixedQParamsObserver)
    }


def records_range(observer: nn.Module) -> bool:
    """Whether calibration feeds this observer (those of sigmoid and its like have fixed parameters)."""
    return isinstance(observer, UniformQuantizationObserverBase)


def is_fed(observer: Any) -> bool:
    """Whether an observer that records a range has seen any value."""
    if isinstance(observer, RecordingObserver):
        return observer.recorder.fed
    return bool(observer.min_val.numel()) and float(observer.min_val.min()) != math.inf


def is_finite(observer: Any) -> bool:
    """Whether what an observer that was fed has seen is without NaN and infinity."""
    if isinstance(observer, RecordingObserver):
        return observer.recorder.finite
    return bool(observer.min_val.isfinite().all() and observer.max_val.isfinite().all())


def to_qparams(observer: Any, axis: int | None = None) -> QParams:
    """What torch's convert will read from this observer, exactly, and the codes that are executed."""
    scale, zero_point = observer.calculate_qparams()
    return QParams(
        scale=scale.detach().to(torch.float32).reshape(-1).numpy().copy(),
        zero_point=zero_point.detach().to(torch.int64).reshape(-1).numpy().copy(),
        qmin=int(observer.quant_min),
        qmax=int(getattr(observer, "executed_quant_max", observer.quant_max)),
        axis=axis,
    )
