"""Warnings about a run's numbers; their sentences are made in `report.sentences`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from qexp import quantize
from qexp.accuracy.target_cpu import TargetAccuracy
from qexp.config.schema import Config, Engine, Overflow, Scheme
from qexp.data.loading import Data
from qexp.metrics import Metric
from qexp.pipeline.run_metrics import recommended_guard
from qexp.quantize import FLOWS, ReducedRange, supported
from qexp.quantize.saturation import kernels
from qexp.quantize.saturation.kernels import Kernels
from qexp.records import AccuracySource, Layer, RunWarning, SaturationStatus, WarningCode
from qexp.runtimes import int8_kernels
from qexp.runtimes.parting import Parting


def saturation_warnings(
    config: Config,
    guard: Overflow,
    layers: tuple[Layer, ...],
    reduced: tuple[ReducedRange, ...],
    on_target: TargetAccuracy,
    executing: Kernels,
) -> Iterator[RunWarning]:
    """Warnings about 16-bit accumulators. guard: the one executed, not auto; executing: the kernels that the accuracy
    is of."""
    saturating, signature = on_target.saturating_layers, kernels.probe()
    elsewhere = frozenset[str]().union(*(one.here | one.there for one in int8_kernels.elsewhere(config)))
    of_kind = {layer.name: layer.kind for layer in layers if layer.int8}

    def or_onednn(names: Collection[str]) -> bool:
        """True if engine=onednn takes the weights and can't saturate in these layers."""
        kinds = kernels.overflowing_kinds(config.qconfig, Engine.onednn, config.flow, config.target, signature)
        kinds |= elsewhere
        takes = config.qconfig.weight.scheme is Scheme.symmetric and Engine.onednn in supported()
        return takes and not kinds & {of_kind[name] for name in names if name in of_kind}

    if reduced:
        sides = Counter(str(one.side) for one in reduced)
        onednn = or_onednn([one.name for one in reduced])
        yield RunWarning(WarningCode.layers_narrowed, {"sides": sides, "layers": len(of_kind), "onednn": onednn})
    if guard is not Overflow.none and saturating:
        highest = max(layer.highest for layer in on_target.layers if layer.saturates)
        yield RunWarning(
            WarningCode.saturates_in_spite_of_guard,
            {
                "layers": saturating,
                "guard": guard,
                "beyond": highest if highest > quantize.SAFE_CODE else None,
                "remedy": recommended_guard(guard),
                "onednn": or_onednn(saturating),
            },
        )
    risky = [name for name, kind in of_kind.items() if kind in executing.here]
    executed = on_target.source is AccuracySource.executed and on_target.saturation is not SaturationStatus.impossible
    # Only for overflow=none: where auto chose no guard, the target CPU needs none, whatever this CPU does.
    if config.qconfig.overflow is Overflow.none and risky and executed:
        yield RunWarning(
            WarningCode.saturation_unguarded,
            {"observed": bool(saturating), "kernels": executing.name, "onednn": or_onednn(risky)},
        )


def parting_warnings(
    config: Config, guard: Overflow, layers: tuple[Layer, ...], parted: Collection[Parting]
) -> Iterator[RunWarning]:
    """A warning about each runtime that has parted from torch's logits, with the kinds of layer in which its kernels
    saturate. guard: the one executed, not auto."""
    of_model = {layer.kind for layer in layers if layer.int8}
    for one in parted:
        kinds = int8_kernels.of(config, one.runtime).here & of_model if guard is not Overflow.weights else ()
        yield RunWarning(WarningCode.runtime_parted, {**asdict(one), "saturates": tuple(sorted(kinds))})


def runtime_layer_warnings(layers: tuple[Layer, ...], executed: Mapping[str, tuple[int, int]]) -> Iterator[RunWarning]:
    """A warning about each runtime that executes fewer layers in INT8 than the model has. executed: by runtime, the
    numbers in INT8 and in FP32."""
    of_model = sum(layer.int8 and layer.kind != "batchnorm" for layer in layers)
    for runtime, (int8, _) in executed.items():
        if int8 < of_model:
            yield RunWarning(
                WarningCode.runtime_layers_in_fp32, {"runtime": runtime, "executed": int8, "layers": of_model}
            )


def slow_kernel_warnings(config: Config, slow: tuple[str, ...]) -> Iterator[RunWarning]:
    """A warning about layers without a fast kernel. slow: their names (see `slow_depthwise.without_fast_kernel`)."""
    if slow:
        onednn = config.qconfig.weight.scheme is Scheme.symmetric and Engine.onednn in supported()
        yield RunWarning(WarningCode.slow_depthwise, {"engine": config.engine, "layers": slow, "onednn": onednn})


def general_warnings(
    config: Config, data: Data, layers: tuple[Layer, ...], found: Mapping[str, Any]
) -> Iterator[RunWarning]:
    """All warnings but those about accumulators and kernels. found: the run's metrics and tags."""
    if config.dataset["_target_"] == "qexp.data.builtin.digits":
        yield RunWarning(WarningCode.data_set_for_trying, {"images": len(data.test)})
    if config.qconfig.simulated:
        bits = {"weights": config.qconfig.weight.bits, "activations": config.qconfig.activation.bits}
        yield RunWarning(WarningCode.simulated, bits)
    if not FLOWS[config.flow].calibrates and config.engine is Engine.onednn:
        yield RunWarning(WarningCode.one_model_a_thread)
    low, high = found.get(Metric.speedup_low), found.get(Metric.speedup_high)
    if found.get("latency_valid") == "false":
        # Nor does it tell which of the two is faster: its INT8 side need not be the fastest variant.
        yield RunWarning(WarningCode.timing_untrusted)
    elif low is not None and high is not None:
        if high < 1:
            yield RunWarning(WarningCode.int8_slower, {"flow": config.flow, "engine": config.engine})
        elif low <= 1:
            yield RunWarning(WarningCode.int8_not_faster)
    left = [layer for layer in layers if not layer.int8 and layer.kind != "batchnorm"]
    if left:
        reasons = tuple(dict.fromkeys(layer.reason for layer in left if layer.reason))
        yield RunWarning(
            WarningCode.layers_in_fp32, {"layers": tuple(layer.name for layer in left), "reasons": reasons}
        )
    norms = sum(layer.kind == "batchnorm" for layer in layers)
    if norms and FLOWS[config.flow].folds_batchnorm:
        yield RunWarning(WarningCode.batchnorm_left, {"count": norms})
