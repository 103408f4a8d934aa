"""Accuracy changes of each class between FP32 and INT8, from a run's predicted classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qexp.records import Interval, Top1

CONFIDENCE = 0.95
METHOD = "Tango score, Bonferroni over classes"


@dataclass(frozen=True)
class ClassChange:
    """The images of one class: FP32 accuracy, and INT8 minus FP32 with an interval that holds for all classes together
    (Tango's, Bonferroni, 95%). fp32_only, int8_only: images that one alone has right."""

    name: str
    images: int
    fp32: float
    change: Interval
    fp32_only: int
    int8_only: int

    @property
    def shown(self) -> bool:
        """True where a change is shown, allowing for all classes having been looked at."""
        return not self.change.low <= 0 <= self.change.high


def can_be_told(found: Sequence[ClassChange]) -> bool:
    """True if a class has so many images that the loss of them all would be shown."""
    from qexp import statistics

    most = max(one.images for one in found)
    return statistics.tango(most, 0, most, 1 - (1 - CONFIDENCE) / len(found)).high < 0


def changes(top1: Top1, runtime: str) -> list[ClassChange]:
    """The classes that have images: those of which a loss is shown, then the others, each the largest loss first.

    runtime: the INT8 variant's; where the accuracy on the target was measured, it is that on its images instead. Empty
    where the run has no predictions of either.
    """
    from qexp import statistics

    if top1.target is not None and top1.target_images is not None:
        labels, fp32, int8 = top1.labels[top1.target_images], top1.fp32[top1.target_images], top1.target
    elif runtime in top1.int8:
        labels, fp32, int8 = top1.labels, top1.fp32, top1.int8[runtime]
    else:
        return []
    before, after = fp32 == labels, int8 == labels
    classes, index, images = np.unique(labels, return_inverse=True, return_counts=True)
    right, lost, won = (
        np.bincount(index, weights=one, minlength=len(classes)) for one in (before, before & ~after, after & ~before)
    )
    confidence = 1 - (1 - CONFIDENCE) / max(len(classes), 1)
    lows, highs = statistics.tango_bounds(lost, won, images, confidence)
    found = [
        ClassChange(
            top1.classes[label] if 0 <= label < len(top1.classes) else str(label),
            int(number),
            float(right[at] / number),
            Interval(float((won[at] - lost[at]) / number), float(lows[at]), float(highs[at]), CONFIDENCE, METHOD),
            int(lost[at]),
            int(won[at]),
        )
        for at, (label, number) in enumerate(zip(classes.tolist(), images.tolist(), strict=True))
    ]
    return sorted(found, key=lambda one: (one.change.high >= 0, one.change.value))
