"""Racing: when to stop a setting that is being evaluated, block by block of images in an order that all settings share
(`statistics.random_order`).

It is stopped for futility, where it will hardly qualify on all images, or for domination, where another setting is
faster and will hardly end less accurate. It is never stopped for success: whatever is recommended was evaluated on all
images and passed the test of `decision`. There a stopped setting stays in the family with p = 1, by which Holm's
procedure can only reject less, so the error rate holds without a correction, whatever the rule for stopping is.

What is predicted is the result on these very images, of which those seen are a simple random sample without
replacement: a mean of n of N has the variance S² (1 − n/N) / n around that of all (Cochran 1977, "Sampling techniques",
section 2.5). The prediction is stochastic curtailment: Lan, Simon and Halperin 1982, "Stochastically curtailed tests
in long-term clinical trials", Sequential Analysis 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist

import numpy as np

from qexp.report.candidates import LEVEL
from qexp.report.study import Latency

BLOCKS = 20
# A setting is stopped where the chance of what it would have to reach is below this, at any block's end.
CHANCE = 0.002

_NORMAL = NormalDist()
_Z = -_NORMAL.inv_cdf(LEVEL)


class Reason(StrEnum):
    """The reasons to stop a setting."""

    futility = "futility"
    domination = "domination"


@dataclass(frozen=True, eq=False)
class Evaluated:
    """A setting as far as it was evaluated.

    differences: int8 [images seen], in the order of the race, INT8 right minus FP32 right; latency: its timing, None
    where there is none that can be trusted.
    """

    differences: np.ndarray
    latency: Latency | None


def block_ends(images: int, batch_size: int = 1) -> list[int]:
    """The numbers of images after which a race looks at a setting, the last of them all images, the others whole
    batches."""
    batches = math.ceil(images / batch_size)
    ends = {round(batches * number / BLOCKS) * batch_size for number in range(1, BLOCKS + 1)} - {0}
    return sorted({min(end, images) for end in ends})


def reason_to_stop(one: Evaluated, others: Iterable[Evaluated], images: int, margin: float) -> Reason | None:
    """The reason to stop a setting now, None to go on. others: not stopped, each at least as far as this one."""
    seen = len(one.differences)
    if seen >= images:
        return None
    lost, won = _counts(one.differences)
    if chance_to_qualify(lost, won, seen, images, margin) < CHANCE:
        return Reason.futility
    for other in others:
        if clearly_faster(other.latency, one.latency):
            behind, ahead = _counts(one.differences - other.differences[:seen])
            if chance_to_keep_up(behind, ahead, seen, images) < CHANCE:
                return Reason.domination
    return None


def chance_to_qualify(lost: int, won: int, seen: int, images: int, margin: float) -> float:
    """The chance that a setting is shown, on all images, to lose less than the margin, were it alone in its family.

    The most lenient of the levels that Holm's procedure can come to. lost, won: of the images seen, those that FP32
    alone, INT8 alone has right. The test is Tango's, in its limit for many images.
    """
    mean, deviation, rate = _predicted(lost, won, seen, images)
    null_variance = max(rate, margin) - margin**2
    least = -margin + _Z * math.sqrt(null_variance / images)
    return _NORMAL.cdf((mean - least) / deviation)


def chance_to_keep_up(behind: int, ahead: int, seen: int, images: int) -> float:
    """The chance that a setting is, on all images, at least as accurate as another one.

    behind, ahead: of the images seen, those that the other alone, this one alone has right.
    """
    mean, deviation, _ = _predicted(behind, ahead, seen, images)
    return _NORMAL.cdf(mean / deviation)


def clearly_faster(one: Latency | None, other: Latency | None) -> bool:
    """True where the first is faster than the data's uncertainty, as a recommendation tells them apart."""
    if one is None or other is None:
        return False
    apart = math.log(one.speedup.value / other.speedup.value)
    return apart > math.hypot(one.log_half_width, other.log_half_width)


def _predicted(minus: int, plus: int, seen: int, images: int) -> tuple[float, float, float]:
    """The mean difference per image on all images, its standard deviation, and the rate of images that differ.

    With half an image added to each of the four cells, as Agresti and Min 2005 do ("Simple improved confidence
    intervals for comparing matched proportions", Statistics in Medicine 24): few images stop nothing.
    """
    total = seen + 2
    mean, rate = (plus - minus) / total, (plus + minus + 1) / total
    variance = rate - mean**2
    return mean, math.sqrt(variance * (1 - seen / images) / seen), rate


def _counts(differences: np.ndarray) -> tuple[int, int]:
    return int(np.sum(differences < 0)), int(np.sum(differences > 0))
