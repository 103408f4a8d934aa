"""The goal of a search, on runs whose losses and timings are planted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from qexp import statistics
from qexp.config.schema import Config, Report
from qexp.errors import ConfigError
from qexp.launch.goal import Goal, Outcome, goal_of
from qexp.records import PARTED_TAG, RunRecord
from tests.helpers.planted import Planted, question, study

IMAGES = 10_000


def run(broken: int, speedup: float | None, **given: object) -> RunRecord:
    return study(Planted("run", broken, speedup, **given), images=IMAGES).records[0]  # type: ignore[arg-type]


def outcome(record: RunRecord, asked: Report, timed: bool = True) -> Outcome:
    found = Goal(asked, timed).outcome(record)
    assert found is not None
    return found


@pytest.mark.parametrize(("broken", "kept"), [(10, True), (30, True), (45, False), (80, False)])
def test_the_fastest_is_bounded_by_what_a_single_run_is_shown_to_lose(broken: int, kept: bool) -> None:
    low = statistics.tango(broken, 0, IMAGES).low
    found = outcome(run(broken, 2.0), question(margin=0.005))
    assert found.value == pytest.approx(5.0)  # of 10 ms
    assert found.excess == pytest.approx(-0.005 - low)
    assert (found.excess <= 0) == kept == (statistics.tango_z(-0.005, broken, 0, IMAGES) >= 1.96)


def test_of_a_run_s_runtimes_the_fastest_that_keeps_the_bound_counts_and_none_that_has_parted() -> None:
    others = {"openvino": (80, 5.0), "onnxruntime": (12, 3.0)}
    record = run(10, 2.0, others=others)
    assert outcome(record, question()).value == pytest.approx(10 / 3)
    assert outcome(record, question(runtime="eager")).value == pytest.approx(5.0)
    parted = replace(record, tags={**record.tags, PARTED_TAG: "onnxruntime"})
    assert outcome(parted, question()).value == pytest.approx(5.0)


def test_the_smallest_and_the_most_accurate_have_their_own_values_and_bounds() -> None:
    record = run(30, 2.0)
    assert outcome(record, question("smallest")).value == pytest.approx(10.0)  # MB
    accurate = Goal(question("accurate", max_ms=4.0), True)
    assert accurate.direction == "maximize"
    found = accurate.outcome(record)
    assert found is not None
    assert (found.value, found.excess) == pytest.approx((-0.003, 1.0))


def test_where_nothing_is_timed_the_most_accurate_is_searched_for() -> None:
    record = run(30, None)
    assert Goal(question(), True).outcome(record) is None
    goal = Goal(question(), False)
    assert goal.direction == "maximize"
    assert goal.outcome(record) == Outcome(pytest.approx(-0.003), None)


def test_a_time_to_keep_needs_timings(composed: Callable[..., Config]) -> None:
    asked = ("report.objective=accurate", "report.max_ms=2", "latency=off")
    with pytest.raises(
        ConfigError, match=r"report.objective=accurate: .*max_ms=2, and latency=off measures no latency"
    ):
        goal_of(composed(*asked))
    assert goal_of(composed(*asked[:2])).timed
