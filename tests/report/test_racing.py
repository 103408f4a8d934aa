"""Racing: its chances against exact laws, and that it can't make anything qualify."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from scipy import stats

from qexp import statistics
from qexp.records import Interval
from qexp.report import racing
from qexp.report.candidates import LEVEL
from qexp.report.racing import Evaluated, Reason
from qexp.report.study import Latency


def just_qualifying(images: int, won: int, margin: float) -> int:
    """The most images that a setting can lose and still qualify by itself, by Tango's test on all images."""
    critical = stats.norm.isf(LEVEL)
    return max(lost for lost in range(images // 10) if statistics.tango_z(-margin, lost, won, images) >= critical)


def stopping(images: int, seen: int, minus: int, plus: int, chance: Callable[[int, int], float]) -> float:
    """The probability that a chance is too small, where `minus` and `plus` of all images differ: exact, since those
    among the images seen have a multivariate hypergeometric law. chance: by their numbers."""
    total = 0.0
    for b, of_b in enumerate(stats.hypergeom.pmf(np.arange(minus + 1), images, minus, seen)):
        if of_b > 1e-9:
            of_c = stats.hypergeom.pmf(np.arange(plus + 1), images - minus, plus, seen - b)
            total += sum(of_b * p for c, p in enumerate(of_c) if p > 1e-9 and chance(b, c) < racing.CHANCE)
    return total


@pytest.mark.parametrize(
    ("images", "won", "margin"),
    [(744, 0, 0.02), (744, 5, 0.02), (2000, 10, 0.005), (2000, 40, 0.01), (10_000, 50, 0.005)],
)
def test_a_setting_that_just_qualifies_is_stopped_at_a_look_as_rarely_as_is_said(
    images: int, won: int, margin: float
) -> None:
    lost = just_qualifying(images, won, margin)
    for seen in racing.block_ends(images)[:-1]:
        chance = partial(racing.chance_to_qualify, seen=seen, images=images, margin=margin)
        stopped = stopping(images, seen, lost, won, chance)
        assert stopped < 1.2 * racing.CHANCE


def test_what_can_t_qualify_is_stopped_long_before_the_end_and_what_qualifies_is_not() -> None:
    rng = np.random.default_rng(0)
    images, margin = 10_000, 0.005
    ends = racing.block_ends(images)
    assert ends[-1] == images
    assert len(ends) == racing.BLOCKS

    def stopped_at(lost: int, won: int) -> tuple[int | None, Reason | None]:
        differences = np.zeros(images, dtype=np.int8)
        differences[:lost], differences[lost : lost + won] = -1, 1
        differences = rng.permutation(differences)
        for seen in ends:
            reason = racing.reason_to_stop(Evaluated(differences[:seen], None), [], images, margin)
            if reason:
                return seen, reason
        return None, None

    bad = [stopped_at(250, 50) for _ in range(10)]  # 2 points lost
    assert {reason for _, reason in bad} == {Reason.futility}
    assert max(seen or images for seen, _ in bad) <= 4000
    assert [stopped_at(50, 50) for _ in range(10)] == [(None, None)] * 10
    open_ones = [stopped_at(just_qualifying(images, 50, margin), 50) for _ in range(100)]
    assert sum(seen is not None for seen, _ in open_ones) <= 5  # 2% expected at most


def test_the_chance_to_keep_up_is_that_of_a_random_sample() -> None:
    """One of two settings that end equal is stopped at a look about as rarely as is said."""
    images, apart = 2000, 60
    for seen in racing.block_ends(images)[:-1]:
        chance = partial(racing.chance_to_keep_up, seen=seen, images=images)
        stopped = stopping(images, seen, apart, apart, chance)
        assert stopped < 2 * racing.CHANCE  # of a law with few values, in its tail


def timed(speedup: float, half: float = 0.02) -> Latency:
    interval = Interval(speedup, speedup * math.exp(-half), speedup * math.exp(half), 0.95, "")
    return Latency("eager", 1, 1, 10 / speedup, 10.0, interval)


def test_only_one_that_is_clearly_faster_and_more_accurate_dominates() -> None:
    images, seen = 10_000, 2000
    rng = np.random.default_rng(1)
    good = np.zeros(images, dtype=np.int8)
    worse = np.where(rng.random(images) < 0.02, -1, 0).astype(np.int8)
    one = Evaluated(worse[:seen], timed(2.0))

    def found(other: Evaluated, this: Evaluated = one) -> Reason | None:
        return racing.reason_to_stop(this, [other], images, margin=0.5)

    assert found(Evaluated(good, timed(3.0))) is Reason.domination
    assert found(Evaluated(good, timed(2.02))) is None  # as fast, as far as can be told
    assert found(Evaluated(good, timed(1.5))) is None
    assert found(Evaluated(good, None)) is None
    assert found(Evaluated(worse, timed(3.0))) is None  # as accurate
    assert found(Evaluated(worse, timed(3.0)), Evaluated(good[:seen], timed(2.0))) is None
    assert found(Evaluated(good, timed(3.0)), Evaluated(worse, timed(2.0))) is None  # all images were seen


def test_a_stopped_setting_in_the_family_with_p_1_lets_nothing_qualify_that_would_not() -> None:
    rng = np.random.default_rng(2)
    for _ in range(300):
        p = rng.random(12) ** rng.integers(1, 12)
        raced = np.where(rng.random(12) < 0.5, 1.0, p)
        everything, after = (statistics.holm(values) <= LEVEL for values in (p, raced))
        assert not np.any(after & ~everything)


def test_the_order_is_the_same_for_all_and_random() -> None:
    assert np.array_equal(racing.order(744), racing.order(744))
    assert np.array_equal(np.sort(racing.order(744)), np.arange(744))
    assert not np.array_equal(racing.order(744), np.arange(744))
