"""The chance in which calibration images were drawn, and how many of them are enough; accuracies are fractions of 1.

Two kinds of random variation are reported separately: the *sampling error*, from the choice of test images, is half the
95% interval of a run's difference to FP32; the *spread of samples*, from the choice of calibration images
(`calib.seed`) on the same test images, is a standard deviation over several runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import TYPE_CHECKING

from qexp.config.identity import NOT_APPLICABLE
from qexp.metrics import Metric
from qexp.records import Interval, RunRecord
from qexp.report.accuracies import Evaluated, compared
from qexp.report.study import SEED, value, varied

if TYPE_CHECKING:
    from qexp.report.study import Study
    from qexp.statistics import Plateau  # imported at runtime only where used: scipy would delay refusals

SIZE = "calib.batches"
CALIBRATION = ("calib", SIZE, SEED)


def _values(record: RunRecord, settings: Iterable[str]) -> tuple[str, ...]:
    return tuple(value(record, setting) for setting in settings)


@dataclass(frozen=True)
class CalibrationSamples:
    """Runs that differ in their sample of calibration images alone.

    settings: those that vary between such groups, by name; accuracies: INT8's, one a sample; sampling: mean sampling
    error of a run.
    """

    settings: dict[str, str]
    accuracies: tuple[float, ...]
    sampling: float


def samples(records: Sequence[RunRecord]) -> list[CalibrationSamples]:
    """The samples of each combination of settings that has two or more; the same seed twice is one sample."""
    groups: dict[frozenset[tuple[str, str]], dict[str, Evaluated]] = {}
    for record, found in compared(records):
        rest = {name: text for name, text in record.params.items() if name != SEED and not name.startswith("resolved.")}
        groups.setdefault(frozenset(rest.items()), {}).setdefault(value(record, SEED), (record, found))
    several = [list(group.values()) for group in groups.values() if len(group) > 1]
    names = varied([record for group in several for record, _ in group], without=[SEED])
    return [
        CalibrationSamples(
            {name: value(group[0][0], name) for name in names},
            tuple(found.comparable for _, found in group),
            fmean(found.sampling for _, found in group),
        )
        for group in several
    ]


@dataclass(frozen=True)
class Spreads:
    """Both kinds of chance as standard deviations; samples: pooled over settings, with its 95% interval."""

    samples: Interval
    images: float

    @property
    def can_tell(self) -> bool:
        """True where the interval of the one excludes the other."""
        return not self.samples.low <= self.images <= self.samples.high


def spreads(groups: Sequence[CalibrationSamples]) -> Spreads:
    """images: mean sampling error over 1.96."""
    from qexp import statistics

    spread, freedom = statistics.pooled_spread([group.accuracies for group in groups])
    images = fmean(group.sampling for group in groups) / NormalDist().inv_cdf(0.975)
    return Spreads(statistics.spread_interval(spread, freedom), images)


@dataclass(frozen=True)
class Winners:
    """The most accurate settings of a study by calibration seed.

    settings: the number of those that ran with each seed; winners: by seed the settings that vary of the most accurate
    ones, several where they tie; pairs: of seeds; changes: those that no winner is shared by.
    """

    settings: int
    winners: Mapping[str, tuple[Mapping[str, str], ...]]

    @property
    def pairs(self) -> int:
        return math.comb(len(self.winners), 2)

    @property
    def changes(self) -> int:
        return sum(
            not any(one in others for one in some) for some, others in itertools.combinations(self.winners.values(), 2)
        )


def winners(study: Study) -> Winners | None:
    """The winners by seed; None where fewer than two settings have two seeds in common.

    A run that the seed has no effect in stands for every seed of its setting.
    """
    accuracies: dict[tuple[tuple[str, str], ...], dict[str, float]] = {}
    for record, found in compared(study.finished):
        setting = tuple(study.setting(record).items())
        accuracies.setdefault(setting, {}).setdefault(value(record, SEED), found.comparable)
    seeds = dict.fromkeys(seed for group in accuracies.values() for seed in group if seed != NOT_APPLICABLE)
    known = {
        setting: {seed: group.get(seed, group.get(NOT_APPLICABLE, math.nan)) for seed in seeds}
        for setting, group in accuracies.items()
    }
    whole = {setting: group for setting, group in known.items() if not any(map(math.isnan, group.values()))}
    if len(whole) < 2 or len(seeds) < 2:
        return None
    best = {seed: max(group[seed] for group in whole.values()) for seed in seeds}
    by_seed = {
        seed: tuple(dict(setting) for setting, group in whole.items() if group[seed] == best[seed]) for seed in seeds
    }
    return Winners(len(whole), by_seed)


@dataclass(frozen=True)
class Size:
    """One number of calibration images: batches (None: all), images if known, and INT8 accuracies, one a sample.

    exact: all images, in an order that doesn't matter: there is one sample only, and no spread.
    """

    batches: int | None
    images: float | None
    accuracies: tuple[float, ...]
    exact: bool


@dataclass(frozen=True)
class CalibrationSizes:
    """Runs that differ in their number and sample of calibration images alone, and how many images are enough.

    settings: those that vary between such groups, by name; sizes: smallest first; sampling: mean sampling error of a
    run; plateau: by `statistics.plateau`, None where samples can't tell; enough: index of the size from which on larger
    ones are shown to bring less than the sampling error (`statistics.enough`), None where none is.
    """

    settings: dict[str, str]
    sizes: tuple[Size, ...]
    sampling: float
    plateau: Plateau | None
    enough: int | None


def sizes(records: Sequence[RunRecord]) -> list[CalibrationSizes]:
    """The calibration sizes of each combination of the other settings in which `calib.batches` varied."""
    from qexp import statistics

    runs = [run for run in compared(records) if value(run[0], SIZE) != NOT_APPLICABLE]
    names = varied([record for record, _ in runs], without=CALIBRATION)
    result = []
    for whole in _combinations([_values(record, names) for record, _ in runs]):
        group = [run for run in runs if _fits(_values(run[0], names), whole)]
        sizes = _sizes(group)
        if len(sizes) < 2:
            continue
        accuracies, exact = [size.accuracies for size in sizes], sizes[-1].exact
        sampling = fmean(found.sampling for _, found in group)
        plateau, enough = statistics.plateau(accuracies, exact), statistics.enough(accuracies, sampling, exact)
        result.append(CalibrationSizes(dict(zip(names, whole, strict=True)), sizes, sampling, plateau, enough))
    return result


def _fits(values: tuple[str, ...], whole: tuple[str, ...]) -> bool:
    """True if the values equal those of `whole`, but for settings that have no effect."""
    return all(a in (b, NOT_APPLICABLE) for a, b in zip(values, whole, strict=True))


def _combinations(values: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The distinct ones, without those that fit another: runs without a setting's effect go with each of its values."""
    keys = list(dict.fromkeys(values))
    return [key for key in keys if not any(_fits(key, other) for other in keys if other != key)]


def _sizes(runs: Sequence[Evaluated]) -> tuple[Size, ...]:
    """Smallest first; of runs with the same size and seed the first."""
    groups: dict[str, dict[str, Evaluated]] = {}
    for record, found in runs:
        groups.setdefault(value(record, SIZE), {}).setdefault(value(record, SEED), (record, found))
    result = []
    for batches in sorted(groups, key=lambda text: math.inf if text == "null" else int(text)):
        group = groups[batches]
        first = next(iter(group.values()))[0]
        result.append(
            Size(
                None if batches == "null" else int(batches),
                first.metrics.get(Metric.calibration_images),
                tuple(found.comparable for _, found in group.values()),
                exact=batches == "null" and NOT_APPLICABLE in group,
            )
        )
    return tuple(result)
