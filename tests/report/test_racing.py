"""Racing: its chances against exact laws, and that it can't make anything qualify."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from scipy import stats

from qexp import statistics
from qexp.config import schema
from qexp.metrics import Metric
from qexp.records import RACING_TAG, SAME_TAG, Interval, RunRecord
from qexp.report import decision, effects, evidence, racing, sentences, study
from qexp.report.candidates import LEVEL, candidates
from qexp.report.racing import Evaluated, Reason
from qexp.report.study import Latency
from tests.helpers import studies


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


def test_what_few_rivals_stop_many_rivals_stop_too() -> None:
    """So a sweep of jobs side by side, of which fewer have finished, stops no more than one after the other."""
    rng = np.random.default_rng(3)
    images, margin, stopped = 2000, 0.02, 0
    for _ in range(60):
        settings = [
            Evaluated(rng.choice([-1, 0, 1], images, p=[loss, 1 - loss - 0.005, 0.005]).astype(np.int8), timed(speed))
            for loss, speed in zip(rng.uniform(0, 0.04, 6), rng.uniform(1.5, 3, 6), strict=True)
        ]
        one = Evaluated(settings[0].differences[:800], settings[0].latency)
        few = racing.reason_to_stop(one, settings[1:3], images, margin)
        stopped += few is not None
        if few:
            assert racing.reason_to_stop(one, settings[1:], images, margin) is few
    assert 10 < stopped < 50


def stopped_run(name: str, correct: np.ndarray, seen: int, reason: str, **params: str) -> RunRecord:
    """A run of the study that racing stopped after the first `seen` of its images."""
    fp32 = np.arange(len(correct)) < 0.9 * len(correct)
    order = statistics.random_order(len(correct))[:seen]
    lost, won = np.sum((fp32 & ~correct)[order]), np.sum((correct & ~fp32)[order])
    metrics = {
        Metric.race_images: float(seen), Metric.race_all_images: float(len(correct)),
        Metric.race_fp32_only.of("torchscript"): float(lost), Metric.race_int8_only.of("torchscript"): float(won),
    }  # fmt: skip
    tags = {"cpu": "a", RACING_TAG: reason, SAME_TAG: "torchscript"}
    return RunRecord(name, name, "KILLED", params=params, metrics=dict(metrics), tags=tags)


def test_a_stopped_setting_is_in_the_family_with_p_1_and_in_no_comparison() -> None:
    runs = [studies.run("good", studies.right(1), 2.0, observer="a"),
            studies.run("open", studies.right(*range(12)), 3.0, observer="b")]  # fmt: skip
    bad = stopped_run("bad", studies.right(*range(500)), 300, "futility", observer="c")
    slow = stopped_run("slow", studies.right(*range(5)), 100, "domination", observer="d")
    records = [*(record for record, _ in runs), bad, slow]
    (raced,) = study.studies(records, {record.run_id: top1 for record, top1 in runs})
    question = schema.Report(True, schema.ReportObjective.fastest, 0.02, None, None, None, None)
    found = decision.recommend(raced, question)
    by_name = {one.ships.name: one for one in found.candidates}
    alone = {one.ships.name: one for one in candidates(studies.study(runs), question)}
    expected = statistics.holm([alone["good"].p, alone["open"].p, 1.0, 1.0])
    assert [by_name[name].adjusted for name in ("good", "open")] == pytest.approx(expected[:2].tolist())
    for name in ("bad", "slow"):
        assert (by_name[name].p, by_name[name].adjusted, by_name[name].qualifies) == (1, 1, False)
        assert by_name[name].delta is None
    assert found.chosen is not None
    assert found.chosen.ships.name == "good"
    assert "after Holm over 4 candidates" in " ".join(sentences.recommendation(found))
    assert evidence.outcome(found, by_name["bad"])[1] == "stopped by racing: after 300 of 1,000 images (futility)"
    assert {evidence.label(one) for one in found.candidates} == {"a", "b", "c", "d"}
    assert not study.unfinished(records)
    axes = effects.main_effects(raced, None, found.conditions).axes
    assert {one.value for axis in axes for one in axis.effects} <= {"a", "b"}


def test_where_all_lose_as_far_as_they_were_seen_the_answer_is_to_stay_on_fp32() -> None:
    records = [stopped_run(name, studies.right(*range(500)), 300, "futility", observer=name) for name in "ab"]
    question = schema.Report(True, schema.ReportObjective.fastest, 0.02, None, None, None, None)
    (raced,) = study.studies(records)
    assert decision.recommend(raced, question).kind is decision.Answer.stay_on_fp32
    # With few images the same is not shown: they can hardly qualify, and nobody knows.
    few = [stopped_run(name, studies.right(*range(30)), 100, "futility", observer=name) for name in "ab"]
    (raced,) = study.studies(few)
    found = decision.recommend(raced, question)
    assert found.kind is decision.Answer.cant_tell
    assert found.chosen is None
    assert " ".join(sentences.recommendation(found))


def test_the_order_is_the_same_for_all_and_random() -> None:
    order = statistics.random_order(744)
    assert np.array_equal(order, statistics.random_order(744))
    assert np.array_equal(np.sort(order), np.arange(744))
    assert not np.array_equal(order, np.arange(744))


@pytest.mark.parametrize(("images", "batch_size"), [(744, 32), (10_000, 32), (31, 32), (10, 1), (744, 1)])
def test_blocks_are_whole_batches_but_for_the_last(images: int, batch_size: int) -> None:
    ends = racing.block_ends(images, batch_size)
    assert ends[-1] == images
    assert ends == sorted(set(ends))
    assert len(ends) <= racing.BLOCKS
    assert all(end % batch_size == 0 for end in ends[:-1])
