"""Accuracy changes of each class between FP32 and INT8, from a run's predicted classes."""

from __future__ import annotations

from dataclasses import dataclass

from qexp.records import Interval, Top1


@dataclass(frozen=True)
class ClassChange:
    """One class: FP32 accuracy on its images, and INT8 minus FP32 with an interval that holds for all classes together
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


def changes(top1: Top1, runtime: str) -> list[ClassChange]:
    """The classes that have images, the one that loses most first.

    runtime: the INT8 variant's; where the accuracy on the target was measured, it is that on its images instead.
    """
    raise NotImplementedError
