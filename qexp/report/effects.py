"""Effects of settings on accuracy and speed, over pairs of runs that differ in one setting alone, and interactions.

A run counts with its accuracy in one runtime, the headline's or one asked for, on the CPU that is meant; with its
speedup over FP32, where its timing can be trusted. Runs are paired by what was asked; intervals hold for all effects of
a study together (see `contrasts`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from statistics import NormalDist, fmean
from typing import TYPE_CHECKING

import numpy as np

from qexp.config.identity import NOT_APPLICABLE
from qexp.metrics import Metric
from qexp.records import RunRecord, Top1
from qexp.report import contrasts
from qexp.report.accuracies import Accuracy, accuracy, together
from qexp.report.contrasts import Answers, Contrast, Difference, Timing
from qexp.report.study import SEED, sets, value

if TYPE_CHECKING:
    from qexp.report.study import Conditions, Study

# The axis of runtimes, which a run has several of.
RUNTIME = "runtime"
# The signs of a pair's runs, and of those of a block of four, the runs with the value or values first.
PAIR, CORNER = (1, -1), (1, -1, -1, 1)
# The share of two settings' combinations that must have runs for a heat map.
FULL = 0.75
# Half the width of a 95% interval in standard errors.
Z = NormalDist().inv_cdf(0.975)


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
    def departures(self) -> tuple[Departure, ...]:
        return tuple(one for one in (self.accuracy_departure, self.speed_departure) if one)

    @property
    def shown(self) -> bool:
        """True where a departure from additivity is shown."""
        return any(one.difference.shown for one in self.departures)

    @property
    def clarity(self) -> float:
        return max((one.difference.clarity for one in self.departures), default=0.0)


def main_effects(study: Study, runtime: str | None = None, conditions: Conditions | None = None) -> MainEffects:
    """The effects of each setting that varied among the finished runs, and of the runtime within each run.

    runtime: the one that accuracies and speedups are of, None: of each run its headline's; conditions: the batch size
    and number of threads of the timings, None: the first.
    """
    outcomes, design = _outcomes(study, runtime, conditions), _Design.of(study)
    unpaired = sum(one.answers.correct is None for one in outcomes)
    untimed = sum(one.timing is None for one in outcomes)
    compared = [_against_first(design, name) for name in design.settings]
    if runtime is None:
        within, axis = _against_first_runtime(study, conditions, len(outcomes))
        outcomes, compared = [*outcomes, *within], [*compared, *([axis] if axis else [])]
    family = [contrast for one in compared for contrast in one.contrasts.values() if contrast]
    accuracies, critical = contrasts.of_accuracy([one.answers for one in outcomes], family)
    speeds = contrasts.of_speed([one.timing for one in outcomes], family)
    found = iter(zip(accuracies, speeds, strict=True))
    axes = []
    for one in compared:
        effects = [
            Effect(one.setting, choice, one.runs[choice], len(contrast.members), *next(found))
            if contrast
            else Effect(one.setting, choice, one.runs[choice], 0, None, None)
            for choice, contrast in one.contrasts.items()
        ]
        axes += [Axis(one.setting, one.first, tuple(effects))] if effects else []
    return MainEffects(tuple(axes), critical, unpaired, untimed)


def interactions(study: Study, runtime: str | None = None, conditions: Conditions | None = None) -> list[Interaction]:
    """Each two settings of whose combinations three in four have runs, the clearest departures from additivity first.

    runtime, conditions: as in `main_effects`.
    """
    outcomes, design = _outcomes(study, runtime, conditions), _Design.of(study)
    grids = [pair for pair in itertools.combinations(design.settings, 2) if _is_full(design, *pair)]
    corners = [_corners(design, *pair) for pair in grids]
    family = [contrast for one in corners for contrast in one.values()]
    accuracies, _ = contrasts.of_accuracy([one.answers for one in outcomes], family)
    speeds = contrasts.of_speed([one.timing for one in outcomes], family)
    found = iter(zip(family, accuracies, speeds, strict=True))
    result = []
    for pair, one in zip(grids, corners, strict=True):
        departures = [(*corner, *next(found)) for corner in one]
        result.append(
            replace(
                _heat_maps(design, outcomes, *pair),
                accuracy_departure=_clearest(Departure(a, b, len(c.members), d) for a, b, c, d, _ in departures if d),
                speed_departure=_clearest(Departure(a, b, len(c.members), d) for a, b, c, _, d in departures if d),
            )
        )
    return sorted(result, key=lambda one: one.clarity, reverse=True)


@dataclass(frozen=True, eq=False)
class _Outcome:
    """A finished run's INT8 model in one runtime. delta: INT8 minus FP32 accuracy."""

    answers: Answers
    delta: float | None
    timing: Timing | None


def _outcomes(study: Study, runtime: str | None, conditions: Conditions | None) -> list[_Outcome]:
    """The value of each finished run, in the runtime or its headline's."""
    return [
        _outcome(study, record, runtime or value(record, "resolved.runtime"), conditions) for record in study.finished
    ]


def _outcome(study: Study, record: RunRecord, runtime: str, conditions: Conditions | None) -> _Outcome:
    found = accuracy(record) if runtime == value(record, "resolved.runtime") else _in_runtime(record, runtime)
    timing = _timing(study, record, runtime, conditions)
    if found is None:
        return _Outcome(Answers(math.nan), None, timing)
    top1 = study.top1.get(record.run_id)
    correct, images = _correct(top1, runtime, found.source) if top1 and _is_paired(study, top1) else (None, None)
    measured = record.metrics.get(Metric.target_images if found.source else Metric.images, 0)
    answers = Answers(found.comparable, correct, images, found.sampling / Z, int(measured))
    return _Outcome(answers, found.delta.value, timing)


def _is_paired(study: Study, top1: Top1) -> bool:
    """True where the predictions are of the same images as those of the study's other runs, by their labels."""
    return np.array_equal(top1.labels, next(iter(study.top1.values())).labels)


def _in_runtime(record: RunRecord, runtime: str) -> Accuracy | None:
    """The run's accuracy in a runtime that is not its headline's; None where it has none that holds for the target."""
    from qexp import statistics

    headline = accuracy(record)
    counts = together(record, Metric.fp32_only.of(runtime), Metric.int8_only.of(runtime), Metric.images)
    if headline is None or headline.source or not counts or not all(map(math.isfinite, counts)):
        return None
    fp32_only, int8_only, images = map(int, counts)
    delta = statistics.tango(fp32_only, int8_only, images)
    return Accuracy(headline.fp32, headline.fp32 + delta.value, delta, "", headline.fp32 + delta.value)


def _correct(top1: Top1, runtime: str, source: str) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The answers and the images that they are to, as `Answers` has them."""
    if source and top1.target is not None and top1.target_images is not None:
        return top1.target == top1.labels[top1.target_images], top1.target_images
    if source or runtime not in top1.int8:
        return None, None
    return top1.int8[runtime] == top1.labels, None


def _timing(study: Study, record: RunRecord, runtime: str, conditions: Conditions | None) -> Timing | None:
    where = conditions or next(iter(study.conditions), None)
    latency = study.latency(record, runtime, where) if where else None
    if latency is None or not latency.valid or latency.speedup.value <= 0:
        return None
    return Timing(latency.measurement, math.log(latency.speedup.value), latency.log_half_width / Z)


@dataclass(frozen=True, eq=False)
class _Design:
    """The settings of a study's finished runs.

    choices: the values of each setting that varied, and of calibration's seed, in the order of their first runs; codes:
    int64 [runs], the indices of the runs' values in these, -1 where the setting has no effect; bound: pairs of settings
    that can't vary independently, a group's choice and a field that it sets.
    """

    choices: Mapping[str, tuple[str, ...]]
    codes: Mapping[str, np.ndarray]
    bound: frozenset[tuple[str, str]]

    @classmethod
    def of(cls, study: Study) -> _Design:
        choices, codes = {}, {}
        for name in (*study.varied, SEED):
            values = [value(record, name) for record in study.finished]
            choices[name] = tuple(one for one in dict.fromkeys(values) if one != NOT_APPLICABLE)
            index = {NOT_APPLICABLE: -1} | {one: code for code, one in enumerate(choices[name])}
            codes[name] = np.array([index[one] for one in values], dtype=np.int64)
        fields = [(a, b) for a in study.varied for b in study.varied if b.startswith(f"{a}.")]
        bound = [pair for pair in fields if sets(*pair, study.finished)]
        return cls(choices, codes, frozenset((*bound, *((b, a) for a, b in bound))))

    @property
    def settings(self) -> tuple[str, ...]:
        return tuple(name for name in self.choices if name != SEED)

    def runs(self, *which: tuple[str, int]) -> np.ndarray:
        """The indices of the runs that have these values, each a setting and its code."""
        return np.flatnonzero(np.logical_and.reduce([self.codes[name] == code for name, code in which]))

    def replicates(self, names: Sequence[str], cells: Sequence[np.ndarray]) -> np.ndarray:
        """int64 [replicates, cells]: choices of a run of each cell that are equal in all settings but the names.

        A setting that has no effect in one of the runs doesn't tell it from another, nor does one that is bound to the
        names. Of runs that nothing tells from each other, each is chosen in turn.
        """
        bound = {other for one, other in self.bound if one in names}
        codes = np.stack([code for name, code in self.codes.items() if name not in bound | {*names}], axis=1)
        loose = (codes[np.concatenate(cells)] < 0).any(axis=0)
        blocks: dict[bytes, list[dict[tuple[int, ...], list[int]]]] = {}
        for number, cell in enumerate(cells):
            for run in cell.tolist():
                block = blocks.setdefault(codes[run, ~loose].tobytes(), [{} for _ in cells])
                block[number].setdefault(tuple(codes[run, loose].tolist()), []).append(run)
        result: list[tuple[int, ...]] = []
        for block in blocks.values():
            for chosen in itertools.product(*block):
                if all(len({*column} - {-1}) <= 1 for column in zip(*chosen, strict=True)):
                    alike = [group[key] for group, key in zip(block, chosen, strict=True)]
                    turns = range(max(map(len, alike)))
                    result += [tuple(runs[turn % len(runs)] for runs in alike) for turn in turns]
        return np.array(result, dtype=np.int64).reshape(-1, len(cells))


@dataclass(frozen=True, eq=False)
class _Compared:
    """An axis before its effects are known. contrasts: of each value but the first, None where no run has a partner;
    runs: the number of runs with each value."""

    setting: str
    first: str
    contrasts: Mapping[str, Contrast | None]
    runs: Mapping[str, int]


def _against_first(design: _Design, name: str) -> _Compared:
    choices = design.choices[name]
    having = [design.runs((name, code)) for code in range(len(choices))]
    pairs = [_contrast(design.replicates([name], [cell, having[0]]), PAIR) for cell in having]
    return _Compared(
        name,
        choices[0],
        dict(zip(choices[1:], pairs[1:], strict=True)),
        dict(zip(choices, map(len, having), strict=True)),
    )


def _against_first_runtime(
    study: Study, conditions: Conditions | None, number: int
) -> tuple[list[_Outcome], _Compared | None]:
    """Each run's outcomes in the runtimes that it has, to be numbered from `number` on, and the axis of these."""
    outcomes: list[_Outcome] = []
    having: dict[str, dict[int, int]] = {}
    for run, record in enumerate(study.finished):
        timed = [latency.runtime for latency in study.latencies.get(record.run_id, ())]
        for runtime in dict.fromkeys([*Metric.runtime_accuracy.within(record.metrics), *timed]):
            having.setdefault(runtime, {})[run] = number + len(outcomes)
            outcomes.append(_outcome(study, record, runtime, conditions))
    if len(having) < 2:
        return [], None
    first, *others = having
    pairs = {
        other: [(having[other][run], having[first][run]) for run in having[other] if run in having[first]]
        for other in others
    }
    found = {other: _contrast(np.array(both, dtype=np.int64).reshape(-1, 2), PAIR) for other, both in pairs.items()}
    return outcomes, _Compared(RUNTIME, first, found, {runtime: len(runs) for runtime, runs in having.items()})


def _contrast(members: np.ndarray, signs: tuple[int, ...]) -> Contrast | None:
    return Contrast(members, np.array(signs)) if len(members) else None


def _is_full(design: _Design, row: str, column: str) -> bool:
    """True where the two can vary independently, and FULL of their combinations have runs."""
    a, b = design.codes[row], design.codes[column]
    cells = len({pair for pair in zip(a.tolist(), b.tolist(), strict=True) if min(pair) >= 0})
    return (row, column) not in design.bound and cells >= FULL * len(design.choices[row]) * len(design.choices[column])


def _corners(design: _Design, row: str, column: str) -> dict[tuple[str, str], Contrast]:
    """The contrasts of additivity between each value of either setting and the first ones, where runs allow it."""
    result = {}
    for a, b in itertools.product(range(1, len(design.choices[row])), range(1, len(design.choices[column]))):
        cells = [design.runs((row, i), (column, j)) for i, j in ((a, b), (a, 0), (0, b), (0, 0))]
        contrast = _contrast(design.replicates([row, column], cells), CORNER)
        if contrast:
            result[design.choices[row][a], design.choices[column][b]] = contrast
    return result


def _heat_maps(design: _Design, outcomes: Sequence[_Outcome], row: str, column: str) -> Interaction:
    """The two settings without departures."""
    rows, columns = design.choices[row], design.choices[column]
    cells = [[design.runs((row, i), (column, j)).tolist() for j in range(len(columns))] for i in range(len(rows))]
    deltas = [
        [_mean([delta for run in cell if (delta := outcomes[run].delta) is not None]) for cell in line]
        for line in cells
    ]
    logs = [[_mean([t.log_speedup for run in cell if (t := outcomes[run].timing)]) for cell in line] for line in cells]
    return Interaction(
        row,
        column,
        rows,
        columns,
        runs=tuple(tuple(map(len, line)) for line in cells),
        accuracy=tuple(map(tuple, deltas)),
        speedup=tuple(tuple(None if log is None else math.exp(log) for log in line) for line in logs),
        accuracy_departure=None,
        speed_departure=None,
    )


def _clearest(departures: Iterable[Departure]) -> Departure | None:
    return max(departures, key=lambda one: one.difference.clarity, default=None)


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
