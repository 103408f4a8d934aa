"""Made-up studies whose answers and timings are known, as they are read back from a store."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from qexp import statistics
from qexp.metrics import Metric
from qexp.records import Precision, RunRecord, Top1, Variant
from qexp.report.study import Study, studies

IMAGES = 1000
FP32_MS = 10.0
FP32 = np.arange(IMAGES) < 900
"""The images that FP32 has right."""


def right(*lost: int, won: Iterable[int] = ()) -> np.ndarray:
    """bool [IMAGES]: the images that INT8 has right, FP32's without those lost and with those won."""
    correct = FP32.copy()
    correct[list(lost)] = False
    correct[list(won)] = True
    return correct


def run(
    name: str,
    correct: np.ndarray | Mapping[str, np.ndarray],
    speedup: Mapping[str, float] | float | None = None,
    width: float = 0.02,
    **params: str,
) -> tuple[RunRecord, Top1]:
    """A finished run and its predicted classes. correct: bool [images], of torchscript or by runtime, the headline's
    first, on images of which FP32 has the first nine in ten right; speedup: likewise, with an interval of `width` to
    each side in logarithms; params: by name, with two underscores for a dot."""
    by_runtime = {"torchscript": correct} if isinstance(correct, np.ndarray) else correct
    headline = next(iter(by_runtime))
    speedups = {headline: speedup} if isinstance(speedup, float | int) else speedup or {}
    fp32 = np.arange(len(by_runtime[headline])) < 0.9 * len(by_runtime[headline])
    metrics: dict[str, float] = {Metric.images: len(fp32)}
    for runtime, answers in by_runtime.items():
        lost, won = int(np.sum(fp32 & ~answers)), int(np.sum(answers & ~fp32))
        metrics |= {Metric.fp32_only.of(runtime): lost, Metric.int8_only.of(runtime): won}
        metrics[Metric.runtime_accuracy.of(runtime)] = float(answers.mean())
        if runtime == headline:
            delta = statistics.tango(lost, won, len(fp32))
            metrics |= {Metric.accuracy_fp32: float(fp32.mean()), Metric.accuracy_int8: float(answers.mean())}
            metrics |= {Metric.accuracy_delta: delta.value, Metric.delta_low: delta.low, Metric.delta_high: delta.high}
    for runtime, ratio in speedups.items():
        metrics[Metric.runtime_speedup.of(runtime)] = ratio
        metrics[Metric.latency_fp32] = FP32_MS
        metrics[Metric.runtime_latency.of(Variant(Precision.int8, runtime))] = FP32_MS / ratio
        metrics[Metric.runtime_speedup_low.of(runtime)] = ratio * float(np.exp(-width))
        metrics[Metric.runtime_speedup_high.of(runtime)] = ratio * float(np.exp(width))
    given = {key.replace("__", "."): text for key, text in params.items()}
    record = RunRecord(
        name, name, "FINISHED", params={**given, "resolved.runtime": headline}, metrics=metrics,
        tags={"latency_valid": "true", "cpu": "a"},
    )  # fmt: skip
    classes = {runtime: (~answers).astype(np.int32) for runtime, answers in by_runtime.items()}
    top1 = Top1(np.zeros(len(fp32), dtype=np.int32), (~fp32).astype(np.int32), classes, ("right", "wrong"))
    return record, top1


def study(runs: Sequence[tuple[RunRecord, Top1]], predictions: bool = True) -> Study:
    """The runs as the one study that they make; predictions: False where none were fetched."""
    (found,) = studies(
        [record for record, _ in runs], {record.run_id: top1 for record, top1 in runs} if predictions else {}
    )
    return found


def grid(**values: Sequence[str]) -> list[dict[str, str]]:
    """Every combination of the values, the last setting's varying fastest."""
    return [dict(zip(values, one, strict=True)) for one in itertools.product(*values.values())]
