"""The metrics of a run: the name that each is logged under, its unit, digits, heading and meaning.

All other modules refer to a metric by its member of `Metric`; names are spelled only here. MLflow's charts have a
section for each prefix, in this order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from functools import cache
from typing import Self

# Unit, which direction is better, and digits.
_FRACTION, _LOSS = ("fraction", "higher", 4), ("fraction", "lower", 4)
_MS, _RATIO, _MB, _DB = ("ms", "lower", 2), ("×", "higher", 2), ("MB", "lower", 2), ("dB", "higher", 1)
_IMAGES, _LAYERS, _BAD_LAYERS = ("images", "", 0), ("layers", "", 0), ("layers", "lower", 0)
_P = "", "", 4


class Metric(StrEnum):
    """The name of a metric, which is a str and can be used as one.

    unit; better: `higher`, `lower` or neither; digits: shown after the decimal point; meaning: in a sentence; heading:
    in tables.

    A name with a part in angle brackets stands for several, one for each runtime or variant: see `of` and `within`.
    """

    unit: str
    better: str
    digits: int
    meaning: str
    heading: str

    def __new__(cls, name: str, unit: str, better: str, digits: int, meaning: str, heading: str = "") -> Self:
        member = str.__new__(cls, name)
        member._value_ = name
        member.unit, member.better, member.digits = unit, better, digits
        member.meaning, member.heading = meaning, heading
        return member

    accuracy_fp32 = "accuracy/fp32", *_FRACTION, "top-1 accuracy of the float model", "FP32"
    accuracy_int8 = "accuracy/int8", *_FRACTION, "top-1 accuracy of the INT8 model, same images", "INT8"
    accuracy_delta = "accuracy/delta", *_FRACTION, "INT8 minus FP32 accuracy", "points"

    latency_fp32 = "latency/fp32_ms", *_MS, "p50 of the fastest FP32 variant"
    latency_int8 = "latency/int8_ms", *_MS, "p50 of INT8 in the runtime that resolved.runtime names", "latency"
    speedup = "latency/speedup", *_RATIO, "fastest FP32 over that INT8", "speedup"

    size_fp32 = "size/fp32_mb", *_MB, "float model's own state_dict, 10^6 bytes"
    size_int8 = "size/int8_mb", *_MB, "INT8 model as saved for that runtime, 10^6 bytes", "size"
    size_ratio = "size/ratio", *_RATIO, "FP32 over INT8 size"

    delta_low = "uncertainty/delta_low", *_FRACTION, "95% interval of the delta, paired by image (Tango)"
    delta_high = "uncertainty/delta_high", *_FRACTION, "upper end of that interval"
    fp32_low = "uncertainty/fp32_low", *_FRACTION, "95% interval of the FP32 accuracy (Wilson)"
    fp32_high = "uncertainty/fp32_high", *_FRACTION, "upper end of that interval"
    int8_low = "uncertainty/int8_low", *_FRACTION, "95% interval of the INT8 accuracy (Wilson)"
    int8_high = "uncertainty/int8_high", *_FRACTION, "upper end of that interval"
    speedup_low = "uncertainty/speedup_low", *_RATIO, "95% interval of the speedup (bootstrap of rounds)"
    speedup_high = "uncertainty/speedup_high", *_RATIO, "upper end of that interval"
    mcnemar_p = "uncertainty/mcnemar_p", *_P, "exact McNemar p-value of the delta"
    non_inferiority_p = (
        "uncertainty/non_inferiority_p",
        *_P,
        "p-value of a loss of the margin on the target (Tango)",
    )
    detectable = "uncertainty/detectable", *_LOSS, "smallest delta that these images show in 4 of 5 cases"

    agreement = "fidelity/agreement", *_FRACTION, "share of images with the same prediction as FP32"
    kl = "fidelity/kl", "nats", "lower", 5, "mean Kullback-Leibler divergence of the predicted distributions"
    sqnr = "fidelity/sqnr_db", *_DB, "FP32 logits over the INT8 logits' difference to them"

    runtime_accuracy = "runtime_accuracy/<runtime>", *_FRACTION, "INT8 accuracy in this runtime"
    runtime_agreement = "runtime_agreement/<runtime>", *_FRACTION, "share of images with the reference's prediction"
    runtime_speedup = "runtime_speedup/<runtime>", *_RATIO, "fastest FP32 over INT8 in this runtime", "speedup"
    runtime_speedup_low = "runtime_speedup/<runtime>_low", *_RATIO, "95% interval of it (bootstrap of rounds)"
    runtime_speedup_high = "runtime_speedup/<runtime>_high", *_RATIO, "upper end of that interval"
    runtime_layers_int8 = "runtime_layers/<runtime>_int8", *_LAYERS, "layers that this runtime says it executes in INT8"
    runtime_layers_float = "runtime_layers/<runtime>_float", *_BAD_LAYERS, "layers that it says it executes in FP32"
    runtime_latency = "runtime_latency/<variant>_ms", *_MS, "p50 of this variant", "latency"
    runtime_latency_p90 = "runtime_latency/<variant>_p90_ms", *_MS, "p90 of this variant"
    runtime_latency_p99 = "runtime_latency/<variant>_p99_ms", *_MS, "p99 of this variant"

    runtime_compile = "runtime_compile/<variant>_s", "s", "lower", 1, "time that its file once took to compile"

    images = "discordant/images", *_IMAGES, "evaluation images"
    fp32_only = "discordant/<runtime>_fp32_only", *_IMAGES, "images that FP32 alone has right, INT8 in this runtime not"
    int8_only = "discordant/<runtime>_int8_only", *_IMAGES, "images that INT8 in this runtime alone has right"

    race_images = "racing/images", *_IMAGES, "images that a run had seen when racing stopped it"
    race_all_images = "racing/all_images", *_IMAGES, "images that it would have seen"
    race_fp32_only = "racing/<runtime>_fp32_only", *_IMAGES, "of those seen, images that FP32 alone has right"
    race_int8_only = "racing/<runtime>_int8_only", *_IMAGES, "of those seen, images that INT8 alone has right"

    target_accuracy = "target/accuracy", *_FRACTION, "INT8 accuracy on the CPU that `target` means"
    target_delta = "target/delta", *_FRACTION, "target's accuracy minus FP32's on the same images"
    target_delta_low = "target/delta_low", *_FRACTION, "95% interval of it, paired by image (Tango)"
    target_delta_high = "target/delta_high", *_FRACTION, "upper end of that interval"
    target_images = "target/images", *_IMAGES, "images that the target's accuracy was measured on"
    target_fp32_only = "target/fp32_only", *_IMAGES, "of these, those that FP32 alone has right"
    target_int8_only = "target/int8_only", *_IMAGES, "of these, those that INT8 alone has right on the target"

    exact_accuracy = "saturation/exact_accuracy", *_FRACTION, "INT8 accuracy with sums that don't saturate"
    exact_images = "saturation/exact_images", *_IMAGES, "images that it was measured on"
    saturation_loss = "saturation/loss", *_LOSS, "exact minus saturating accuracy on the same images"
    saturation_loss_low = "saturation/loss_low", *_LOSS, "95% interval of it, paired by image (Tango)"
    saturation_loss_high = "saturation/loss_high", *_LOSS, "upper end of that interval"
    saturation_agreement = "saturation/agreement", *_FRACTION, "share of images with the same prediction with both sums"
    saturation_sqnr = "saturation/sqnr_db", *_DB, "exact logits over the saturating ones' difference to them"
    saturation_layers = "saturation/layers", *_BAD_LAYERS, "layers in which 16-bit sums were seen to saturate"

    layers_int8 = "quant/layers_int8", *_LAYERS, "layers executed in INT8", "INT8 layers"
    layers_float = "quant/layers_float", *_LAYERS, "layers left in FP32"
    layers_narrowed = "quant/layers_narrowed", *_LAYERS, "layers that overflow=layers gave 7 bits on one side"
    batchnorm_left = "quant/batchnorm_left", *_BAD_LAYERS, "BatchNorms that were not folded into a convolution"
    fusion_difference = "quant/fusion_difference", "", "lower", 8, "fused against float model, of the largest logit"

    calibration_images = "calib/images", *_IMAGES, "images that calibration saw"
    calibration_seconds = "calib/seconds", "s", "lower", 2, "time that calibration took; images seen before cost none"

    lock_wait_share = "machine/lock_wait_share", *_LOSS, "share of the run's time that it waited for the machine's lock"

    jobs = "jobs/<status>", "jobs", "", 0, "of a sweep's own run: jobs that ended so"

    def of(self, which: object) -> str:
        """The name of a metric for one runtime, variant or status: `runtime_latency/int8_eager_ms`."""
        return _PLACE.sub(str(which), self.value)

    def within(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The values of this metric among a run's metrics, by runtime, variant or status."""
        before, after = _PLACE.split(self.value)
        return {
            name[len(before) : len(name) - len(after)]: value
            for name, value in metrics.items()
            if described(name) is self
        }

    def text(self, value: float) -> str:
        """The value as text, without its unit: `0.8502`, `4.90`; a small one, such as 0.034 ms, with one digit more."""
        small = self.digits and 0 < abs(value) < 10 ** (1 - self.digits)
        return f"{value:.{self.digits + bool(small)}f}"


_PLACE = re.compile(r"<\w+>")
# The longest first, since p90 is no variant.
_PATTERNS = {re.compile(_PLACE.sub(".+", metric.value)): metric for metric in sorted(Metric, key=len, reverse=True)}


@cache
def described(name: str) -> Metric | None:
    """The entry for a metric of this name; None where there is none."""
    return next((metric for pattern, metric in _PATTERNS.items() if pattern.fullmatch(name)), None)
