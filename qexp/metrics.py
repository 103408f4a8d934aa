"""From predictions, timings, layers and files to the numbers that are logged, and to what one must know of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qexp import latency, stats
from qexp.config import Config, Flow, Overflow, QConfig, Target
from qexp.data import Data
from qexp.quantize import saturation
from qexp.results import Artifact, Layer, Predictions


def of_accuracy(fp32: Predictions, int8: Predictions) -> dict[str, float]:
    """Both accuracies on the same images, and their paired difference with what is known of it."""
    fp32_only, int8_only, n = stats.discordant(fp32, int8)
    delta = stats.tango(fp32_only, int8_only, n)
    return {
        "accuracy/fp32": float(fp32.correct.mean()),
        "accuracy/int8": float(int8.correct.mean()),
        "accuracy/delta": delta.value,
        "accuracy/delta_low": delta.low,
        "accuracy/delta_high": delta.high,
        "accuracy/mcnemar_p": stats.mcnemar(fp32_only, int8_only),
        "accuracy/agreement": stats.agreement(fp32, int8),
    }


def of_latency(timings: list[latency.Timing]) -> dict[str, float]:
    """p50, p90 and p99 of each variant at the first batch size and number of threads, and fastest over fastest."""
    first = [timing for timing in headline(timings) if timing.control_of is None]
    if not first:
        return {}
    metrics: dict[str, float] = {}
    for timing in first:
        summary = timing.summary
        metrics[f"latency/{timing.variant}_ms"] = summary.p50
        metrics[f"latency/{timing.variant}_p90_ms"] = summary.p90
        if summary.p99 is not None:
            metrics[f"latency/{timing.variant}_p99_ms"] = summary.p99
    fp32, int8 = fastest(first)
    ratio = latency.speedup(fp32, int8)
    return metrics | {
        "latency/fp32_ms": fp32.summary.p50,
        "latency/int8_ms": int8.summary.p50,
        "latency/speedup": ratio.value,
        "latency/speedup_low": ratio.low,
        "latency/speedup_high": ratio.high,
    }


def headline(timings: list[latency.Timing]) -> list[latency.Timing]:
    """The timings at the first batch size and the first number of threads: those that metrics hold."""
    return [t for t in timings if (t.batch_size, t.threads) == (timings[0].batch_size, timings[0].threads)]


def fastest(timings: list[latency.Timing]) -> tuple[latency.Timing, latency.Timing]:
    """The fastest FP32 and the fastest INT8 variant on the CPU."""
    on_cpu = [t for t in timings if t.control_of is None and t.variant != "fp32_cuda"]
    by = {precision: [t for t in on_cpu if t.variant.startswith(precision)] for precision in ("fp32", "int8")}
    return latency.fastest(by["fp32"]), latency.fastest(by["int8"])


def latency_tags(timings: list[latency.Timing]) -> dict[str, str]:
    """Which variants the speedup compares, and whether the measurement can be trusted, with every reason if not."""
    if not timings:
        return {}
    first = headline(timings)
    fp32, int8 = fastest(first)
    valid, reasons = latency.validity(first)
    return {
        "fastest.fp32": fp32.variant.removeprefix("fp32_"),
        "fastest.int8": int8.variant.removeprefix("int8_"),
        "latency_valid": str(valid).lower(),
        **({} if valid else {"latency_reason": "; ".join(reasons)}),
    }


def of_size(artifacts: list[Artifact]) -> dict[str, float]:
    """Megabytes of the first artifact of each precision."""
    fp32, int8 = (next(a.bytes for a in artifacts if a.precision == precision) for precision in ("fp32", "int8"))
    return {"size/fp32_mb": fp32 / 1e6, "size/int8_mb": int8 / 1e6, "size/ratio": fp32 / int8}


def of_layers(layers: tuple[Layer, ...]) -> dict[str, float]:
    weighted = [layer for layer in layers if layer.kind != "batchnorm"]
    return {
        "quant/layers_int8": float(sum(layer.int8 for layer in weighted)),
        "quant/layers_float": float(sum(not layer.int8 for layer in weighted)),
        "quant/batchnorm_left": float(len(layers) - len(weighted)),
    }


def doubts(
    config: Config, qconfig: QConfig, data: Data, layers: tuple[Layer, ...], found: Mapping[str, Any]
) -> Iterator[str]:
    """What the reader of the table must know, a sentence each."""
    if config.dataset["_target_"] == "qexp.datasets.digits":
        yield f"digits, with {len(data.test)} images of 8x8 pixels, is for trying the tool and not for deciding."
    unguarded = qconfig.overflow is Overflow.none and min(qconfig.weight.bits, qconfig.activation.bits) == 8
    if unguarded and saturation.can_saturate(qconfig, config.engine, config.flow, Target.native, saturation.probe()):
        yield (
            f"16-bit sums can saturate in the kernels of engine={config.engine}, and the guard is off: this accuracy "
            "holds for this CPU only; qconfig.overflow=auto avoids it."
        )
    if found.get("latency_valid") == "false":
        yield "the timing can't be trusted (the tag latency_reason says why): repeat it on a quiet machine."
    low, high = found.get("latency/speedup_low"), found.get("latency/speedup_high")
    if low is not None and high is not None:
        if high < 1:
            yield f"INT8 is slower than FP32 with flow={config.flow} engine={config.engine} on this CPU."
        elif low <= 1:
            yield "INT8 and FP32 are as fast as each other, as far as the noise lets one tell."
    left = [layer for layer in layers if not layer.int8 and layer.kind != "batchnorm"]
    if left:
        reasons = ", ".join(dict.fromkeys(layer.reason for layer in left if layer.reason))
        named = ", ".join(layer.name for layer in left[:3]) + (", ..." if len(left) > 3 else "")
        yield f"{len(left)} layers stay in FP32 ({named}){f': {reasons}' if reasons else ''}."
    norms = sum(layer.kind == "batchnorm" for layer in layers)
    if norms and config.flow is not Flow.dynamic:
        yield f"{norms} BatchNorms were not folded into a convolution."
