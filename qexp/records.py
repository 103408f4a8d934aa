"""The plain values that packages, processes and the tracking store hand to each other. No torch, no mlflow."""

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


PRECISIONS = tuple(Precision)
# As tables list them.
RUNTIMES = ("eager", "eager_channels_last", "torchscript", "inductor", CUDA)


@dataclass(frozen=True)
class Result:
    """What a job gives back: numbers, and paths of what it wrote into its folder.

    metrics: by the names of `Metric`; resolved: what was executed where it differs from what was asked; tags: by name;
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
class RunRecord:
    """A run as it is read back from the store, or as it will be.

    status: MLflow's, RUNNING, FINISHED, FAILED or KILLED; start, end: in seconds since 1970, end None while it runs;
    params: every setting that the result depends on, the groups' choices, and what was executed as `resolved.*`;
    metrics: by the names of `Metric`.
    """

    run_id: str
    name: str
    status: str
    start: float = 0.0
    end: float | None = None
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
