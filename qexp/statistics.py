"""Paired statistics, intervals and verdicts: numpy and scipy, no torch.

Accuracies are fractions of 1. Of two sets of predictions on the same images, `first_only` counts the images that
only the first has right, `second_only` those that only the second has; the difference is known from these two and
the number of images. A difference is always second minus first (INT8 minus FP32).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import fmean, stdev

import numpy as np
from scipy import optimize, special, stats
from scipy.optimize import elementwise

from qexp.records import Interval, Predictions, Verdict, VerdictKind

# Fewer workers than this are too few to estimate how much workers differ.
WORKERS_TO_RESAMPLE = 5

# A 99th percentile of fewer calls rests on fewer than ten of them.
CALLS_FOR_P99 = 1000

# The power that "M images would settle it" and `detectable` assume.
POWER = 0.8

# A smaller standard deviation of accuracies is rounding.
NO_SPREAD = 1e-9


def random_order(count: int) -> np.ndarray:
    """int64 [count]: the order in which all settings see so many images, random and always the same, so that the first
    ones are a random sample on which settings can be paired."""
    return np.random.default_rng(0).permutation(count)


def discordant(first: Predictions, second: Predictions) -> tuple[int, int, int]:
    """(first_only, second_only, images). Raises ValueError where the two are not of the same images."""
    _check_paired(first, second)
    a, b = first.correct, second.correct
    return int(np.sum(a & ~b)), int(np.sum(b & ~a)), len(a)


def agreement(first: Predictions, second: Predictions) -> float:
    """Share of images with the same top-1 class, right or wrong. NaN for no images."""
    _check_paired(first, second)
    same = first.logits.argmax(axis=1) == second.logits.argmax(axis=1)
    return float(same.mean()) if len(same) else math.nan


def kl_divergence(reference: Predictions, other: Predictions) -> float:
    """Mean over images of KL(softmax(reference) || softmax(other)), in nats; 0 where all logits are equal."""
    _check_paired(reference, other)
    p = special.log_softmax(reference.logits.astype(np.float64), axis=1)
    q = special.log_softmax(other.logits.astype(np.float64), axis=1)
    return float(np.sum(np.exp(p) * (p - q), axis=1).mean()) if len(p) else math.nan


def sqnr(reference: np.ndarray, other: np.ndarray) -> float:
    """Signal to quantization noise in dB: 10 log10(sum(reference^2) / sum((reference - other)^2)).

    Arrays of one shape, such as the logits [N, classes] of FP32 and of INT8. Infinite where they are equal.
    """
    if reference.shape != other.shape:
        raise ValueError(f"shapes differ: {reference.shape} and {other.shape}")
    signal = reference.astype(np.float64)
    return decibels(float(np.sum(signal**2)), float(np.sum((signal - other) ** 2)))


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise), of two sums of squares. Infinite without noise, -inf without a signal in it."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def _check_paired(first: Predictions, second: Predictions) -> None:
    if first.image_ids != second.image_ids or not np.array_equal(first.labels, second.labels):
        raise ValueError("the two predictions are not of the same images in the same order")


def wilson(correct: int, n: int, confidence: float = 0.95) -> Interval:
    """An accuracy of `correct` of `n` images with Wilson's (1927) score interval; [0, 1] for no images."""
    method = "Wilson score"
    if n == 0:
        return Interval(math.nan, 0.0, 1.0, confidence, method)
    bounds = stats.binomtest(correct, n).proportion_ci(confidence, method="wilson")
    return Interval(correct / n, float(bounds.low), float(bounds.high), confidence, method)


def mcnemar(first_only: int, second_only: int) -> float:
    """Two-sided exact p-value for equal accuracies: a sign test on the images that exactly one has right."""
    trials = first_only + second_only
    return float(stats.binomtest(first_only, trials).pvalue) if trials else 1.0


def tango_z(
    difference: np.ndarray | float,
    first_only: np.ndarray | float,
    second_only: np.ndarray | float,
    n: np.ndarray | float,
) -> np.ndarray:
    """The score z = (c - b - n d) / sqrt(n (2 q + d (1 - d))) of the hypothesis that the difference is d.

    b, c: images that only the first, only the second has right; q: the maximum likelihood estimate of the share of b
    under the hypothesis, the larger root of 2n q^2 + ((2n + b - c) d - b - c) q - b d (1 - d) = 0. Broadcasts.
    Positive where the observed difference is larger than d. It falls as d grows.
    Tango 1998, "Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design", Statistics in Medicine 17, equations 8 to 10.
    """
    d, b, c, size = (np.asarray(value, dtype=np.float64) for value in (difference, first_only, second_only, n))
    variance = size * _score_variance(d, b, c, size)
    numerator = c - b - size * d
    # 0 / 0 at d = 0 without a disagreement, and at d = 1 or -1 where every image is one; the limit is 0.
    limit = np.where(numerator == 0, 0.0, np.copysign(np.inf, numerator))
    return np.divide(numerator, np.sqrt(variance), out=limit, where=variance > 0)


def _score_variance(d: np.ndarray, b: np.ndarray, c: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Variance of one image's contribution under the hypothesis that the difference is d, by maximum likelihood."""
    quadratic = 2 * n
    linear = (2 * n + b - c) * d - b - c
    constant = -b * d * (1 - d)
    root = np.sqrt(np.maximum(linear**2 - 4 * quadratic * constant, 0))
    # The larger root without cancellation: where `linear` is positive, root - linear would lose all digits.
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(linear > 0, -2 * constant / (linear + root), (root - linear) / (2 * quadratic))
    return np.maximum(2 * share + d * (1 - d), 0)


def tango_bounds(
    first_only: np.ndarray, second_only: np.ndarray, n: np.ndarray | int, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Tango's score interval for many tables at once: (low, high), float64 of the shape of `first_only`.

    Every d whose two-sided score test is not rejected; each end by bisection to the last bits, in [-1, 1].
    """
    z = _alpha(confidence)

    def end(level: float) -> np.ndarray:
        below, above = np.full(np.shape(first_only), -1.0), np.full(np.shape(first_only), 1.0)
        for _ in range(54):
            middle = (below + above) / 2
            under = tango_z(middle, first_only, second_only, n) > level
            below, above = np.where(under, middle, below), np.where(under, above, middle)
        return (below + above) / 2

    return end(z), end(-z)


@lru_cache(maxsize=2**16)
def tango(first_only: int, second_only: int, n: int, confidence: float = 0.95) -> Interval:
    """The difference in accuracy, second minus first, with Tango's (1998) score interval for paired images.

    first_only, second_only: images of `n` that only the first, only the second has right. The interval has a width
    where no prediction differs, and never leaves [-1, 1]; for n = 0 the value is NaN and the interval all of it.
    Equal to PropCIs::scoreci.mp(first_only, second_only, n, confidence) in R.
    Raises ValueError for counts that are negative or sum to more than n.
    """
    _check_counts(first_only, second_only, n)
    if n == 0:
        return Interval(math.nan, -1.0, 1.0, confidence, "Tango score")
    low, high = tango_bounds(np.array(first_only), np.array(second_only), n, confidence)
    return Interval((second_only - first_only) / n, float(low), float(high), confidence, "Tango score")


def _check_counts(first_only: int, second_only: int, n: int) -> None:
    if min(first_only, second_only) < 0 or first_only + second_only > n:
        raise ValueError(f"{first_only} and {second_only} discordant of {n} images is no paired table")


def non_inferiority(first_only: int, second_only: int, n: int, margin: float) -> float:
    """One-sided p-value of Tango's (1998) score test that the second loses `margin` or more against the first.

    margin: an accuracy loss in (0, 1). Small where the loss is shown to be less than that; below (1 - confidence) / 2
    exactly where the lower end of `tango` lies above -margin. 1 for no images.
    """
    _check_counts(first_only, second_only, n)
    return float(stats.norm.sf(tango_z(-margin, first_only, second_only, n))) if n else 1.0


def mean_score_z(
    values: np.ndarray, counts: np.ndarray, mean: np.ndarray | float, lowest: float = -1, highest: float = 1
) -> np.ndarray:
    """The score z = sum n_k (v_k - mean) / sqrt(n variance) of the hypothesis that images have this mean.

    values: [K], what an image can count, between `lowest` and `highest`, such as the mean difference over several
    calibration seeds; counts: [..., K], the images of each value; mean: broadcasts with counts' other axes. The
    variance is that of the distribution on [lowest, highest] that is the most likely under the hypothesis (see
    `_mean_variance`). For values -1, 0 and 1 it is `tango_z`. Positive where the observed mean is larger than the
    hypothesis; it falls as mean grows. 0 for no images.
    """
    v, count = np.asarray(values, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    hypothesis, n = np.asarray(mean, dtype=np.float64), count.sum(axis=-1)
    numerator = count @ v - n * hypothesis
    variance = n * _mean_variance(v, count, hypothesis, lowest, highest)
    # As for `tango_z`; and nothing but rounding, where all images count as much as the hypothesis says.
    numerator = np.where(np.abs(numerator) <= 1e-9, 0.0, numerator)
    limit = np.where(numerator == 0, 0.0, np.copysign(np.inf, numerator))
    return np.divide(numerator, np.sqrt(variance), out=limit, where=variance > 0)


def _mean_variance(v: np.ndarray, count: np.ndarray, mean: np.ndarray, lowest: float, highest: float) -> np.ndarray:
    """Variance of one image's value under the hypothesis that the mean is `mean`, by maximum likelihood.

    The shares are p_k = (n_k / n) / (1 + t (v_k - mean)), with t such that their mean is the hypothesis'; it lies in
    [-1 / (highest - mean), 1 / (mean - lowest)], and the shares' mean falls as it grows. Where even an end of that
    leaves the mean too high or too low, the shares sum to less than 1, and the rest of the images lies at the end of
    the scale that none was seen at. 0 where the mean is an end of the scale itself.
    Owen 2001, "Empirical Likelihood", chapter 2, of distributions that may have unseen values too.
    """
    distance = v - mean[..., None]
    share = count / np.maximum(count.sum(axis=-1, keepdims=True), 1)
    share, distance = np.broadcast_arrays(share, distance)
    shape = share.shape[:-1]
    inside = np.broadcast_to((mean > lowest) & (mean < highest), shape)
    middle = np.where(inside, mean, (lowest + highest) / 2)
    below, above = -1 / (highest - middle), 1 / (middle - lowest)

    def over(t: np.ndarray, amount: np.ndarray) -> np.ndarray:
        # Unseen values have no share, whatever they are divided by.
        return np.divide(amount, 1 + t[..., None] * distance, out=np.zeros(share.shape), where=share > 0)

    with np.errstate(divide="ignore", invalid="ignore"):
        # Most roots are an end, or Newton's steps find them, once near enough; bisection where they leave the bracket.
        low = np.where(np.sum(over(above, share) * distance, axis=-1) > 0, above, below)
        high = np.where(np.sum(over(below, share) * distance, axis=-1) > 0, above, below)
        t = (low + high) / 2
        for step in range(60):
            ratio = over(t, distance)
            excess, slope = np.sum(share * ratio, axis=-1), np.sum(share * ratio**2, axis=-1)
            low, high = np.where(excess > 0, t, low), np.where(excess > 0, high, t)
            newton = t + excess / slope
            before, t = t, np.where((newton > low) & (newton < high) & (step >= 10), newton, (low + high) / 2)
            if np.all(np.abs(t - before) <= 1e-11 * (above - below)):
                break
        p = over(t, share)
    rest = np.maximum(1 - p.sum(axis=-1), 0)
    end = np.where(t > 0, lowest, highest)
    variance = np.sum(p * distance**2, axis=-1) + rest * (end - mean) ** 2
    return np.asarray(np.where(inside, variance, 0.0))


def mean_score_interval(
    values: np.ndarray, counts: np.ndarray, z: np.ndarray | float | None = None, lowest: float = -1, highest: float = 1
) -> tuple[np.ndarray, np.ndarray]:
    """The score intervals of the mean of many columns at once: (low, high), float64 of counts' shape but for the last.

    Every mean whose `mean_score_z` is between -z and z; by default the two-sided 95%, and a larger z where several
    intervals are to hold together. values, counts: as there. For values -1, 0 and 1 it is `tango_bounds`.
    """
    columns = np.atleast_2d(np.asarray(counts, dtype=np.float64))
    table = columns.reshape(-1, columns.shape[-1])
    size = np.broadcast_to(_alpha(0.95) if z is None else z, columns.shape[:-1]).reshape(-1)

    def end(level: np.ndarray) -> np.ndarray:
        def excess(mean: np.ndarray, column: np.ndarray) -> np.ndarray:
            # Infinite at the ends of the scale, where a root finder needs a number of the right sign.
            found = mean_score_z(values, table[column], mean, lowest, highest) - level[column]
            return np.clip(np.nan_to_num(found), -1e6, 1e6)

        bracket = np.full(len(table), float(lowest)), np.full(len(table), float(highest))
        found = elementwise.find_root(
            excess, bracket, args=(np.arange(len(table)),), tolerances={"xatol": 1e-10, "xrtol": 1e-10}
        )
        at_low, at_high = (excess(edge, np.arange(len(table))) for edge in bracket)
        inside = np.where(at_low <= 0, lowest, np.where(at_high >= 0, highest, found.x))
        return np.asarray(inside.reshape(np.shape(counts)[:-1]))

    return end(size), end(-size)


def holm(p: Sequence[float] | np.ndarray) -> np.ndarray:
    """p-values [hypotheses] adjusted so that rejecting those up to a level errs at all with that probability at most.

    Whatever their dependence. Holm 1979, "A simple sequentially rejective multiple test procedure", Scandinavian
    Journal of Statistics 6; equal to R's p.adjust(p, "holm").
    """
    found = np.asarray(p, dtype=np.float64)
    order = np.argsort(found, kind="stable")
    adjusted = np.empty(len(found))
    adjusted[order] = np.minimum(np.maximum.accumulate(found[order] * np.arange(len(found), 0, -1)), 1)
    return adjusted


def images_to_qualify(values: np.ndarray, counts: np.ndarray, margin: float, level: float) -> int | None:
    """The number of images that would show, in four cases of five, that the mean lies above -margin.

    values [K], counts [K]: of the images seen (see `mean_score_z`), which others are taken to be like; level: of the
    one-sided test. Without a single difference, half a one to each side is assumed, as by `images_needed`. Rounded up
    to two digits, and more than the images seen unless those do. None where the mean seen is -margin or less: more of
    the same would never do.
    """
    v, count = np.asarray(values, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    n = count.sum()
    mean = float(count @ v / n) if n else 0.0
    if not n or mean <= -margin:
        return None
    if not np.any(count[v != 0]):
        v, count = np.array([-1.0, 0.0, 1.0]), np.array([0.5, n - 1, 0.5])
    spread = math.sqrt(float(count @ (v - mean) ** 2 / n))
    at_margin = math.sqrt(float(_mean_variance(v, count, np.asarray(-margin), -1, 1)))
    root = (float(stats.norm.isf(level)) * at_margin + float(stats.norm.isf(1 - POWER)) * spread) / (mean + margin)
    return round_up(max(root**2, 1.0))


def verdict(first_only: int, second_only: int, n: int, margin: float, confidence: float = 0.95) -> Verdict:
    """The verdict on the second against the first.

    no_loss: non-inferior by the margin, at a one-sided level of (1 - confidence) / 2. loss: a loss is shown (the
    interval lies below 0), and that it is within the margin is not. Else undecided, with `images_needed`.
    """
    if non_inferiority(first_only, second_only, n, margin) < (1 - confidence) / 2:
        return Verdict(VerdictKind.no_loss, margin, n)
    if tango(first_only, second_only, n, confidence).high < 0:
        return Verdict(VerdictKind.loss, margin, n)
    needed = images_needed(first_only, second_only, n, margin, confidence)
    return Verdict(VerdictKind.undecided, margin, n, needed)


def images_needed(first_only: int, second_only: int, n: int, margin: float, confidence: float = 0.95) -> int:
    """The number of images that would settle it in four cases of five, were predictions to disagree as they do here.

    Settled is either non-inferiority by the margin or a loss. The observed difference of M images is taken as normal,
    with the standard deviation that goes with the difference seen; it must lie beyond z_alpha standard errors, under
    the hypothesis tested, of -margin from above or of 0 from below. Without a single disagreement one is assumed,
    since none would mean that nothing is left to chance. Rounded up to two digits, and more than n. Raises ValueError
    for n = 0.
    """
    _check_counts(first_only, second_only, n)
    if n == 0:
        raise ValueError("no images, no estimate")
    share, difference = max(first_only + second_only, 1) / n, (second_only - first_only) / n
    b, c = np.asarray((share - difference) / 2 * n), np.asarray((share + difference) / 2 * n)
    spread = max(math.sqrt(max(share - difference**2, 0)), 1e-9)
    spread_at_margin, spread_at_zero = (
        math.sqrt(_score_variance(np.asarray(d), b, c, np.asarray(n))) for d in (-margin, 0.0)
    )

    def lacking(log_images: float) -> float:
        root = math.exp(log_images / 2)
        non_inferior = ((difference + margin) * root - _alpha(confidence) * spread_at_margin) / spread
        loss = (-difference * root - _alpha(confidence) * spread_at_zero) / spread
        return POWER - float(stats.norm.cdf(non_inferior) + stats.norm.cdf(loss))

    # One of the two grows with every image, since the difference is not both 0 and -margin.
    start = math.log(n + 1)
    if lacking(start) <= 0:
        return n + 1
    return round_up(math.exp(optimize.brentq(lacking, start, start + 60)))


def detectable(first_only: int, second_only: int, n: int, confidence: float = 0.95) -> float:
    """The smallest true difference that n images show in four cases of five (two-sided, at 1 - confidence).

    At the rate of disagreement seen, or at the difference itself where that is larger: solves
    d sqrt(n) = z_alpha sqrt(s) + z_beta sqrt(s - d^2), s = max((first_only + second_only) / n, d).
    Connor 1987, "Sample size for testing differences in proportions for the paired-sample design", Biometrics 43.
    """
    _check_counts(first_only, second_only, n)
    share = (first_only + second_only) / n if n else 1.0

    def excess(d: float) -> float:
        s = max(share, d)
        return d * math.sqrt(n) - _alpha(confidence) * math.sqrt(s) - stats.norm.isf(1 - POWER) * math.sqrt(s - d * d)

    # Not from 0, which is a root where no prediction differs.
    return float(optimize.brentq(excess, 1e-12, 1)) if excess(1) > 0 else 1.0


def _alpha(confidence: float) -> float:
    return float(stats.norm.isf((1 - confidence) / 2))


def round_up(value: float) -> int:
    """Rounded up to two significant digits."""
    unit = 10 ** max(math.floor(math.log10(value)) - 1, 0)
    return math.ceil(value / unit - 1e-9) * unit


@dataclass(frozen=True)
class Summary:
    """Durations of calls in the unit of the samples; iqr: 75th minus 25th percentile; p99: None under 1,000 calls."""

    calls: int
    p50: float
    p90: float
    p99: float | None
    minimum: float
    iqr: float


def summarise(samples: np.ndarray) -> Summary:
    """Percentiles of all samples [calls] (none is dropped), linear between neighbours as numpy's default."""
    if not len(samples):
        raise ValueError("no samples to summarise")
    p25, p50, p75, p90, p99 = np.percentile(samples.astype(np.float64), [25, 50, 75, 90, 99]).tolist()
    return Summary(
        calls=len(samples),
        p50=p50,
        p90=p90,
        p99=p99 if len(samples) >= CALLS_FOR_P99 else None,
        minimum=float(samples.min()),
        iqr=p75 - p25,
    )


def median_ratio(ratios: Sequence[np.ndarray], confidence: float = 0.95, resamples: int = 2000) -> Interval:
    """The median of paired ratios with a percentile bootstrap interval that resamples workers, then blocks.

    ratios: of each worker (a fresh process), the ratios of its pairs of blocks, float64 [pairs]; the median is over
    the pairs of all workers. Under five workers the workers stay as they are and blocks are resampled within each:
    the interval then leaves out how workers differ, and `method` says so. Raises ValueError where a worker has none.
    Davison and Hinkley 1997, "Bootstrap Methods and their Application", section 3.8.
    """
    workers = [np.asarray(worker, dtype=np.float64) for worker in ratios]
    if not workers or min(len(worker) for worker in workers) == 0:
        raise ValueError("every worker must have at least one pair of blocks")
    rng = np.random.default_rng(0)
    hierarchical = len(workers) >= WORKERS_TO_RESAMPLE
    sizes = np.array([len(worker) for worker in workers])
    padded = np.full((len(workers), sizes.max()), np.nan)
    for row, worker in zip(padded, workers, strict=True):
        row[: len(worker)] = worker
    shape = (resamples, len(workers))
    chosen = rng.integers(len(workers), size=shape) if hierarchical else np.broadcast_to(np.arange(len(workers)), shape)
    blocks = (rng.random((*shape, sizes.max())) * sizes[chosen][..., None]).astype(np.intp)
    drawn = padded[chosen[..., None], blocks]
    # Each worker contributes as many blocks as it has.
    drawn[np.arange(sizes.max()) >= sizes[chosen][..., None]] = np.nan
    medians = _medians(drawn.reshape(resamples, -1))
    low, high = np.percentile(medians, [50 * (1 - confidence), 50 * (1 + confidence)])
    scope = "workers, then blocks" if hierarchical else f"blocks within {len(workers)} worker{'s' * (len(workers) > 1)}"
    return Interval(
        float(np.median(np.concatenate(workers))), float(low), float(high), confidence, f"bootstrap of {scope}"
    )


def _medians(rows: np.ndarray) -> np.ndarray:
    """Medians of rows [rows, values] without their NaNs, of which no row is full; many times as fast as nanmedian."""
    ordered = np.sort(rows, axis=1)  # NaNs last
    counts = np.sum(~np.isnan(rows), axis=1)
    index = np.arange(len(rows))
    return np.asarray((ordered[index, (counts - 1) // 2] + ordered[index, counts // 2]) / 2)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean of two values or more with Student's t interval: mean ± t(n - 1) s / sqrt(n)."""
    freedom, mean = len(values) - 1, fmean(values)
    half = _t(1 - (1 - confidence) / 2, freedom) * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, confidence, "Student t")


def _t(p: float, freedom: int) -> float:
    """The quantile p of Student's t distribution; many times as fast as stats.t.ppf."""
    return float(special.stdtrit(freedom, p))


def pooled_spread(samples: Iterable[Sequence[float]]) -> tuple[float, int]:
    """(standard deviation within samples, its degrees of freedom): the root of the mean variance weighted by df.

    (0, 0) where no sample has two values. The root of an analysis of variance's residual mean square.
    """
    within = [sample for sample in samples if len(sample) > 1]
    freedom = sum(len(sample) - 1 for sample in within)
    squares = sum((value - mean) ** 2 for sample in within for mean in [fmean(sample)] for value in sample)
    return (math.sqrt(squares / freedom), freedom) if freedom else (0.0, 0)


def spread_interval(spread: float, freedom: int, confidence: float = 0.95) -> Interval:
    """A standard deviation with its chi-square interval: s sqrt(df / chi2(upper)), s sqrt(df / chi2(lower))."""
    tail = (1 - confidence) / 2
    # chdtri takes the probability of the upper tail.
    low, high = (spread * math.sqrt(freedom / float(special.chdtri(freedom, p))) for p in (tail, 1 - tail))
    return Interval(spread, low, high, confidence, "chi-square")


@dataclass(frozen=True)
class Plateau:
    """index: of the smallest size that no larger one is shown to beat, the last where each one is beaten; spread:
    standard deviation within sizes; gains: of each larger size's mean over its, or, at the last, of the last's over
    that of the one before, with simultaneous 95% intervals.
    """

    index: int
    spread: float
    gains: tuple[Interval, ...]


def plateau(samples: Sequence[Sequence[float]], exact: bool = False) -> Plateau | None:
    """The size from which on no larger one is shown to have a greater mean; None where no value differs within a size.

    samples: of each size its values, smallest size first; exact: the last size's mean has no error.
    From the smallest up, a size is compared with all larger ones, by intervals that hold together at 95% (Bonferroni:
    t(1 - 0.025 / number of larger sizes)); the first without a larger size whose whole interval lies above 0 is it.
    The spread is pooled over the sizes compared; as it shrinks with the size, the smallest one's own is taken for its
    mean where that is larger (pooling alone would see a rise where there is none in 11% of sweeps over seven sizes of
    three values, whose spreads halve from each to the next; so it is 5%, and 1.5% where spreads are equal). The order
    of the tests is fixed and the first that doesn't reject is the last, so their number needs no correction.
    That no gain was shown isn't that there is none: the gains' upper ends say how large it could be.
    Hsu and Berger 1999, "Stepwise confidence intervals without multiplicity adjustment for dose-response and toxicity
    studies", JASA 94; Dunn 1961, "Multiple comparisons among means", JASA 56.
    """
    found = None
    for index in range(len(samples) - 1):
        found = _gains(samples, index, exact)
        if found is None or all(gain.low <= 0 for gain in found.gains):
            return found
    return replace(found, index=len(samples) - 1) if found else None


def enough(samples: Sequence[Sequence[float]], margin: float, exact: bool = False) -> int | None:
    """The index of the smallest size from which on larger ones are shown to bring less than the margin; None if none.

    The counterpart of `plateau`, which shows that a size is too small: from the last but one down, a size is enough if
    the upper end of each of its gains is below the margin, in the unit of the values, until one isn't. Again the order
    is fixed, and a size is called enough that isn't in at most 2.5% of cases (Hsu and Berger 1999, on toxicity).
    """
    result = None
    for index in reversed(range(len(samples) - 1)):
        found = _gains(samples, index, exact)
        if found is None or any(gain.high >= margin for gain in found.gains):
            break
        result = index
    return result


def _gains(samples: Sequence[Sequence[float]], index: int, exact: bool) -> Plateau | None:
    """The gains of all larger sizes over this one, as `plateau` defines them, and the spread behind them."""
    own, larger = samples[index], samples[index + 1 :]
    spread, freedom = pooled_spread(samples[index:])
    if spread < NO_SPREAD:
        spread, freedom = pooled_spread(samples)
    if spread < NO_SPREAD:
        return None
    t = _t(1 - 0.025 / len(larger), freedom)
    variance = max(spread, pooled_spread([own])[0]) ** 2 / len(own)
    gains = []
    for number, sample in enumerate(larger, start=1):
        of_other = 0.0 if exact and number == len(larger) else spread**2 / len(sample)
        gain, half = fmean(sample) - fmean(own), t * math.sqrt(variance + of_other)
        gains.append(Interval(gain, gain - half, gain + half, 0.95, "pooled t, Bonferroni"))
    return Plateau(index, spread, tuple(gains))
