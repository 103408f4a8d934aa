"""Made-up records of runs, as they are read back from a store."""

from __future__ import annotations

from dataclasses import replace

from qexp.metrics import Metric
from qexp.records import RunRecord


def row(name: str, accuracy: float, speedup: float | None = None, *, half: float = 0.0022, **params: str) -> RunRecord:
    """A finished run, whose accuracy delta has an interval of `half` to each side.

    params: by name, with two underscores for a dot.
    """
    delta = accuracy - 0.9
    metrics = {Metric.accuracy_fp32: 0.9, Metric.accuracy_int8: accuracy, Metric.accuracy_delta: delta}
    metrics |= {Metric.delta_low: delta - half, Metric.delta_high: delta + half}
    metrics |= {} if speedup is None else {Metric.speedup: speedup}
    return RunRecord(
        name, name, "FINISHED", params={k.replace("__", "."): v for k, v in params.items()}, metrics=metrics
    )


def on_target(row: RunRecord, source: str, accuracy: float, delta: float) -> RunRecord:
    """The run with an accuracy on the target CPU. source: of that accuracy, as the tag accuracy_source says it."""
    target = {Metric.target_accuracy: accuracy, Metric.target_delta: delta, Metric.target_images: 2000.0}
    target |= {Metric.target_delta_low: delta - 0.01, Metric.target_delta_high: delta + 0.01}
    return replace(row, metrics={**row.metrics, **target}, tags={**row.tags, "accuracy_source": source})


def by_size(drawn: dict[str, tuple[float, ...]], **params: str) -> list[RunRecord]:
    """Runs by number of calibration batches ("null": the whole set), with one accuracy for each calib.seed."""
    rows = []
    for batches, accuracies in drawn.items():
        whole = batches == "null"
        for seed, accuracy in enumerate(accuracies):
            given = {"calib__batches": batches, "calib__sampling": "n/a" if whole else "random"}
            given |= {"calib__seed": "n/a" if whole else str(seed), **params}
            made = row(f"{batches} {seed}", accuracy, **given)
            rows.append(
                replace(made, metrics={**made.metrics, Metric.calibration_images: 898 if whole else 16 * int(batches)})
            )
    return rows


RISING = {"8": (0.8490, 0.8495, 0.8492), "1": (0.80, 0.81, 0.805), "32": (0.8491, 0.8494, 0.8496), "null": (0.8493,)}
