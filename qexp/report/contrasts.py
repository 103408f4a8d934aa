"""Contrasts of runs, such as the mean difference over pairs of them, with intervals that hold for all of them together.

Of accuracies the images are the units: the runs of a study answer the same images, so the number of runs makes no
interval narrower. Of speeds the timings are the units: runs that share one are no replicates of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

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

    @property
    def bound(self) -> float:
        """The largest difference that the interval allows, to either side; NaN where it isn't known."""
        if self.interval is None:
            return math.nan
        return max(self.interval.high - self.null, self.null - self.interval.low, 0.0)

    @property
    def clarity(self) -> float:
        """The difference in half-widths of its interval, to order differences by; 0 where that isn't known."""
        if self.interval is None or self.nothing:
            return 0.0
        return 2 * abs(self.value - self.null) / (self.interval.high - self.interval.low)


@dataclass(frozen=True, eq=False)
class Contrast:
    """The mean over replicates of a signed sum of runs. members: int64 [replicates, terms], indices of runs; signs:
    int64 [terms], such as (1, -1)."""

    members: np.ndarray
    signs: np.ndarray

    def among(self, known: np.ndarray) -> Contrast | None:
        """The replicates all of whose runs are known, bool [runs]; None where none is left."""
        kept = known[self.members].all(axis=1)
        return Contrast(self.members[kept], self.signs) if kept.any() else None

    @property
    def runs(self) -> np.ndarray:
        return np.unique(self.members)

    @property
    def size(self) -> tuple[int, int]:
        """The number of replicates, and the most that one can amount to where each run counts 0 or 1."""
        return len(self.members), int(np.sum(self.signs > 0))

    def weights(self, number: int) -> np.ndarray:
        """float32 [number]: how often, with its sign, each run is in the sum; whole numbers."""
        result = np.zeros(number, dtype=np.float32)
        np.add.at(result, self.members, np.broadcast_to(self.signs, self.members.shape))
        return result


@dataclass(frozen=True, eq=False)
class Answers:
    """A run's INT8 accuracy, and its answers where they are known.

    accuracy: NaN where there is none; correct: bool [images], None where predictions are missing; images: int64, the
    indices of these in the evaluation set, None: all of it; error: standard error of the difference to FP32 on the same
    images, NaN where unknown, and counted: their number, 0 where unknown.
    """

    accuracy: float
    correct: np.ndarray | None = None
    images: np.ndarray | None = None
    error: float = math.nan
    counted: int = 0


def of_accuracy(runs: Sequence[Answers], contrasts: Sequence[Contrast]) -> tuple[list[Difference | None], float]:
    """Each contrast's difference in accuracy, None where no replicate has accuracies, and the intervals' critical z.

    Of runs whose answers are all known, the mean over images of the contrast's value on each: by the score interval of
    `statistics.mean_score_interval`. z is the quantile of the largest of all contrasts' |z|, simulated with their
    correlation over the images; where some answers are unknown, Bonferroni's. A contrast with such runs is that of
    the accuracies alone; since a sum's standard deviation is at most the sum of its terms', the errors of each run's
    own difference to FP32 bound its error, and the interval is conservative.
    """
    known = np.array([math.isfinite(run.accuracy) for run in runs], dtype=bool)
    paired = np.array([run.correct is not None for run in runs], dtype=bool)
    found = [contrast.among(known) for contrast in contrasts]
    family = [contrast for contrast in found if contrast is not None]
    if not family:
        return [None] * len(contrasts), math.nan
    values = _per_image(runs, [one for one in family if paired[one.runs].all()])
    critical = _bonferroni(len(family))
    if len(values) == len(family):
        together = _on_common_images(values)
        critical = _critical(together) if together is not None else critical
    of_images = iter(_of_images(values, critical))
    return [
        None
        if contrast is None
        else next(of_images)
        if paired[contrast.runs].all()
        else _of_accuracies(runs, contrast, critical)
        for contrast in found
    ], critical


@dataclass(frozen=True, eq=False)
class _PerImage:
    """sums: int32 [images], a contrast's sum over its replicates on each image; reach: the most that a replicate can
    add; images: None where all."""

    sums: np.ndarray
    replicates: int
    reach: int
    images: np.ndarray | None


def _per_image(runs: Sequence[Answers], contrasts: Sequence[Contrast]) -> list[_PerImage]:
    """The contrasts' sums, each on the images that all of its runs have answers to."""
    sets: dict[bytes, np.ndarray | None] = {}
    which = [_key(run, sets) for run in runs]
    groups: dict[frozenset[bytes], list[int]] = {}
    for index, contrast in enumerate(contrasts):
        groups.setdefault(frozenset(which[run] for run in contrast.runs), []).append(index)
    result: dict[int, _PerImage] = {}
    for keys, indices in groups.items():
        images = _intersection([sets[key] for key in keys])
        members = np.unique(np.concatenate([contrasts[index].members.ravel() for index in indices]))
        answers = [_at(runs[run], images) for run in members]
        weights = np.stack([contrasts[index].weights(len(runs))[members] for index in indices])
        size = min(map(len, answers))
        sums = np.empty((len(indices), size), dtype=np.int32)
        for start in range(0, size, CHUNK):
            # Sums of whole numbers, which float32 holds exactly.
            part = np.stack([answer[start : start + CHUNK] for answer in answers]).astype(np.float32)
            sums[:, start : start + CHUNK] = np.rint(weights @ part)
        for index, row in zip(indices, sums, strict=True):
            result[index] = _PerImage(row, *contrasts[index].size, images)
    return [result[index] for index in range(len(contrasts))]


def _key(run: Answers, sets: dict[bytes, np.ndarray | None]) -> bytes:
    key = b"" if run.images is None else run.images.tobytes()
    sets.setdefault(key, run.images)
    return key


def _intersection(sets: Sequence[np.ndarray | None]) -> np.ndarray | None:
    result = None
    for images in sets:
        if images is not None:
            result = images if result is None else np.intersect1d(result, images)
    return result


def _at(run: Answers, images: np.ndarray | None) -> np.ndarray:
    """The run's answers, bool, on these images in their order."""
    assert run.correct is not None
    if images is None:
        return run.correct
    if run.images is None:
        return run.correct[images]
    order = np.argsort(run.images)
    return run.correct[order[np.searchsorted(run.images, images, sorter=order)]]


def _on_common_images(values: Sequence[_PerImage]) -> np.ndarray | None:
    """float32 [images, contrasts] on the images that all contrasts have; None where those are too few to tell."""
    common = _intersection([one.images for one in values])
    rows = []
    for one in values:
        sums = one.sums
        if common is not None:
            sums = sums[common] if one.images is None else sums[np.isin(one.images, common)]
        rows.append(sums.astype(np.float32) / one.replicates)
    return np.stack(rows, axis=1) if len(rows[0]) > len(rows) else None


def _critical(values: np.ndarray) -> float:
    """The quantile of max |z| of the contrasts' means, values [images, contrasts].

    z normal with the contrasts' correlation; one that is the same on all images counts as independent of the others,
    which never makes the quantile too small (Sidak 1967, "Rectangular confidence regions for the means of multivariate
    normal distributions", JASA 62). Fixed seed.
    """
    deviations = values.std(axis=0)
    varying = deviations > 0
    constant = int(np.sum(~varying))
    standard = (values[:, varying] - values[:, varying].mean(axis=0)) / deviations[varying]
    rng = np.random.default_rng(0)
    largest = np.zeros(DRAWS)
    if standard.shape[1]:
        correlation = standard.T.astype(np.float64) @ standard / len(standard)
        eigenvalues, vectors = np.linalg.eigh(correlation)
        root = vectors * np.sqrt(np.clip(eigenvalues, 0, None))
        largest = np.abs(rng.standard_normal((DRAWS, len(root))) @ root.T).max(axis=1)
    if constant:
        largest = np.maximum(largest, np.abs(rng.standard_normal((DRAWS, constant))).max(axis=1))
    # That of the simulation is known to a hundredth or so; it lies between these two.
    return min(max(float(np.quantile(largest, CONFIDENCE)), _bonferroni(1)), _bonferroni(values.shape[1]))


def _bonferroni(number: int) -> float:
    return NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / 2 / number)


def _of_images(values: Sequence[_PerImage], critical: float) -> list[Difference]:
    from qexp import statistics

    batches: dict[tuple[int, int], list[int]] = {}
    for index, one in enumerate(values):
        batches.setdefault((one.replicates, one.reach), []).append(index)
    result: dict[int, Difference] = {}
    for (replicates, reach), indices in batches.items():
        # Only the values that occur, and each contrast's number of images with each of them.
        reached = replicates * reach
        counts = np.stack([np.bincount(values[index].sums + reached, minlength=2 * reached + 1) for index in indices])
        seen = counts.any(axis=0)
        levels = (np.arange(-reached, reached + 1) / replicates)[seen]
        lows, highs = statistics.mean_score_interval(levels, counts[:, seen], critical, -reach, reach)
        for index, low, high in zip(indices, lows.tolist(), highs.tolist(), strict=True):
            sums = values[index].sums
            value = float(sums.mean() / replicates) if len(sums) else math.nan
            interval = Interval(value, low, high, CONFIDENCE, "score, paired by image, simultaneous")
            known = interval if len(sums) else None
            result[index] = Difference(value, 0.0, len(sums), known, nothing=len(sums) > 0 and not sums.any())
    return [result[index] for index in range(len(values))]


def _of_accuracies(runs: Sequence[Answers], contrast: Contrast, critical: float) -> Difference:
    weights = contrast.weights(len(runs))[contrast.runs] / len(contrast.members)
    members = [runs[index] for index in contrast.runs]
    value = float(sum(weight * run.accuracy for weight, run in zip(weights, members, strict=True)))
    units = min(run.counted for run in members)
    error = sum(abs(weight) * run.error for weight, run in zip(weights, members, strict=True))
    if not math.isfinite(error):
        return Difference(value, 0.0, units, None)
    low, high = max(value - critical * error, -1.0), min(value + critical * error, 1.0)
    method = "conservative: from each run's own difference to FP32"
    return Difference(value, 0.0, units, Interval(value, low, high, CONFIDENCE, method))


@dataclass(frozen=True)
class Timing:
    """A speedup over FP32 by one measurement; key: equal for runs that share it; error: standard error of the log of
    the speedup, NaN where unknown."""

    key: object
    log_speedup: float
    error: float


def of_speed(timings: Sequence[Timing | None], contrasts: Sequence[Contrast]) -> list[Difference | None]:
    """Each contrast's factor between speedups, None where no replicate is timed.

    The geometric mean over distinct replicates. Its standard error, in logarithms, is that of the timings' own
    intervals or that of the spread between replicates that share no timing, whichever is larger; the intervals hold
    together by Bonferroni. Replicates that share one measurement have no difference, and no error.
    """
    known = np.array([timing is not None for timing in timings], dtype=bool)
    found = [contrast.among(known) for contrast in contrasts]
    sets = [[] if contrast is None else _distinct(timings, contrast) for contrast in found]
    tests = sum(any(one for one in replicates) for replicates in sets)
    critical = _bonferroni(max(tests, 1))
    by_key = {timing.key: timing for timing in timings if timing}
    return [_of_timings(by_key, replicates, critical) if replicates else None for replicates in sets]


def _distinct(timings: Sequence[Timing | None], contrast: Contrast) -> list[dict[object, int]]:
    """The distinct replicates as the signed number of times that each timing is in them; empty where they share one."""
    result: dict[tuple[object, ...], dict[object, int]] = {}
    for row in contrast.members:
        members = [timing for index in row if (timing := timings[index])]
        net: dict[object, int] = {}
        for sign, member in zip(contrast.signs.tolist(), members, strict=True):
            net[member.key] = net.get(member.key, 0) + sign
        result[tuple(member.key for member in members)] = {key: sign for key, sign in net.items() if sign}
    return list(result.values())


def _of_timings(timings: dict[object, Timing], replicates: Sequence[dict[object, int]], critical: float) -> Difference:
    measured = [one for one in replicates if one]
    if not measured:
        return Difference(1.0, 1.0, 0, Interval(1.0, 1.0, 1.0, CONFIDENCE, "one measurement"), nothing=True)
    logs = [sum(sign * timings[key].log_speedup for key, sign in one.items()) for one in measured]
    times: dict[object, int] = {}
    for one in measured:
        for key, sign in one.items():
            times[key] = times.get(key, 0) + sign
    # Where replicates cancel each other's timings, they tell nothing.
    errors = [number * timings[key].error / len(replicates) for key, number in times.items() if number]
    own = math.hypot(*errors) if errors else math.nan
    groups = _unconnected(measured)
    spread = _spread([[logs[index] for index in group] for group in groups]) * len(measured) / len(replicates)
    error = max((one for one in (own, spread) if math.isfinite(one)), default=math.nan)
    mean = sum(logs) / len(replicates)
    if not math.isfinite(error):
        return Difference(math.exp(mean), 1.0, len(groups), None)
    factor, low, high = (math.exp(mean + side * critical * error) for side in (0, -1, 1))
    return Difference(factor, 1.0, len(groups), Interval(factor, low, high, CONFIDENCE, "timings, Bonferroni"))


def _unconnected(replicates: Sequence[dict[object, int]]) -> list[list[int]]:
    """The indices of replicates in groups that share no timing with each other."""
    groups: list[tuple[set[object], list[int]]] = []
    for index, one in enumerate(replicates):
        keys, members = set(one), [index]
        apart = []
        for other, indices in groups:
            if keys.isdisjoint(other):
                apart.append((other, indices))
            else:
                keys, members = keys | other, [*indices, *members]
        groups = [*apart, (keys, members)]
    return [sorted(members) for _, members in groups]


def _spread(groups: Sequence[Sequence[float]]) -> float:
    """The standard error of the mean of all values, from groups that are independent of each other; NaN for one."""
    number, total = len(groups), sum(map(len, groups))
    if number < 2:
        return math.nan
    mean = sum(map(sum, groups)) / total
    squares = sum(sum(value - mean for value in group) ** 2 for group in groups)
    return math.sqrt(number / (number - 1) * squares) / total
