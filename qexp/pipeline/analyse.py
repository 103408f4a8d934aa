"""The stage *analyse*: errors of layers, the target's accuracy, and the Result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from qexp import quantize
from qexp.accuracy import target_cpu
from qexp.config import identity
from qexp.config.schema import (
    Config,
    Engine,
    QConfig,
    Target,
)
from qexp.data.loading import Data
from qexp.latency import protocol
from qexp.metrics import Metric
from qexp.models.float_model import FloatModel
from qexp.pipeline import run_files, run_metrics, warnings
from qexp.pipeline.prepare import Calibration, Saved, images_of
from qexp.quantize.inspection.layer_errors import at_a_time
from qexp.quantize.saturation import kernels
from qexp.quantize.torch_backend.slow_depthwise import without_fast_kernel
from qexp.records import Fidelity, Precision, Predictions, Result, Variant
from qexp.system.steps import step


def resolved_params(qconfig: QConfig, config: Config, narrowed: tuple[quantize.Narrowed, ...] = ()) -> dict[str, str]:
    """Params that say what was executed, beside those that say what was asked.

    activation_bits: of the scale; a guard's 7 leave codes up to activation_highest_code. narrowed_*: how many layers
    overflow=layers gave 7 bits, on which side.
    """
    if "qconfig.overflow" in config.flow.ignores:
        return {"resolved.weight_bits": str(qconfig.weight.bits)}
    weights, activations = quantize.Side.weights, quantize.Side.activations
    values = {
        "overflow": qconfig.overflow,
        "weight_bits": quantize.executed_bits(qconfig, weights),
        "activation_bits": quantize.executed_bits(qconfig, activations),
        "activation_highest_code": quantize.highest_activation(qconfig),
        "narrowed_weights": sum(layer.side is weights for layer in narrowed),
        "narrowed_activations": sum(layer.side is activations for layer in narrowed),
    }
    return {f"resolved.{name}": str(value) for name, value in values.items()}


def slow_kernels(config: Config, int8: nn.Module) -> tuple[str, ...]:
    """The layers for which the engine has no fast kernel on the CPU that the model ships on."""
    native = config.target is Target.native
    vnni = not kernels.probe().dense_saturates(Engine.fbgemm) if native else config.target is Target.vnni
    return without_fast_kernel(int8, config.engine, vnni)


@step("errors of layers")
def per_layer(config: Config, int8: quantize.QuantizedModel, data: Data) -> tuple[Fidelity, ...]:
    """The errors of each layer of the INT8 model against FP32, on evaluation images."""
    chosen = target_cpu.spread(len(data.test), config.per_layer.images)
    if "per_layer" in identity.without_effect(config) or not len(chosen):
        return ()
    size = at_a_time(data.test.shape)
    batches = np.split(chosen, range(size, len(chosen), size))
    images = (images_of(data, data.test.pixels(batch)) for batch in batches)
    return quantize.layer_fidelity(int8, images)


@dataclass(frozen=True)
class Measured:
    """All that a run has found. difference: of the fused from the float model; narrowed: layers that overflow=layers
    gave 7 bits; headline: the INT8 variant that the headline metrics and the verdict are of; latency_from: the run that
    the timings are of, empty where it is this one."""

    difference: float
    calibration: Calibration
    int8: quantize.QuantizedModel
    narrowed: tuple[quantize.Narrowed, ...]
    saved: Saved
    predictions: Mapping[Variant, Predictions]
    headline: Variant
    timings: list[protocol.Timing]
    latency_from: str
    fidelity: tuple[Fidelity, ...]
    answer: target_cpu.Answer


@step("result")
def result(
    config: Config,
    data: Data,
    fp32: FloatModel,
    found: Measured,
    code: Mapping[str, str],
    folder: Path,
) -> Result:
    """The numbers, sentences and files of a run. code: the tags of what it was made of; folder: for the files."""
    margin, qconfig, layers, narrowed = config.dataset["margin"], found.int8.qconfig, found.int8.layers, found.narrowed
    predictions = {"fp32": found.predictions[found.saved.first(Precision.fp32)]}
    predictions["int8"] = found.predictions[found.headline]
    measured = {
        **run_metrics.latency_tags(config, found.timings),
        **({"latency_from": found.latency_from} if found.latency_from else {}),
        "accuracy_source": str(found.answer.source),
        "saturation": str(found.answer.saturation),
    }
    numbers = {
        **run_metrics.of_accuracy(predictions["fp32"], predictions["int8"]),
        **run_metrics.of_runtimes(found.predictions, found.saved.first(Precision.int8)),
        **run_metrics.of_target(predictions["fp32"], found.answer, margin),
        **run_metrics.of_latency(found.timings, found.headline),
        **run_metrics.of_size(found.saved.float_bytes, found.saved.artifacts, found.headline),
        **run_metrics.of_layers(layers),
        Metric.layers_narrowed: float(len(narrowed)),
        Metric.fusion_difference: found.difference,
        Metric.calibration_images: float(found.calibration.images),
        Metric.calibration_seconds: found.calibration.seconds,
    }
    written = run_files.written(
        folder, config, data, predictions, found.int8.qparams, layers, found.timings, found.latency_from,
        found.saved.artifacts,
    )  # fmt: skip
    of_layers = run_files.layers_written(folder, config, layers, found.fidelity, found.answer.layers, narrowed)
    of_data = run_files.data_tags(config, data, found.calibration.digest)
    return Result(
        metrics=numbers,
        resolved={"resolved.runtime": found.headline.runtime} | resolved_params(qconfig, config, narrowed),
        tags={**code, **of_data, **measured, "float_model": fp32.source},
        verdict=run_metrics.verdict(predictions["fp32"], found.answer, margin, qconfig.overflow),
        warnings=(
            *warnings.general(config, data, layers, {**numbers, **measured}),
            *warnings.of_sums(config, qconfig.overflow, layers, narrowed, found.answer),
            *warnings.of_slow_kernels(config, slow_kernels(config, found.int8.module)),
        ),
        files={**written, **of_layers},
        datasets=run_files.datasets_used(config, data, found.calibration.images),
        flavor=run_files.flavor(config, data, found.saved.artifacts),
    )
