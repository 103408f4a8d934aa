"""Plain values that packages, processes and the tracking store pass to each other. No torch, no mlflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """The errors of one layer of an INT8 model against the float model.

    name: the layer's in the user's model, or of the tensor in the QParams. kind: as in `layers` (conv, depthwise,
    grouped, pointwise, linear, …), or the operation (add, mul, …, quantize for what enters the INT8 part).

    A signal to noise ratio (SQNR) is 10 log10(Σ x² / Σ (x − y)²) in dB over all values x of the float model, with y in
    their place; infinite where they are equal. 6 dB are one bit.

    sqnr_db: y is the layer's output inside the whole INT8 model, the errors of all layers before it included.
    own_sqnr_db: y is the INT8 layer's output for the float model's input, quantized as in the INT8 model. It includes
        the noise of that rounding, of the weights, of the output's grid (clipping too) and of the kernel's
        accumulators, and no other layer's. None where the layer's inputs in the two models don't correspond.
    weight_sqnr_db: of the weights that the INT8 layer holds; None where it holds none.
    clipped: share of the float values that lie more than one step outside the range of the codes, (0 − zero point) ×
        scale to (highest − zero point) × scale, and are therefore clipped to its ends. Up to a step it is a matter of
        rounding: such as 1.0 on sigmoid's fixed grid, whose highest value is 255/256. highest is 255, or that of the
        bits asked for; a range that a guard reduced to 7 bits goes on to 255 (see grid.Grid).
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
    """A precision of the model in one runtime. str() is its name in files and metrics: fp32_eager."""

    precision: Precision
    runtime: str

    def __str__(self) -> str:
        return f"{self.precision}_{self.runtime}"

    @property
    def on_cpu(self) -> bool:
        return self.runtime != CUDA


@dataclass(frozen=True)
class Artifact:
    """A saved variant. engine: the one that an INT8 model was converted for, empty for FP32; compile_seconds: that its
    file took to compile, None where nothing is compiled."""

    variant: Variant
    path: str
    sha256: str
    bytes: int
    engine: str
    compile_seconds: float | None


@dataclass(frozen=True, eq=False)
class Predictions:
    """logits: float32 [N, classes]; labels: int64 [N]; image_ids: N names, in the order of the logits.

    Raises ValueError for a logit that is NaN or infinite, since the largest logit is no prediction then.
    """

    logits: np.ndarray
    labels: np.ndarray
    image_ids: tuple[str, ...]

    def __post_init__(self) -> None:
        if not np.isfinite(self.logits).all():
            raise ValueError("logits are NaN or infinite")

    def at(self, indices: np.ndarray) -> Predictions:
        """The predictions on some of the images; indices: int64."""
        ids = tuple(self.image_ids[index] for index in indices)
        return Predictions(self.logits[indices], self.labels[indices], ids)

    @property
    def top1(self) -> np.ndarray:
        """int32 [N]: the class of the largest logit, the first of equal ones."""
        return self.logits.argmax(axis=1).astype(np.int32)

    @property
    def correct(self) -> np.ndarray:
        """bool [N]: True where the top-1 class is the label."""
        return np.asarray(self.top1 == self.labels)


@dataclass(frozen=True, eq=False)
class Top1:
    """The predicted classes of a run, by which runs of the same images are paired.

    labels, fp32: int32 [N]; int8: int32 [N] by runtime; runtimes whose logits are equal bit for bit share an array.
    target_images: int64 [M], the images on which the accuracy on the target's CPU was measured, and target: int32 [M],
    the classes there; None where what was executed here holds for it. classes: their names.
    """

    labels: np.ndarray
    fp32: np.ndarray
    int8: Mapping[str, np.ndarray]
    classes: tuple[str, ...]
    target_images: np.ndarray | None = None
    target: np.ndarray | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of its file, by name; that of runtimes that share an array is named after the first of them."""
        named = {"labels": self.labels, "fp32": self.fp32, "classes": np.array(self.classes, dtype=np.str_)}
        written = set[int]()
        for runtime, classes in self.int8.items():
            if id(classes) not in written:
                named[f"int8_{runtime}"] = classes
                written.add(id(classes))
        if self.target is not None and self.target_images is not None:
            named |= {"target": self.target, "target_images": self.target_images}
        return named

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], same: Sequence[Sequence[str]]) -> Top1:
        """Invert `arrays`. same: the groups of runtimes that share an array."""
        int8 = {runtime: arrays[f"int8_{group[0]}"] for group in same for runtime in group}
        return cls(
            arrays["labels"], arrays["fp32"], int8, tuple(arrays["classes"].tolist()),
            arrays.get("target_images"), arrays.get("target"),
        )  # fmt: skip


PARENT_TAG = "mlflow.parentRunId"
SAME_TAG = "runtimes.same"
"""The tag of the groups of INT8 runtimes whose logits are equal bit for bit: `eager torchscript; inductor`."""
SIMULATED_TAG = "simulated"
"""The tag, `true`, of a run whose quantized model is simulated in float, since no kernels hold its bits."""
PARTED_TAG = "runtimes.parted"
"""The tag of the runtimes whose INT8 logits have parted from torch's, separated by spaces."""


def same_as_text(groups: Sequence[Sequence[str]]) -> str:
    """Groups of runtimes as the tag `runtimes.same` has them."""
    return "; ".join(" ".join(group) for group in groups)


def same_from_text(text: str) -> tuple[tuple[str, ...], ...]:
    """The groups of runtimes that `same_as_text` wrote."""
    return tuple(tuple(group.split()) for group in text.split(";") if group.split())


class AccuracySource(StrEnum):
    """The means by which the accuracy on the target was found."""

    executed = "executed"
    exact = "exact"
    emulated = "emulated"


class SaturationStatus(StrEnum):
    """The saturation of 16-bit accumulators in a model."""

    impossible = "impossible"
    possible = "possible"
    observed = "observed"


# In the order in which tables list them.
PRECISIONS = tuple(Precision)


class VerdictKind(StrEnum):
    """The test images show no loss beyond the margin, a loss, or neither."""

    no_loss = "no_loss"
    loss = "loss"
    undecided = "undecided"


@dataclass(frozen=True)
class Verdict:
    """INT8 accuracy against FP32's, as far as the test images can tell. Fractions of 1, but for counts of images.

    margin: the tolerated loss; images: the number tested; images_needed: the number that would probably settle it,
    where it is undecided. Where saturating 16-bit accumulators are shown to be a cause: lost, FP32 minus INT8 accuracy;
    lost_to_saturation, the part of it that they cost; saturation_only, True if they explain all of it; remedy, the
    setting that avoids it.
    """

    kind: VerdictKind
    margin: float
    images: int
    images_needed: int | None = None
    lost: float | None = None
    lost_to_saturation: float | None = None
    saturation_only: bool | None = None
    remedy: str | None = None

    def tags(self) -> dict[str, str]:
        """The verdict as a run's tags: `verdict`, which is its kind, and `verdict.margin` and so on."""
        given = {name: value for name, value in vars(self).items() if name != "kind" and value is not None}
        return {"verdict": str(self.kind), **{f"verdict.{name}": str(value) for name, value in given.items()}}

    @classmethod
    def from_tags(cls, tags: Mapping[str, str]) -> Verdict | None:
        """The verdict that `tags` wrote; None where there is none."""

        def number(name: str) -> float | None:
            return float(tags[f"verdict.{name}"]) if f"verdict.{name}" in tags else None

        margin, images, needed = number("margin"), number("images"), number("images_needed")
        if tags.get("verdict") not in {*VerdictKind} or margin is None or images is None:
            return None
        only = tags.get("verdict.saturation_only")
        return cls(
            VerdictKind(tags["verdict"]), margin, int(images), None if needed is None else int(needed),
            number("lost"), number("lost_to_saturation"), None if only is None else only == "True",
            tags.get("verdict.remedy"),
        )  # fmt: skip


# A run has a tag for each warning, its sentence under its code.
WARNING_TAG = "warning."


class WarningCode(StrEnum):
    """The kinds of warnings about a run's numbers, in the order in which they are listed."""

    data_set_for_trying = "data_set_for_trying"
    simulated = "simulated"
    one_model_a_thread = "one_model_a_thread"
    timing_untrusted = "timing_untrusted"
    int8_slower = "int8_slower"
    int8_not_faster = "int8_not_faster"
    runtime_parted = "runtime_parted"
    runtime_layers_in_fp32 = "runtime_layers_in_fp32"
    layers_in_fp32 = "layers_in_fp32"
    batchnorm_left = "batchnorm_left"
    layers_narrowed = "layers_narrowed"
    saturates_in_spite_of_guard = "saturates_in_spite_of_guard"
    saturation_unguarded = "saturation_unguarded"
    slow_depthwise = "slow_depthwise"


@dataclass(frozen=True)
class RunWarning:
    """A warning about a run's numbers. data: for its sentence (see `report.sentences.warning`)."""

    code: WarningCode
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """The outcome of a job: numbers, and the paths of its files.

    metrics: by the names of `Metric`; resolved: params that record what was executed, beside what was asked; tags: by
    name; files: artifact path in the run -> path on disk; datasets: name, digest, source, context and profile of the
    images used; flavor: the arguments with which MLflow logs the INT8 model as one that it can serve, empty where there
    is no ONNX file.
    """

    metrics: dict[str, float]
    resolved: dict[str, str]
    tags: dict[str, str]
    verdict: Verdict
    warnings: tuple[RunWarning, ...]
    files: dict[str, str]
    datasets: tuple[dict[str, Any], ...]
    flavor: dict[str, Any]


RACING_TAG = "racing.stopped"
"""The tag of a run that racing stopped, with the reason. It is KILLED, and has no accuracy."""
RACED_FOR_TAG = "racing.question"
"""The tag of the question that it was stopped by: with another, such as a larger margin, it may not have been."""


@dataclass(frozen=True)
class Stopped:
    """The outcome of a job that racing stopped: as far as they go, what a `Result` has."""

    reason: str
    metrics: dict[str, float]
    resolved: dict[str, str]
    tags: dict[str, str]


@dataclass(frozen=True)
class RunRecord:
    """A run as it is read from the store, or as it will be.

    status: MLflow's, RUNNING, FINISHED, FAILED or KILLED; start, end: in seconds since 1970, end None while it runs;
    params: every setting that the result depends on, the groups' choices, and what was executed as `resolved.*`;
    metrics: by the names of `Metric`; artifacts: URI of the folder of its files, empty where it isn't known.
    """

    run_id: str
    name: str
    status: str
    start: float = 0.0
    end: float | None = None
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    artifacts: str = ""

    @property
    def raced_out(self) -> bool:
        """True if racing stopped it."""
        return self.status == "KILLED" and RACING_TAG in self.tags

    @property
    def verdict(self) -> Verdict | None:
        return Verdict.from_tags(self.tags)

    @property
    def warnings(self) -> dict[str, str]:
        """The sentence of each warning by its code, in the order of `WarningCode`."""
        return {code: self.tags[name] for code in WarningCode if (name := WARNING_TAG + code) in self.tags}
