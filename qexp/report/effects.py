"""Effects of settings, calibration samples and calibration sizes, computed from tracked runs; tables.py shows them.

Accuracies are fractions of 1. Two kinds of random variation are reported separately: the *sampling error*, from the
choice of test images, is half the 95% interval of a run's difference to FP32; the *spread of samples*, from the choice
of calibration images (`calib.seed`) on the same test images, is a standard deviation over several runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist, fmean
from typing import TYPE_CHECKING

from qexp.config.identity import NOT_APPLICABLE
from qexp.metrics import Metric
from qexp.records import AccuracySource, Interval, RunRecord
from qexp.report.contrasts import Difference
from qexp.report.study import finished, sets, value, varied

if TYPE_CHECKING:
    from qexp.report.study import Conditions, Study
    from qexp.statistics import Plateau  # imported at runtime only where used: scipy would delay refusals

# Words for the tag `accuracy_source` where the accuracy on the target CPU wasn't executed here.
SOURCES: dict[str, str] = {
    AccuracySource.exact: "with sums that don't saturate",
    AccuracySource.emulated: "with its kernels' 16-bit sums emulated",
}

# INT8 accuracy, its difference to FP32's and the ends of that difference's interval.
EXECUTED = (Metric.accuracy_int8, Metric.accuracy_delta, Metric.delta_low, Metric.delta_high)
ON_TARGET = (Metric.target_accuracy, Metric.target_delta, Metric.target_delta_low, Metric.target_delta_high)

# Fewer pairs than this tell next to nothing about how much they vary.
PAIRS_FOR_INTERVAL = 3

SIZE, SEED = "calib.batches", "calib.seed"
CALIBRATION = ("calib", SIZE, SEED)


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
    if not found:
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


def _values(record: RunRecord, settings: Iterable[str]) -> tuple[str, ...]:
    return tuple(value(record, setting) for setting in settings)


@dataclass(frozen=True)
class Effect:
    """One value of a setting against the setting's first value, over pairs of runs that are equal in every other one.

    runs: those that have the value; pairs: 0 where no run has a partner, and then there is no difference; accuracy:
    INT8's; speed: of the speedup over FP32, None where a partner has no valid timing.
    """

    setting: str
    value: str
    runs: int
    pairs: int
    accuracy: Difference | None
    speed: Difference | None


class AxisKind(StrEnum):
    """The kinds of axes: a difference in accuracy or speed is shown; none is, for all may be chance; there is none,
    since every run answers and is timed the same; or it can't be told, since runs lack partners or uncertainty."""

    mattered = "mattered"
    within_noise = "within_noise"
    nothing = "nothing"
    unknown = "unknown"


@dataclass(frozen=True)
class Axis:
    """A setting that varied; first: the value that its effects are against; effects: one for each other value."""

    setting: str
    first: str
    effects: tuple[Effect, ...]

    @property
    def kind(self) -> AxisKind:
        found = [one for effect in self.effects for one in (effect.accuracy, effect.speed) if one]
        if any(one.shown for one in found):
            return AxisKind.mattered
        if found and all(one.nothing for one in found):
            return AxisKind.nothing
        return AxisKind.within_noise if any(one.interval for one in found) else AxisKind.unknown


@dataclass(frozen=True)
class MainEffects:
    """The effects of each setting that varied, in the order of the tables, the runtime's within runs at the end.

    critical: half the width of accuracies' intervals in standard errors, NaN where there are none; unpaired: finished
    runs without predictions, whose intervals are conservative; untimed: finished runs without a valid timing.
    """

    axes: tuple[Axis, ...]
    critical: float
    unpaired: int
    untimed: int


@dataclass(frozen=True)
class Departure:
    """A departure from additivity: how much more `row` brings over the first row with `column` than with the first
    column, over blocks of four runs that are equal in every other setting."""

    row: str
    column: str
    blocks: int
    difference: Difference


@dataclass(frozen=True)
class Interaction:
    """Two settings together, as heat maps [rows, columns]; None where a cell has no run with that figure.

    runs: the number of runs; accuracy: mean INT8 minus FP32 accuracy; speedup: geometric mean; accuracy_departure,
    speed_departure: the clearest one, with an interval that holds for all departures of the study together; None where
    no block of four runs is complete.
    """

    row: str
    column: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    runs: tuple[tuple[int, ...], ...]
    accuracy: tuple[tuple[float | None, ...], ...]
    speedup: tuple[tuple[float | None, ...], ...]
    accuracy_departure: Departure | None
    speed_departure: Departure | None

    @property
    def shown(self) -> bool:
        """True where a departure from additivity is shown."""
        return any(one.difference.shown for one in (self.accuracy_departure, self.speed_departure) if one)


def main_effects(study: Study, runtime: str | None = None, conditions: Conditions | None = None) -> MainEffects:
    """The effects of each setting that varied among the finished runs, and of the runtime within each run.

    runtime: the one that accuracies and speedups are of, None: of each run its headline's; conditions: the batch size
    and number of threads of the timings, None: the first.
    """
    raise NotImplementedError


def interactions(study: Study, runtime: str | None = None, conditions: Conditions | None = None) -> list[Interaction]:
    """Each two settings of whose combinations three in four have runs, the clearest departures from additivity first.

    runtime, conditions: as in `main_effects`.
    """
    raise NotImplementedError


@dataclass(frozen=True)
class MeanEffect:
    """The effect of one value of one setting, over the runs that have it.

    accuracy, speedup: means over those runs; delta_accuracy, delta_speedup: mean difference to the setting's first
    value, over `pairs` pairs of runs that are equal in every other setting; None where there is no such pair.
    interval: of delta_accuracy as the mean of pairs that vary at random (t, 95%), from PAIRS_FOR_INTERVAL pairs on: it
    tells how the effect varies from pair to pair and nothing of the sampling error that all pairs share.
    """

    setting: str
    value: str
    runs: int
    accuracy: float
    speedup: float | None
    pairs: int
    delta_accuracy: float | None
    interval: Interval | None
    delta_speedup: float | None


def effects(records: Sequence[RunRecord]) -> list[MeanEffect]:
    """The effect of each value of each setting that varied among the finished runs."""
    runs = compared(records)
    names = varied([record for record, _ in runs])
    result = []
    for name in names:
        others = _held(name, names, [record for record, _ in runs])
        having: dict[str, list[Evaluated]] = {}
        for run in runs:
            having.setdefault(value(run[0], name), []).append(run)
        first = {_values(run[0], others): run for run in next(iter(having.values()))}
        for index, (choice, group) in enumerate(having.items()):
            pairs = [(first[key], run) for run in group if (key := _values(run[0], others)) in first]
            result.append(_effect(name, choice, group, pairs, is_first=index == 0))
    return result


def _held(name: str, names: Sequence[str], records: Sequence[RunRecord]) -> list[str]:
    """The settings that are equal in otherwise equal runs: all others but those that can't be while `name` varies, a
    group's choice and the fields that it sets. A field that is swept beside its group's choice is held."""
    others = [other for other in names if other != name]
    return [other for other in others if not sets(name, other, records) and not sets(other, name, records)]


def _effect(
    setting: str, choice: str, group: Sequence[Evaluated], pairs: Sequence[tuple[Evaluated, Evaluated]], is_first: bool
) -> MeanEffect:
    from qexp import statistics

    differences = [b.comparable - a.comparable for (_, a), (_, b) in pairs]
    speedups = [together(record, Metric.speedup) for record, _ in group]
    steps = [(together(a, Metric.speedup), together(b, Metric.speedup)) for (a, _), (b, _) in pairs]
    return MeanEffect(
        setting,
        choice,
        runs=len(group),
        accuracy=fmean(found.comparable for _, found in group),
        speedup=_mean([speedup for known in speedups for speedup in known]),
        pairs=len(pairs),
        delta_accuracy=_mean(differences),
        interval=statistics.mean_interval(differences) if len(pairs) >= PAIRS_FOR_INTERVAL and not is_first else None,
        delta_speedup=_mean([b[0] - a[0] for a, b in steps if a and b]),
    )


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


@dataclass(frozen=True)
class CalibrationSamples:
    """Runs that differ in their sample of calibration images alone.

    settings: those that vary between such groups, by name; accuracies: INT8's, one a sample; sampling: mean sampling
    error of a run.
    """

    settings: dict[str, str]
    accuracies: tuple[float, ...]
    sampling: float


def calibration_samples(records: Sequence[RunRecord]) -> list[CalibrationSamples]:
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


def calibration_sizes(records: Sequence[RunRecord]) -> list[CalibrationSizes]:
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
