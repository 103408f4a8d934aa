"""The records that leave a process, and METRICS: what each logged number is called and means. No torch, no mlflow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A value with its confidence interval, all three in the same unit."""

    value: float
    low: float
    high: float
    confidence: float
    method: str


@dataclass(frozen=True, eq=False)
class QParams:
    """Quantization parameters of one tensor: q = clamp(round(x / scale) + zero_point, qmin, qmax).

    scale: float32 [1], or [C] along `axis`; zero_point: int64 of the same shape; axis: None where per tensor.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    qmin: int
    qmax: int
    axis: int | None = None


@dataclass(frozen=True)
class Layer:
    """One layer of the converted model that holds weights (or a BatchNorm), and whether it runs in INT8."""

    name: str
    kind: str
    int8: bool
    reason: str = ""
    kernel: str = ""


@dataclass(frozen=True)
class Fidelity:
    """How well one layer of an INT8 model gives what it gives in the float model.

    name: the layer's in the user's model, or of the tensor in the QParams. kind: as in `layers` (conv, depthwise,
    grouped, pointwise, linear, …), or the operation (add, mul, …, quantize for what enters the INT8 part).

    A signal to noise ratio (SQNR) is 10 log10(Σ x² / Σ (x − y)²) in dB over all values x of the float model, with y in
    their place; infinite where they are equal. 6 dB are one bit.

    sqnr_db: y is the layer's output inside the whole INT8 model, the errors of all layers before it included.
    own_sqnr_db: y is the INT8 layer's answer to the float model's input, quantized as the INT8 model does it. The noise
        of that rounding, of the weights, of the output's grid (clipping too) and of the kernel's sums is in it, and no
        other layer's. None where the layer's inputs in the two models don't correspond.
    weight_sqnr_db: of the weights that the INT8 layer holds; None where it holds none.
    clipped: share of the float values that lie more than one step outside what the codes can say, (0 − zero point) ×
        scale to (highest − zero point) × scale, and that are therefore moved to one of these ends. Up to a step it is a
        matter of rounding: of 1.0 on sigmoid's fixed grid, whose highest value is 255/256. highest is 255, or that of
        the bits asked for; a grid that a guard narrowed to 7 bits goes on to 255 (see grid.Grid).
    scale: one step of the output's grid.
    """

    name: str
    kind: str
    sqnr_db: float
    own_sqnr_db: float | None
    weight_sqnr_db: float | None
    clipped: float
    scale: float


class Precision(StrEnum):
    fp32 = "fp32"
    int8 = "int8"


CUDA = "cuda"
"""The runtime of the float model on a GPU, which is timed beside the others where there is one."""


@dataclass(frozen=True)
class Variant:
    """A model of one precision as one runtime executes it. str() is its name in files and metrics: fp32_eager."""

    precision: Precision
    runtime: str

    def __str__(self) -> str:
        return f"{self.precision}_{self.runtime}"

    @property
    def on_cpu(self) -> bool:
        return self.runtime != CUDA


@dataclass(frozen=True)
class Artifact:
    """What was saved of one variant. engine: what an INT8 model was converted for, empty for FP32."""

    variant: Variant
    path: str
    sha256: str
    bytes: int
    engine: str


@dataclass(frozen=True, eq=False)
class Predictions:
    """logits: float32 [N, classes]; labels: int64 [N]; image_ids: N names, in the order of the logits.

    Raises ValueError for a logit that is NaN or infinite: the largest of several is no class then.
    """

    logits: np.ndarray
    labels: np.ndarray
    image_ids: tuple[str, ...]

    def __post_init__(self) -> None:
        if not np.isfinite(self.logits).all():
            raise ValueError("logits are NaN or infinite")

    def at(self, indices: np.ndarray) -> Predictions:
        """Those of some of the images; indices: int64."""
        ids = tuple(self.image_ids[index] for index in indices)
        return Predictions(self.logits[indices], self.labels[indices], ids)

    @property
    def correct(self) -> np.ndarray:
        """bool [N]: whether the top-1 class is the label."""
        return self.logits.argmax(axis=1) == self.labels


class Source(StrEnum):
    """How the answer for the target was found."""

    executed = "executed"
    exact = "exact"
    emulated = "emulated"


class Saturation(StrEnum):
    """Whether 16-bit sums saturate in this model."""

    impossible = "impossible"
    possible = "possible"
    observed = "observed"


@dataclass(frozen=True)
class Metric:
    """How a logged number reads: its unit, which direction is better (`higher`, `lower` or neither), its digits."""

    unit: str
    better: str
    digits: int
    meaning: str


PRECISIONS = tuple(Precision)
VARIANTS = ("eager", "eager_channels_last", "torchscript", "inductor", CUDA)

METRICS: dict[str, Metric] = {
    "accuracy/fp32": Metric("fraction", "higher", 4, "top-1 accuracy of the float model on the evaluation set"),
    "accuracy/int8": Metric("fraction", "higher", 4, "top-1 accuracy of the INT8 model on the same images"),
    "accuracy/delta": Metric("fraction", "higher", 4, "INT8 minus FP32 accuracy"),
    "accuracy/delta_low": Metric("fraction", "higher", 4, "lower end of its 95% interval, paired by image (Tango)"),
    "accuracy/delta_high": Metric("fraction", "higher", 4, "upper end of its 95% interval"),
    **{
        f"accuracy/{precision}_{end}": Metric(
            "fraction", "higher", 4, f"{'lower' if end == 'low' else 'upper'} end of the 95% interval (Wilson)"
        )
        for precision in PRECISIONS
        for end in ("low", "high")
    },
    "accuracy/mcnemar_p": Metric("", "", 4, "exact McNemar p-value of the difference"),
    "accuracy/agreement": Metric("fraction", "higher", 4, "share of images with the same prediction"),
    "accuracy/non_inferiority_p": Metric("", "lower", 4, "p-value of a loss of the margin or more (Tango, one-sided)"),
    "accuracy/detectable": Metric("fraction", "lower", 4, "smallest difference that these images show in 4 of 5 cases"),
    "accuracy/kl": Metric("nats", "lower", 5, "mean Kullback-Leibler divergence of the predicted distributions"),
    "accuracy/sqnr_db": Metric("dB", "higher", 1, "FP32 logits over the INT8 logits' difference to them"),
    "accuracy/int8_target": Metric("fraction", "higher", 4, "INT8 accuracy on the CPU that `target` means"),
    "accuracy/delta_target": Metric("fraction", "higher", 4, "int8_target minus FP32 on the same images"),
    "accuracy/delta_target_low": Metric("fraction", "higher", 4, "lower end of its 95% interval, paired by image"),
    "accuracy/delta_target_high": Metric("fraction", "higher", 4, "upper end of its 95% interval"),
    "accuracy/target_images": Metric("images", "", 0, "images that int8_target was measured on"),
    "accuracy/int8_exact": Metric("fraction", "higher", 4, "INT8 accuracy with sums that don't saturate"),
    "accuracy/exact_images": Metric("images", "", 0, "images that int8_exact was measured on"),
    "saturation/loss": Metric("fraction", "lower", 4, "exact minus saturating accuracy on the same images"),
    "saturation/loss_low": Metric("fraction", "lower", 4, "lower end of its 95% interval, paired by image (Tango)"),
    "saturation/loss_high": Metric("fraction", "lower", 4, "upper end of its 95% interval"),
    "saturation/agreement": Metric("fraction", "higher", 4, "share of images with the same prediction with both sums"),
    "saturation/sqnr_db": Metric("dB", "higher", 1, "exact logits over the saturating ones' difference to them"),
    "saturation/layers": Metric("layers", "lower", 0, "layers in which 16-bit sums were seen to saturate"),
    "latency/fp32_ms": Metric("ms", "lower", 3, "p50 of the fastest FP32 variant measured"),
    "latency/int8_ms": Metric("ms", "lower", 3, "p50 of the fastest INT8 variant measured"),
    "latency/speedup": Metric("ratio", "higher", 2, "fastest FP32 over fastest INT8"),
    "latency/speedup_low": Metric("ratio", "higher", 2, "lower end of its 95% interval"),
    "latency/speedup_high": Metric("ratio", "higher", 2, "upper end of its 95% interval"),
    **{
        f"latency/{precision}_{variant}{quantile}_ms": Metric(
            "ms", "lower", 3, f"{quantile[1:] or 'p50'} of {precision.upper()} as {variant.replace('_', ' ')}"
        )
        for precision in PRECISIONS
        for variant in VARIANTS
        for quantile in ("", "_p90", "_p99")
    },
    "size/fp32_mb": Metric("MB", "lower", 3, "float model's own state_dict, 10^6 bytes"),
    "size/int8_mb": Metric("MB", "lower", 3, "saved INT8 artifact, 10^6 bytes"),
    "size/ratio": Metric("ratio", "higher", 2, "FP32 over INT8 size"),
    "quant/layers_int8": Metric("layers", "", 0, "layers executed in INT8"),
    "quant/layers_float": Metric("layers", "", 0, "layers left in FP32"),
    "quant/layers_narrowed": Metric("layers", "", 0, "layers that overflow=layers gave 7 bits on one side"),
    "quant/batchnorm_left": Metric("layers", "lower", 0, "BatchNorms that were not folded into a convolution"),
    "quant/fusion_difference": Metric("ratio", "lower", 8, "fused against float model, of the largest logit"),
    "calib/images": Metric("images", "", 0, "images that calibration saw"),
    "calib/seconds": Metric(
        "s", "lower", 2, "time that calibration took; images that an earlier run saw are not run again"
    ),
}


@dataclass(frozen=True)
class Result:
    """What a job gives back: numbers, and paths of what it wrote into its folder.

    metrics: by the names of METRICS; resolved: what was executed where it differs from what was asked; tags: by name;
    doubts: sentences that the reader of the numbers must know; files: artifact path in the run -> path on disk;
    datasets: name, digest, source, context and profile of the images that were used; flavor: what MLflow needs to
    keep the INT8 model as one that it can serve, empty where there is no TorchScript.
    """

    metrics: dict[str, float]
    resolved: dict[str, str]
    tags: dict[str, str]
    doubts: tuple[str, ...]
    files: dict[str, str]
    datasets: tuple[dict[str, Any], ...]
    flavor: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One tracked run, as plain values; start and end in seconds since 1970, end None while it runs."""

    run_id: str
    name: str
    status: str
    start: float = 0.0
    end: float | None = None
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
