"""The metrics that a run logs, computed from predictions, timings, layers and files."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np

from qexp import statistics
from qexp.accuracy import target_cpu
from qexp.accuracy.target_cpu import TargetAccuracy
from qexp.config.schema import Config, Overflow
from qexp.latency import protocol
from qexp.metrics import Metric
from qexp.records import Artifact, Interval, Layer, Precision, Predictions, Variant, Verdict


def accuracy_metrics(fp32: Predictions, int8: Predictions) -> dict[str, float]:
    """Both accuracies on the same images, and their paired difference with its interval and tests."""
    fp32_only, int8_only, n = statistics.discordant(fp32, int8)
    delta = statistics.tango(fp32_only, int8_only, n)
    fp32_accuracy, int8_accuracy = (statistics.wilson(int(found.correct.sum()), n) for found in (fp32, int8))
    sqnr = statistics.sqnr(fp32.logits, int8.logits)
    return {
        Metric.accuracy_fp32: fp32_accuracy.value,
        Metric.fp32_low: fp32_accuracy.low,
        Metric.fp32_high: fp32_accuracy.high,
        Metric.accuracy_int8: int8_accuracy.value,
        Metric.int8_low: int8_accuracy.low,
        Metric.int8_high: int8_accuracy.high,
        Metric.accuracy_delta: delta.value,
        Metric.delta_low: delta.low,
        Metric.delta_high: delta.high,
        Metric.mcnemar_p: statistics.mcnemar(fp32_only, int8_only),
        Metric.agreement: statistics.agreement(fp32, int8),
        Metric.detectable: statistics.detectable(fp32_only, int8_only, n),
        Metric.kl: statistics.kl_divergence(fp32, int8),
        **({Metric.sqnr: sqnr} if math.isfinite(sqnr) else {}),
    }


def runtime_metrics(fp32: Predictions, int8: Mapping[str, Predictions], reference: str) -> dict[str, float]:
    """INT8 accuracy in each runtime, the images that only it or only FP32 has right, and the share of images with the
    same prediction as in the reference runtime."""
    numbers: dict[str, float] = {Metric.images: float(len(fp32.labels))}
    for runtime, found in int8.items():
        fp32_only, int8_only, _ = statistics.discordant(fp32, found)
        numbers |= {
            Metric.runtime_accuracy.of(runtime): float(found.correct.mean()),
            Metric.runtime_agreement.of(runtime): statistics.agreement(int8[reference], found),
            Metric.fp32_only.of(runtime): float(fp32_only),
            Metric.int8_only.of(runtime): float(int8_only),
        }
    return numbers


def same_runtimes(int8: Mapping[str, Predictions]) -> tuple[tuple[str, ...], ...]:
    """The runtimes in groups whose logits are equal bit for bit, in the order given."""
    groups: list[list[str]] = []
    for runtime, found in int8.items():
        alike = [group for group in groups if np.array_equal(int8[group[0]].logits, found.logits)]
        if alike:
            alike[0].append(runtime)
        else:
            groups.append([runtime])
    return tuple(map(tuple, groups))


def target_metrics(fp32: Predictions, on_target: TargetAccuracy, margin: float) -> dict[str, float]:
    """INT8 accuracy on the target CPU, and the accuracy that 16-bit accumulators cost."""
    first_only, second_only, n = statistics.discordant(fp32.at(on_target.images), on_target.predictions)
    delta = statistics.tango(first_only, second_only, n)
    found: dict[str, float] = {
        Metric.target_accuracy: float(on_target.predictions.correct.mean()),
        Metric.target_delta: delta.value,
        Metric.target_delta_low: delta.low,
        Metric.target_delta_high: delta.high,
        Metric.target_images: float(n),
        Metric.target_fp32_only: float(first_only),
        Metric.target_int8_only: float(second_only),
        Metric.non_inferiority_p: statistics.non_inferiority(first_only, second_only, n, margin),
        Metric.saturation_layers: float(len(on_target.saturating_layers)),
    }
    loss = _lost_to_saturation(on_target)
    if loss is None or on_target.exact is None or on_target.saturating is None:
        return found
    found |= {
        Metric.exact_accuracy: float(on_target.exact.correct.mean()),
        Metric.exact_images: float(len(on_target.exact.labels)),
    }
    if not on_target.saturating_layers:
        # Nothing saturated, so the two differ only by how libraries round.
        return found
    sqnr = statistics.sqnr(on_target.exact.logits, on_target.saturating.logits)
    return found | {
        Metric.saturation_loss: loss.value,
        Metric.saturation_loss_low: loss.low,
        Metric.saturation_loss_high: loss.high,
        Metric.saturation_agreement: statistics.agreement(on_target.exact, on_target.saturating),
        **({Metric.saturation_sqnr: sqnr} if math.isfinite(sqnr) else {}),
    }


def _lost_to_saturation(on_target: TargetAccuracy) -> Interval | None:
    """Accuracy with exact minus with saturating accumulators, paired by image; None where they were not compared."""
    if on_target.exact is None or on_target.saturating is None:
        return None
    return statistics.tango(*statistics.discordant(on_target.saturating, on_target.exact))


def verdict(fp32: Predictions, on_target: TargetAccuracy, margin: float, guard: Overflow = Overflow.none) -> Verdict:
    """The verdict on the target's accuracy, with 16-bit saturation as a cause where that is shown.

    guard: the one executed, not auto.
    """
    first_only, second_only, n = statistics.discordant(fp32.at(on_target.images), on_target.predictions)
    found = statistics.verdict(first_only, second_only, n, margin)
    lost = _lost_to_saturation(on_target)
    if lost is None or on_target.exact is None or on_target.target_is_exact or lost.low <= 0:
        return found
    rest = statistics.tango(*statistics.discordant(fp32.at(on_target.compared), on_target.exact))
    return replace(
        found,
        lost=(first_only - second_only) / n,
        lost_to_saturation=lost.value,
        saturation_only=rest.high >= 0,
        remedy=recommended_guard(guard),
    )


def recommended_guard(guard: Overflow) -> str:
    """The setting to recommend where saturation costs accuracy in spite of this guard.

    Without a guard: auto. All others but `weights` depend on calibration images, which evaluation images can exceed.
    """
    return f"qconfig.overflow={Overflow.auto if guard is Overflow.none else Overflow.weights}"


def latency_metrics(timings: list[protocol.Timing], headline: Variant) -> dict[str, float]:
    """p50, p90 and p99 of each variant at the first batch size and number of threads, and the speedup of INT8 over the
    fastest FP32 variant in each runtime, the headline's among them."""
    first = [timing for timing in side_by_side(timings) if not timing.control]
    if not first:
        return {}
    metrics: dict[str, float] = {}
    for timing in first:
        summary = timing.summary
        metrics[Metric.runtime_latency.of(timing.variant)] = summary.p50
        metrics[Metric.runtime_latency_p90.of(timing.variant)] = summary.p90
        if summary.p99 is not None:
            metrics[Metric.runtime_latency_p99.of(timing.variant)] = summary.p99
    fp32 = fastest(first, Precision.fp32)
    for int8 in first:
        if int8.variant.precision is Precision.int8:
            ratio, runtime = protocol.speedup(fp32, int8), int8.variant.runtime
            metrics[Metric.runtime_speedup.of(runtime)] = ratio.value
            metrics[Metric.runtime_speedup_low.of(runtime)] = ratio.low
            metrics[Metric.runtime_speedup_high.of(runtime)] = ratio.high
    return metrics | {
        Metric.latency_fp32: fp32.summary.p50,
        Metric.latency_int8: metrics[Metric.runtime_latency.of(headline)],
        Metric.speedup: metrics[Metric.runtime_speedup.of(headline.runtime)],
        Metric.speedup_low: metrics[Metric.runtime_speedup_low.of(headline.runtime)],
        Metric.speedup_high: metrics[Metric.runtime_speedup_high.of(headline.runtime)],
    }


def side_by_side(timings: list[protocol.Timing]) -> list[protocol.Timing]:
    """The timings at the first batch size and the first number of threads, which are logged as metrics."""
    return [t for t in timings if (t.batch_size, t.threads) == (timings[0].batch_size, timings[0].threads)]


def fastest(timings: list[protocol.Timing], precision: Precision) -> protocol.Timing:
    """The timing of the fastest variant of a precision on the CPU."""
    of_models = [timing for timing in timings if not timing.control and timing.variant.on_cpu]
    return protocol.fastest([timing for timing in of_models if timing.variant.precision is precision])


def headline_variant(
    config: Config, variants: list[Variant], timings: list[protocol.Timing], parted: Collection[str] = ()
) -> Variant:
    """The INT8 variant that the headline metrics and the verdict are about: the fastest where the timings can be
    trusted, else the first.

    variants: of INT8, in the order asked for; parted: the runtimes whose logits have parted from torch's, which are
    taken only if all have.
    """
    whole = [variant for variant in variants if variant.runtime not in parted] or variants
    if not timings or reasons_against(config, timings):
        return whole[0]
    return fastest([timing for timing in side_by_side(timings) if timing.variant in whole], Precision.int8).variant


def reasons_against(config: Config, timings: list[protocol.Timing]) -> tuple[str, ...]:
    """The reasons why the logged timings can't be trusted, or don't hold for the target; empty where there are none."""
    return next(iter(reasons_by_conditions(config, timings).values()))


def reasons_by_conditions(config: Config, timings: list[protocol.Timing]) -> dict[tuple[int, int], tuple[str, ...]]:
    """As `reasons_against`, by batch size and number of threads."""
    other_kernels = target_cpu.other_kernels(config)
    measurements: dict[tuple[int, int], list[protocol.Timing]] = {}
    for timing in timings:
        measurements.setdefault((timing.batch_size, timing.threads), []).append(timing)
    found = {conditions: protocol.validity(measured)[1] for conditions, measured in measurements.items()}
    return {conditions: (*reasons, *[other_kernels] * bool(other_kernels)) for conditions, reasons in found.items()}


def latency_tags(config: Config, timings: list[protocol.Timing]) -> dict[str, str]:
    """Tags: the FP32 variant that the speedup compares with, and whether the timings can be trusted, with every reason
    if not."""
    if not timings:
        return {}
    reasons = reasons_against(config, timings)
    return {
        "fastest.fp32": fastest(side_by_side(timings), Precision.fp32).variant.runtime,
        "latency_valid": str(not reasons).lower(),
        **({"latency_reason": "; ".join(reasons)} if reasons else {}),
    }


def size_metrics(float_bytes: int, artifacts: list[Artifact], headline: Variant) -> dict[str, float]:
    """Megabytes of the float model as its owner would ship it, and of the INT8 model as saved for the headline's
    runtime."""
    int8 = next(artifact.bytes for artifact in artifacts if artifact.variant == headline)
    return {Metric.size_fp32: float_bytes / 1e6, Metric.size_int8: int8 / 1e6, Metric.size_ratio: float_bytes / int8}


def compile_metrics(artifacts: list[Artifact]) -> dict[str, float]:
    """The seconds that the files of variants took to compile, as far as they are compiled."""
    of = Metric.runtime_compile.of
    return {of(one.variant): one.compile_seconds for one in artifacts if one.compile_seconds is not None}


def layer_metrics(layers: tuple[Layer, ...]) -> dict[str, float]:
    """The numbers of layers in INT8 and in FP32, and of BatchNorms that were not folded."""
    weighted = [layer for layer in layers if layer.kind != "batchnorm"]
    return {
        Metric.layers_int8: float(sum(layer.int8 for layer in weighted)),
        Metric.layers_float: float(sum(not layer.int8 for layer in weighted)),
        Metric.batchnorm_left: float(len(layers) - len(weighted)),
    }


def runtime_layer_metrics(layers: Mapping[str, tuple[int, int]]) -> dict[str, float]:
    """The numbers of layers that each runtime executes in INT8 and in FP32, by its own account."""
    numbers: dict[str, float] = {}
    for runtime, (int8, in_float) in layers.items():
        numbers |= {
            Metric.runtime_layers_int8.of(runtime): float(int8),
            Metric.runtime_layers_float.of(runtime): float(in_float),
        }
    return numbers
