"""Observers of torch.ao's interface for a qconfig."""

from __future__ import annotations

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

from qexp.config.schema import ActivationObserver, Granularity, Observer, QConfig, WeightObserver
from qexp.quantize.calibration.grid import QUANT_MAX, Side, executed_quant_max, grid
from qexp.quantize.calibration.observers import CHANNEL_SCHEME, TENSOR_SCHEME, bounds, observers
from qexp.quantize.calibration.ranges import range_mse, range_mse_rows
from qexp.quantize.calibration.recording_observer import Recording, destination
from qexp.quantize.calibration.statistics_collector import statistics


class RecordingObserver(Recording, UniformQuantizationObserverBase):  # type: ignore[misc]
    """torch.ao's interface to the activation observer `observer`."""


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
