"""Contrasts of runs, such as the mean difference over pairs of them, with intervals that hold for all of them together.

Of accuracies the images are the units: the runs of a study answer the same images, so the number of runs makes no
interval narrower. Of speeds the timings are the units: runs that share one are no replicates of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from qexp.records import Interval

CONFIDENCE = 0.95
# Draws of the greatest of all contrasts' z, by which a quantile's level is known to 0.15 hundredths.
DRAWS = 20_000
# Images whose answers are held as floats at a time: 40 MB for 1,000 runs.
CHUNK = 10_000


@dataclass(frozen=True)
class Difference:
    """A mean difference and how sure it is.

    value: of accuracies a fraction of 1, of speeds a factor; null: the value of no difference, 0 or 1; units: the
    number of independent units behind it, images or distinct sets of timings; interval: holds together with those of
    all other contrasts at 95%, None where the uncertainty isn't known; nothing: True where there is no difference at
    all: not an image is answered otherwise, or the runs of each pair share one timing.
    """

    value: float
    null: float
    units: int
    interval: Interval | None
    nothing: bool = False

    @property
    def shown(self) -> bool:
        """True where the whole interval lies to one side of no difference."""
        return self.interval is not None and not self.interval.low <= self.null <= self.interval.high
