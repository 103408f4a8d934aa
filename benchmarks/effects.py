"""Coverage of the intervals of effects: in simulated studies whose true effects are known, how often all hold.

An image has a margin, by which FP32 has it right, and an INT8 run shifts it: by its settings, by noise that all runs
have in common (an image that is hard for one setting is hard for all), and by noise of its own. The true accuracy of a
setting is then a normal probability. Images are drawn anew in each study. Timings are drawn around true speeds, one for
each setting of the kernels, which the runs with these share.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.size import sized
from qexp import statistics
from qexp.metrics import Metric
from qexp.records import RunRecord, Top1
from qexp.report.contrasts import Difference
from qexp.report.effects import Interaction, MainEffects, interactions, main_effects
from qexp.report.study import Study, studies

STUDIES = sized(500, 3)
MEAN_MARGIN = 1.3  # of images, in standard deviations: FP32 has nine in ten right
VALUES = {
    "granularity": ("per_tensor", "per_channel"),
    "observer": ("minmax", "percentile", "mse"),
    "batches": ("8", "32"),
    "overflow": ("none", "auto"),
}
SEEDS = ("0", "1")
# The settings that the kernels depend on.
OF_KERNELS = ("granularity", "overflow")
Setting = Mapping[str, str]


@dataclass(frozen=True)
class Truth:
    """The truth about each value of a setting: a shift of images' margins, and of the logarithm of the speed. noise: a
    run's own, in standard deviations of the margin; both: a further shift where granularity and observer are the last.
    """

    shifts: Mapping[tuple[str, str], float]
    speeds: Mapping[tuple[str, str], float]
    both: float
    noise: float
    common: float = 0.05

    def shift(self, setting: Setting) -> float:
        last = all(setting[name] == VALUES[name][-1] for name in ("granularity", "observer"))
        return sum(self.shifts.get(item, 0.0) for item in setting.items()) + self.both * last

    def accuracy(self, setting: Setting) -> float:
        deviation = math.sqrt(1 + self.common**2 + self.noise**2)
        return NormalDist().cdf((MEAN_MARGIN + self.shift(setting)) / deviation)

    def log_speed(self, setting: Setting) -> float:
        return math.log(4) + sum(self.speeds.get(item, 0.0) for item in setting.items())


def drawn(rng: np.random.Generator, noise: float, null: bool) -> Truth:
    """The truth of one study: half of all values have an effect; none has where null."""
    items = [(name, value) for name, values in VALUES.items() for value in values[1:]]

    def some(scale: float) -> dict[tuple[str, str], float]:
        return {item: 0.0 if null else scale * rng.standard_normal() * (rng.random() < 0.5) for item in items}

    speeds = {item: shift for item, shift in some(0.05).items() if item[0] in OF_KERNELS}
    return Truth(some(0.05), speeds, 0.0 if null else float(rng.normal(0, 0.05)), noise)


SETTINGS: list[Setting] = [dict(zip(VALUES, values, strict=True)) for values in itertools.product(*VALUES.values())]


def simulated(rng: np.random.Generator, truth: Truth, images: int, understated: float) -> Study:
    """A study of all settings with each calibration seed. understated: true over stated errors of timings."""
    margins = rng.normal(MEAN_MARGIN, 1, images)
    common = margins + rng.normal(0, truth.common, images)
    fp32 = margins > 0
    error = 0.015
    timings: dict[tuple[str, ...], float] = {}
    runs = list(itertools.product(SETTINGS, SEEDS))
    right = np.stack([common + truth.shift(setting) + rng.normal(0, truth.noise, images) > 0 for setting, _ in runs])
    lows, highs = statistics.tango_bounds((fp32 & ~right).sum(axis=1), (right & ~fp32).sum(axis=1), images)
    records, top1 = [], {}
    for number, (setting, seed) in enumerate(runs):
        kernels = tuple(setting[name] for name in OF_KERNELS)
        log_speed = timings.setdefault(kernels, truth.log_speed(setting) + understated * error * rng.standard_normal())
        metrics: dict[str, float] = {
            Metric.images: images,
            Metric.accuracy_fp32: float(fp32.mean()),
            Metric.accuracy_int8: float(right[number].mean()),
            Metric.accuracy_delta: float(right[number].mean() - fp32.mean()),
            Metric.delta_low: float(lows[number]),
            Metric.delta_high: float(highs[number]),
            Metric.runtime_speedup.of("torchscript"): math.exp(log_speed),
            Metric.runtime_speedup_low.of("torchscript"): math.exp(log_speed - 1.96 * error),
            Metric.runtime_speedup_high.of("torchscript"): math.exp(log_speed + 1.96 * error),
        }
        params = {**setting, "calib.seed": seed, "resolved.runtime": "torchscript"}
        name = str(number)
        records.append(RunRecord(name, name, "FINISHED", 0, 0, params, metrics, {"latency_valid": "true"}))
        classes = (~right[number]).astype(np.int32)
        top1[name] = Top1(np.zeros(images, np.int32), (~fp32).astype(np.int32), {"torchscript": classes}, ())
    (study,) = studies(records, top1)
    return study


def true_effect(truth: Truth, setting: str, value: str) -> tuple[float, float]:
    """(of accuracy, of the logarithm of the speed) against the setting's first value, the mean over all others."""
    pairs = [({**one, setting: VALUES[setting][0]}, {**one, setting: value}) for one in SETTINGS]
    return (
        float(np.mean([truth.accuracy(b) - truth.accuracy(a) for a, b in pairs])),
        float(np.mean([truth.log_speed(b) - truth.log_speed(a) for a, b in pairs])),
    )


def true_departure(truth: Truth, found: Interaction, row: str, column: str) -> float:
    """The interaction of a row and a column in accuracy, as a mean over all other settings."""
    corners = []
    for one in SETTINGS:
        at = {
            (r, c): truth.accuracy({**one, found.row: r, found.column: c})
            for r in (row, found.rows[0])
            for c in (column, found.columns[0])
        }
        (both, row_only), (column_only, neither) = (
            [at[r, c] for c in (column, found.columns[0])] for r in (row, found.rows[0])
        )
        corners.append(both - row_only - column_only + neither)
    return float(np.mean(corners))


def holds(found: Difference | None, true: float) -> bool:
    """True where the interval has the true value in it, to rounding."""
    if found is None or found.interval is None:
        return False
    return found.interval.low - 1e-9 <= true <= found.interval.high + 1e-9


@dataclass
class Tally:
    """The studies of one kind, and those in which every interval held, by what it is of; width: mean width, in points,
    of accuracies' intervals; false: studies in which a difference was shown where there is none."""

    accuracy: int = 0
    speed: int = 0
    departures: int = 0
    false: int = 0
    width: float = 0.0

    def add(self, truth: Truth, main: MainEffects, pairs: list[Interaction]) -> None:
        """Count one study."""
        found = [(one, *true_effect(truth, one.setting, one.value)) for axis in main.axes for one in axis.effects]
        self.accuracy += all(holds(effect.accuracy, true) for effect, true, _ in found)
        self.speed += all(holds(effect.speed, math.exp(true)) for effect, _, true in found)
        self.departures += all(
            holds(one.difference, true_departure(truth, pair, one.row, one.column))
            for pair in pairs
            if (one := pair.accuracy_departure)
        )
        self.false += any(effect.accuracy.shown for effect, true, _ in found if effect.accuracy and not true)
        intervals = [effect.accuracy.interval for effect, _, _ in found if effect.accuracy and effect.accuracy.interval]
        self.width += 100 * float(np.mean([one.high - one.low for one in intervals])) / STUDIES


@dataclass(frozen=True)
class Kind:
    """Studies of one kind: images, a run's own noise, true over stated errors of timings, without effects, without
    predictions."""

    images: int
    noise: float
    understated: float = 1.0
    null: bool = False
    predictions: bool = True


KINDS = (
    Kind(744, 0.1), Kind(744, 0.02, 1.5), Kind(2000, 0.3, 2.0), Kind(10_000, 0.1, 1.5), Kind(744, 0.1, null=True),
    Kind(2000, 0.02, null=True), Kind(2000, 0.1, predictions=False),
)  # fmt: skip


def effects(outputs: str) -> None:
    """Print the share of studies in which all intervals hold."""
    del outputs
    runs = len(SETTINGS) * len(SEEDS)
    print(f"{STUDIES} studies a line, of {runs} runs each, with {len(VALUES)} settings")
    print("accuracy, speed, departures: shares of studies whose intervals all hold the true values, nominally 95%")
    print("false: shares of studies in which a difference is shown where there is none, nominally 5%")
    lines = []
    for number, kind in enumerate(tqdm(sized(KINDS, KINDS[-1:]), disable=None)):
        rng, tally, disagree = np.random.default_rng(number), Tally(), 0.0
        started = time.perf_counter()
        for _ in range(STUDIES):
            truth = drawn(rng, kind.noise, kind.null)
            study = simulated(rng, truth, kind.images, kind.understated)
            some = next(iter(study.top1.values()))
            disagree += float(np.mean(some.fp32 != some.int8["torchscript"])) / STUDIES
            study = study if kind.predictions else Study(study.records, {}, study.latencies)
            tally.add(truth, main_effects(study), interactions(study))
        notes = ["no effects"] * kind.null + ["no predictions"] * (not kind.predictions)
        held = [tally.accuracy, tally.speed, tally.departures, tally.false]
        each = (time.perf_counter() - started) / STUDIES
        lines.append(
            [
                f"{kind.images:,}", f"{100 * disagree:.1f}%", f"{kind.understated:g}×", *map(_share, held),
                f"{tally.width:.2f}", f"{each:.2f}", ", ".join(notes),
            ]
        )  # fmt: skip
    headings = [
        "images", "disagree with FP32", "true/stated error of timings", "accuracy", "speed", "departures", "false",
        "width, points", "s a study", "",
    ]  # fmt: skip
    print(tabulate(lines, headings, disable_numparse=True))


def _share(count: int) -> str:
    """A share of the studies with its binomial standard error, in per cent."""
    share = count / STUDIES
    return f"{100 * share:.1f} ± {100 * math.sqrt(share * (1 - share) / STUDIES):.1f}"
