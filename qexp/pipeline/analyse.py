"""The stage *analyse*: layer errors, and the Result made of all that was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from qexp import quantize
from qexp.accuracy import target_cpu
from qexp.config import identity
from qexp.config.schema import Config, Engine, QConfig, Target
from qexp.data.loading import Data
from qexp.latency import protocol
from qexp.metrics import Metric
from qexp.models.float_model import FloatModel
from qexp.pipeline import run_files, run_metrics, warnings
from qexp.pipeline.prepare import Calibration, Saved, images_of
from qexp.quantize.inspection.parts import at_a_time
from qexp.quantize.saturation import kernels
from qexp.records import (
    PARTED_TAG,
    SAME_TAG,
    SIMULATED_TAG,
    AccuracySource,
    Fidelity,
    Precision,
    Predictions,
    Result,
    Top1,
    Variant,
    same_as_text,
)
from qexp.runtimes import int8_kernels
from qexp.runtimes.parting import Parting
from qexp.system.steps import step


def resolved_params(
    qconfig: QConfig, config: Config, reduced: tuple[quantize.ReducedRange, ...] = ()
) -> dict[str, str]:
    """The params that record what was executed, beside those that record what was asked for.

    activation_bits: of the scale; where a guard reduced the range to 7 bits, codes go up to activation_highest_code.
    narrowed_*: the number of layers whose range overflow=layers reduced, by side.
    """
    if "qconfig.overflow" in config.flow.ignores:
        return {"resolved.weight_bits": str(qconfig.weight.bits)}
    weights, activations = quantize.Side.weights, quantize.Side.activations
    values = {
        "overflow": qconfig.overflow,
        "placement": qconfig.placement,
        "weight_bits": quantize.executed_bits(qconfig, weights),
        "activation_bits": quantize.executed_bits(qconfig, activations),
        "activation_highest_code": quantize.asked_grid(qconfig, activations).qmax,
        "narrowed_weights": sum(layer.side is weights for layer in reduced),
        "narrowed_activations": sum(layer.side is activations for layer in reduced),
    }
    return {f"resolved.{name}": str(value) for name, value in values.items()}


def slow_kernels(config: Config, int8: nn.Module) -> tuple[str, ...]:
    """The layers for which the engine has no fast kernel on the target CPU."""
    if not config.flow.executed_by_torch:
        return ()
    from qexp.quantize.torch_backend.slow_depthwise import without_fast_kernel

    native = config.target is Target.native
    vnni = not kernels.probe().dense_saturates(Engine.fbgemm) if native else config.target is Target.vnni
    return without_fast_kernel(int8, config.engine, vnni)


@step("errors of layers")
def layer_errors(config: Config, int8: quantize.QuantizedModel, data: Data) -> tuple[Fidelity, ...]:
    """The errors of each INT8 layer against its float counterpart, on evaluation images; () where switched off."""
    chosen = target_cpu.spread(len(data.test), config.per_layer.images)
    if "per_layer" in identity.without_effect(config) or not len(chosen):
        return ()
    size = at_a_time(data.test.shape)
    batches = np.split(chosen, range(size, len(chosen), size))
    images = (images_of(data, data.test.pixels(batch)) for batch in batches)
    return quantize.layer_fidelity(int8, images)


@dataclass(frozen=True)
class Measured:
    """All that a run has measured.

    fusion_difference: of the fused from the float model's logits, as a share of the largest; reduced: the layers whose
    range overflow=layers reduced to 7 bits; headline: the INT8 variant that the headline metrics and the verdict are
    about; parted: the runtimes whose logits have parted from torch's; runtime_layers: by runtime, the numbers of layers
    that it executes in INT8 and in FP32; latency_from: the run that made the timings, empty where it is this one;
    lock_wait_share: of the time so far, that for which the run has waited for the machine's lock.
    """

    fusion_difference: float
    calibration: Calibration
    int8: quantize.QuantizedModel
    reduced: tuple[quantize.ReducedRange, ...]
    saved: Saved
    predictions: Mapping[Variant, Predictions]
    headline: Variant
    parted: tuple[Parting, ...]
    runtime_layers: Mapping[str, tuple[int, int]]
    timings: list[protocol.Timing]
    latency_from: str
    layer_errors: tuple[Fidelity, ...]
    on_target: target_cpu.TargetAccuracy
    lock_wait_share: float


def top1(
    data: Data,
    fp32: Predictions,
    int8: Mapping[str, Predictions],
    same: Sequence[tuple[str, ...]],
    on_target: target_cpu.TargetAccuracy,
) -> Top1:
    """The predicted classes. int8: predictions by runtime; same: groups of runtimes whose logits are equal."""
    shared = {group: int8[group[0]].top1 for group in same}
    executed = on_target.source is AccuracySource.executed
    return Top1(
        labels=fp32.labels.astype(np.int32),
        fp32=fp32.top1,
        int8={runtime: classes for group, classes in shared.items() for runtime in group},
        classes=tuple(data.classes),
        target_images=None if executed else on_target.images,
        target=None if executed else on_target.predictions.top1,
    )


@step("result")
def result(
    config: Config,
    data: Data,
    fp32: FloatModel,
    measured: Measured,
    provenance: Mapping[str, str],
    folder: Path,
) -> Result:
    """The metrics, tags, verdict and warnings of a run; writes its files into `folder`. provenance: tags (see
    `run_files.tags`)."""
    margin, reduced = config.dataset["margin"], measured.reduced
    qconfig, layers = measured.int8.qconfig, measured.int8.layers
    predictions = {"fp32": measured.predictions[measured.saved.reference_variant(Precision.fp32)]}
    predictions["int8"] = measured.predictions[measured.headline]
    int8 = {one.runtime: found for one, found in measured.predictions.items() if one.precision is Precision.int8}
    same = run_metrics.same_runtimes(int8)
    outcome = {
        SAME_TAG: same_as_text(same),
        **({PARTED_TAG: " ".join(one.runtime for one in measured.parted)} if measured.parted else {}),
        **run_metrics.latency_tags(config, measured.timings),
        **({"latency_from": measured.latency_from} if measured.latency_from else {}),
        "accuracy_source": str(measured.on_target.source),
        "saturation": str(measured.on_target.saturation),
        **({SIMULATED_TAG: "true"} if qconfig.simulated else {}),
        **{f"saturates.{one.name}": " ".join(sorted(one.here)) or "none" for one in int8_kernels.elsewhere(config)},
    }
    numbers = {
        **run_metrics.accuracy_metrics(predictions["fp32"], predictions["int8"]),
        **run_metrics.runtime_metrics(
            predictions["fp32"], int8, measured.saved.reference_variant(Precision.int8).runtime
        ),
        **run_metrics.target_metrics(predictions["fp32"], measured.on_target, margin),
        **run_metrics.latency_metrics(measured.timings, measured.headline),
        **run_metrics.size_metrics(measured.saved.float_bytes, measured.saved.artifacts, measured.headline),
        **run_metrics.compile_metrics(measured.saved.artifacts),
        **run_metrics.layer_metrics(layers),
        **run_metrics.runtime_layer_metrics(measured.runtime_layers),
        Metric.layers_narrowed: float(len(reduced)),
        Metric.fusion_difference: measured.fusion_difference,
        Metric.calibration_images: float(measured.calibration.images),
        Metric.calibration_seconds: measured.calibration.seconds,
        Metric.lock_wait_share: measured.lock_wait_share,
    }
    files = run_files.write_files(
        folder,
        config,
        predictions,
        measured.int8.qparams,
        measured.int8.ranges_taken,
        measured.timings,
        measured.latency_from,
        measured.saved.artifacts,
    )
    top1_file = run_files.write_top1(folder, top1(data, predictions["fp32"], int8, same, measured.on_target))
    layer_files = run_files.write_layers(
        folder, config, layers, measured.layer_errors, measured.on_target.layers, reduced
    )
    data_tags = run_files.data_tags(config, data, measured.calibration.digest)
    return Result(
        metrics=numbers,
        resolved={"resolved.runtime": measured.headline.runtime} | resolved_params(qconfig, config, reduced),
        tags={**provenance, **data_tags, **outcome, **run_files.float_tags(fp32)},
        verdict=run_metrics.verdict(predictions["fp32"], measured.on_target, margin, qconfig.overflow),
        warnings=(
            *warnings.general_warnings(config, data, layers, {**numbers, **outcome}),
            *warnings.parting_warnings(config, qconfig.overflow, layers, measured.parted),
            *warnings.runtime_layer_warnings(layers, measured.runtime_layers),
            *warnings.saturation_warnings(
                config,
                qconfig.overflow,
                layers,
                reduced,
                measured.on_target,
                int8_kernels.of(config, measured.headline.runtime),
            ),
            *warnings.slow_kernel_warnings(config, slow_kernels(config, measured.int8.module)),
        ),
        files={**files, **top1_file, **layer_files},
        datasets=run_files.datasets_used(config, data, measured.calibration.images),
        flavor=run_files.flavor(data, measured.saved.artifacts),
    )
