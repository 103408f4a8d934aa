"""The records that leave a process, and METRICS: what each logged number is called and means. No torch, no mlflow."""

from __future__ import annotations

from dataclasses import dataclass

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
class Artifact:
    """What was saved of one precision for one runtime."""

    precision: str
    runtime: str
    path: str
    sha256: str
    bytes: int
    engine: str


@dataclass(frozen=True, eq=False)
class Predictions:
    """logits: float32 [N, classes]; labels: int64 [N]; image_ids: N names, in the order of the logits."""

    logits: np.ndarray
    labels: np.ndarray
    image_ids: tuple[str, ...]

    @property
    def correct(self) -> np.ndarray:
        """bool [N]: whether the top-1 class is the label."""
        return self.logits.argmax(axis=1) == self.labels
