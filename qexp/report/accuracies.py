"""A run's accuracies, as reports compare them: of what was executed, or of the CPU that is meant."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from qexp.metrics import Metric
from qexp.records import AccuracySource, Interval, RunRecord
from qexp.report.study import finished

# Words for the tag `accuracy_source` where the accuracy on the target CPU wasn't executed here.
SOURCES: dict[str, str] = {
    AccuracySource.exact: "with sums that don't saturate",
    AccuracySource.emulated: "with its kernels' 16-bit sums emulated",
}

# INT8 accuracy, its difference to FP32's and the ends of that difference's interval.
EXECUTED = (Metric.accuracy_int8, Metric.accuracy_delta, Metric.delta_low, Metric.delta_high)
ON_TARGET = (Metric.target_accuracy, Metric.target_delta, Metric.target_delta_low, Metric.target_delta_high)


@dataclass(frozen=True)
class Accuracy:
    """A run's accuracies, as reports show them; fp32 and int8 on the same images, delta their paired difference.

    source: "" where they are of what ran here, else a key of SOURCES, and they are the target's. comparable: INT8
    accuracy that can be compared between runs on different numbers of images, FP32's on the whole evaluation set plus
    the paired difference (the difference estimator of survey sampling); int8 where source is "".
    """

    fp32: float
    int8: float
    delta: Interval
    source: str
    comparable: float

    @property
    def sampling(self) -> float:
        """The sampling error: half the 95% interval of delta."""
        return (self.delta.high - self.delta.low) / 2


def accuracy(record: RunRecord) -> Accuracy | None:
    """None where the run has none."""
    source = record.tags.get("accuracy_source", "")
    source = source if source in SOURCES and Metric.target_accuracy in record.metrics else ""
    found = together(record, Metric.accuracy_fp32, *(ON_TARGET if source else EXECUTED))
    if not found or not all(map(math.isfinite, found)):
        return None
    fp32, int8, delta, low, high = found
    interval = Interval(delta, low, high, 0.95, "Tango score")
    if source:
        return Accuracy(int8 - delta, int8, interval, source, fp32 + delta)
    return Accuracy(fp32, int8, interval, "", int8)


Evaluated = tuple[RunRecord, Accuracy]


def together(record: RunRecord, *metrics: str) -> list[float]:
    """Metrics that are logged together, in this order; nothing where one is missing."""
    return [record.metrics[name] for name in metrics] if record.metrics.keys() >= set(metrics) else []


def compared(records: Iterable[RunRecord]) -> list[Evaluated]:
    """The finished runs that have an accuracy, with it."""
    return [(record, found) for record in finished(records) if (found := accuracy(record))]
