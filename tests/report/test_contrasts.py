"""Contrasts of runs against direct computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from qexp import statistics
from qexp.records import Interval
from qexp.report import contrasts
from qexp.report.contrasts import Answers, Contrast, Difference, Timing
from tests.helpers.studies import IMAGES, right

PAIR = np.array([1, -1])


def pair(*members: tuple[int, int]) -> Contrast:
    return Contrast(np.array(members), PAIR)


def answers(*correct: np.ndarray) -> list[Answers]:
    return [Answers(float(one.mean()), one) for one in correct]


def sure(found: Difference | None) -> tuple[Difference, Interval]:
    """A difference that there is, with its interval."""
    assert found
    assert found.interval
    return found, found.interval


# ---- Accuracy


def test_one_pair_has_tangos_interval() -> None:
    runs = answers(right(1, 2, 3, 4, 5, won=[950]), right(1, won=[960, 970]))
    (one,), critical = contrasts.of_accuracy(runs, [pair((1, 0))])
    # The second alone has four images and two that the first lost, and lacks one that the first won.
    expected = statistics.tango(1, 6, IMAGES)
    found, interval = sure(one)
    assert critical == pytest.approx(stats.norm.isf(0.025))
    assert (found.value, found.units, found.nothing) == (pytest.approx(0.005), IMAGES, False)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=1e-7)


def test_many_pairs_have_one_value_an_image() -> None:
    """The mean over pairs on each image, so that pairs that answer alike make no interval narrower."""
    a, b = right(*range(20)), right(*range(5))
    runs = answers(a, b, a, b)
    one, of_one = sure(contrasts.of_accuracy(runs, [pair((1, 0))])[0][0])
    two, of_two = sure(contrasts.of_accuracy(runs, [pair((1, 0), (3, 2))])[0][0])
    assert (two.value, two.units) == (one.value, one.units)
    assert (of_two.low, of_two.high) == pytest.approx((of_one.low, of_one.high), abs=1e-7)
    # Pairs that differ on other images each do, since an image then counts by half.
    apart = answers(right(*range(20)), right(*range(5)), right(*range(100, 120)), right(*range(100, 105)))
    _, of_other = sure(contrasts.of_accuracy(apart, [pair((1, 0), (3, 2))])[0][0])
    low, high = statistics.mean_score_interval(np.array([0, 0.5]), np.array([IMAGES - 30, 30]))
    assert (of_other.low, of_other.high) == pytest.approx((float(low), float(high)), abs=1e-7)
    assert of_other.high - of_other.low < of_one.high - of_one.low


def test_no_difference_at_all_has_an_interval_and_is_said_to_be_nothing() -> None:
    runs = answers(right(1, 2), right(1, 2), right(2, 1))
    found, interval = sure(contrasts.of_accuracy(runs, [pair((1, 0), (2, 0))])[0][0])
    assert (found.nothing, found.shown, found.clarity) == (True, False, 0)
    assert -0.01 < interval.low < 0 < interval.high < 0.01


def test_the_critical_value_is_that_of_the_largest_of_correlated_deviates() -> None:
    rng = np.random.default_rng(1)
    base = rng.random((5, 4000)) < 0.9
    runs = answers(*base)
    independent = [pair((0, 1)), pair((2, 3))]
    _, two = contrasts.of_accuracy(runs, independent)
    assert two == pytest.approx(stats.norm.isf((1 - math.sqrt(0.95)) / 2), abs=0.03)
    _, same = contrasts.of_accuracy(runs, [independent[0]] * 5)
    assert same == pytest.approx(stats.norm.isf(0.025), abs=0.03)
    # All against one: correlations of a half, as of Dunnett's.
    _, dunnett = contrasts.of_accuracy(runs, [pair((index, 0)) for index in range(1, 5)])
    expected = stats.multivariate_t(shape=np.full((4, 4), 0.5) + np.eye(4) / 2, df=np.inf, seed=0)
    box = expected.cdf(np.full(4, dunnett), lower_limit=np.full(4, -dunnett))
    assert box == pytest.approx(0.95, abs=0.005)
    # One that nothing is known of the variance of counts as independent of all others.
    _, constant = contrasts.of_accuracy([*runs, runs[0]], [independent[0], pair((5, 0))])
    assert constant == pytest.approx(two, abs=0.03)


def test_runs_on_different_images_are_compared_on_those_that_they_share() -> None:
    images = np.array([700, 3, 1, 950])
    whole, part = right(1, 5, 6, 7), right(3, won=[950])[images]
    runs = [Answers(0.9, whole), Answers(0.9, part, images), Answers(0.9, right(5))]
    (found, _), (full, _) = map(sure, contrasts.of_accuracy(runs, [pair((1, 0)), pair((2, 0))])[0])
    # Of the four, the first has 3 and 700, the second 1, 700 and 950.
    assert (found.value, found.units) == (pytest.approx(0.25), 4)
    assert (full.value, full.units) == (pytest.approx(0.003), IMAGES)


def test_where_answers_are_missing_the_interval_is_at_least_as_wide() -> None:
    rng = np.random.default_rng(0)
    correct = [right(*rng.choice(900, 30, replace=False).tolist()) for _ in range(8)]
    known = answers(*correct)
    members = pair((1, 0), (3, 2), (5, 4), (7, 6))
    (one,), z = contrasts.of_accuracy(known, [members])
    paired, narrow = sure(one)
    error = statistics.tango(30, 0, IMAGES)
    unknown = [Answers(run.accuracy, None, None, (error.high - error.low) / 2 / z, IMAGES) for run in known]
    bounded, wide = sure(contrasts.of_accuracy(unknown, [members])[0][0])
    assert (bounded.value, bounded.units) == (pytest.approx(paired.value), IMAGES)
    assert wide.low < narrow.low < narrow.high < wide.high
    assert "conservative" in wide.method
    # A run whose error isn't known either leaves the estimate alone.
    (bare,), _ = contrasts.of_accuracy([*unknown[:7], Answers(known[7].accuracy)], [members])
    assert bare
    assert (bare.value, bare.interval, bare.shown) == (pytest.approx(paired.value), None, False)


def test_a_run_without_accuracy_takes_its_pair_along() -> None:
    runs = [*answers(right(1, 2, 3), right(1)), Answers(math.nan)]
    (found, none), _ = contrasts.of_accuracy(runs, [pair((1, 0), (2, 0)), pair((2, 1))])
    assert sure(found)[0].value == pytest.approx(0.002)
    assert none is None
    assert contrasts.of_accuracy(runs, [])[0] == []


# ---- Speed


def timing(key: object, speedup: float, error: float = 0.01) -> Timing:
    return Timing(key, math.log(speedup), error)


def test_one_pair_of_timings_has_the_error_of_both() -> None:
    found, interval = sure(contrasts.of_speed([timing("a", 4), timing("b", 5, 0.02)], [pair((1, 0))])[0])
    half = stats.norm.isf(0.025) * math.hypot(0.01, 0.02)
    assert (found.value, found.units, found.shown) == (pytest.approx(1.25), 1, True)
    assert (interval.low, interval.high) == pytest.approx((1.25 * math.exp(-half), 1.25 * math.exp(half)))


def test_a_shared_timing_is_one_measurement() -> None:
    shared = [timing("a", 4), timing("b", 5), timing("a", 4), timing("b", 5), timing("a", 4), timing("b", 5)]
    (one,) = contrasts.of_speed(shared, [pair((1, 0))])
    (three,) = contrasts.of_speed(shared, [pair((1, 0), (3, 2), (5, 4))])
    assert one == three
    same, interval = sure(contrasts.of_speed(shared, [pair((2, 0), (3, 1))])[0])
    assert (same.value, interval.low, interval.high, same.nothing) == (1, 1, 1, True)
    # Two timings against one have its error in common: 0.01 (1 + 1/2)^(1/2).
    timings = [timing("a", 4), timing("b", 5), timing("c", 5)]
    common, interval = sure(contrasts.of_speed(timings, [pair((1, 0), (2, 0))])[0])
    half = stats.norm.isf(0.025) * 0.01 * math.sqrt(1.5)
    assert math.log(interval.high / common.value) == pytest.approx(half)


def test_a_spread_between_pairs_that_is_larger_counts() -> None:
    ratios = (1.1, 1.3, 1.2)
    timings = [one for n, ratio in enumerate(ratios) for one in (timing(2 * n, 4), timing(2 * n + 1, 4 * ratio))]
    found, interval = sure(contrasts.of_speed(timings, [pair((1, 0), (3, 2), (5, 4))])[0])
    logs = np.log(ratios)
    half = stats.norm.isf(0.025) * logs.std(ddof=1) / math.sqrt(3)
    assert math.log(found.value) == pytest.approx(logs.mean())
    assert math.log(interval.high / found.value) == pytest.approx(half)
    assert found.units == 3


def test_speeds_hold_together_over_the_contrasts_that_were_measured() -> None:
    timings = [timing("a", 4), timing("b", 5), timing("c", 6), timing("a", 4), None]
    one, *_, none = contrasts.of_speed(timings, [pair((1, 0)), pair((2, 0)), pair((3, 0)), pair((4, 0))])
    found, interval = sure(one)
    half = stats.norm.isf(0.025 / 2) * math.hypot(0.01, 0.01)
    assert math.log(interval.high / found.value) == pytest.approx(half)
    assert none is None


def test_pairs_that_cancel_each_others_timings_tell_nothing() -> None:
    timings = [timing("a", 4), timing("b", 5), timing("b", 5), timing("a", 4)]
    (found,) = contrasts.of_speed(timings, [pair((1, 0), (3, 2))])
    assert found
    assert (found.value, found.interval, found.nothing) == (1, None, False)


def test_a_timing_without_an_interval_needs_a_spread() -> None:
    timings = [timing(n, 4 + n / 10, math.nan) for n in range(4)]
    one, two = contrasts.of_speed(timings, [pair((1, 0)), pair((1, 0), (3, 2))])
    assert one
    assert (one.value, one.interval, one.clarity) == (pytest.approx(4.1 / 4), None, 0)
    assert sure(two)
