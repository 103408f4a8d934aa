"""Effects of settings, calibration samples and calibration sizes, as numbers; test_readings.py has them in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from qexp.records import RunRecord
from qexp.report import effects as report_effects
from tests.helpers.rows import on_target, row


def effects(rows: Sequence[RunRecord]) -> dict[tuple[str, str], report_effects.MeanEffect]:
    return {(effect.setting, effect.value): effect for effect in report_effects.effects(rows)}


# ---- Effects


def test_an_effect_is_the_mean_difference_among_otherwise_equal_runs() -> None:
    rows = [
        row("a", 0.80, 2.0, x="1", y="p"),
        row("b", 0.84, 3.0, x="2", y="p"),
        row("c", 0.70, 2.0, x="1", y="q"),
        row("d", 0.80, 4.0, x="2", y="q"),
        row("e", 0.10, 1.0, x="2", y="r"),  # has no partner with x=1
    ]
    by = effects(rows)
    assert (by["x", "2"].pairs, by["x", "2"].runs) == (2, 3)
    assert by["x", "2"].delta_accuracy == pytest.approx(0.07)
    assert by["x", "2"].delta_speedup == pytest.approx(1.5)
    assert (by["y", "r"].runs, by["y", "r"].pairs) == (1, 1)
    assert (by["x", "1"].accuracy, by["x", "1"].speedup) == pytest.approx((0.75, 2))


def test_a_value_without_a_partner_or_a_timing_has_no_difference() -> None:
    rows = [row("a", 0.8, 2.0, x="1", y="p"), row("b", 0.7, x="2", y="p"), row("c", 0.7, x="2", y="q")]
    rows += [row("d", 0.6, 3.0, x="3", y="q")]
    by = effects(rows)
    assert (by["x", "3"].pairs, by["x", "3"].delta_accuracy, by["x", "3"].delta_speedup) == (0, None, None)
    assert (by["x", "2"].delta_accuracy, by["x", "2"].speedup) == (pytest.approx(-0.1), None)
    assert by["x", "2"].delta_speedup is None


def test_a_failed_run_has_no_effect() -> None:
    assert report_effects.effects([row("a", 0.8, x="1"), replace(row("b", 0.1, x="2"), status="FAILED")]) == []


def test_an_effects_interval_is_that_of_students_t_over_its_pairs() -> None:
    first, second = (0.80, 0.70, 0.75, 0.60), (0.84, 0.71, 0.77, 0.66)
    rows = [row(f"a{n}", value, x="1", y=str(n)) for n, value in enumerate(first)]
    rows += [row(f"b{n}", value, x="2", y=str(n)) for n, value in enumerate(second)]
    interval = effects(rows)["x", "2"].interval
    expected = stats.ttest_1samp(np.subtract(second, first), 0).confidence_interval(0.95)
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert effects(rows)["x", "1"].interval is None
    assert effects([r for r in rows if r.params["y"] in "012"])["x", "2"].interval is not None
    assert effects([r for r in rows if r.params["y"] in "01"])["x", "2"].interval is None


def test_runs_on_different_images_are_compared_by_their_difference_to_fp32() -> None:
    rows = [on_target(row("a", 0.85, x="1"), "exact", 0.8150, -0.035), row("b", 0.8990, x="2")]
    assert effects(rows)["x", "2"].delta_accuracy == pytest.approx(-0.001 + 0.035)


def test_a_groups_choice_and_its_only_varying_field_are_one_setting() -> None:
    rows = [row("a", 0.8, qconfig="t", qconfig__weight="t"), row("b", 0.9, qconfig="c", qconfig__weight="c")]
    assert set(effects(rows)) == {("qconfig", "t"), ("qconfig", "c")}


def test_a_field_is_compared_across_its_own_groups_choices() -> None:
    rows = [
        row("a", 0.8, q="1", q__w="t", q__a="s"),
        row("b", 0.9, q="2", q__w="c", q__a="s"),
        row("c", 0.7, q="3", q__w="t", q__a="u"),
        row("d", 0.9, q="4", q__w="c", q__a="u"),
    ]
    effect = effects(rows)["q.w", "c"]
    assert (effect.pairs, effect.delta_accuracy) == (2, pytest.approx(0.15))


def test_a_field_swept_beside_its_groups_choice_is_held_and_so_is_the_choice() -> None:
    """As `experiment=overflow` does; a first value differs from itself by nothing."""
    accuracies = {("c", "none"): 0.60, ("t", "none"): 0.70, ("c", "weights"): 0.90, ("t", "weights"): 0.80}
    rows = [
        row(f"{choice} {guard}", accuracy, q=choice, q__weight=choice, q__overflow=guard)
        for (choice, guard), accuracy in accuracies.items()
    ]
    found = {key: (effect.pairs, round(effect.delta_accuracy or 0, 6)) for key, effect in effects(rows).items()}
    assert found == {
        ("q", "c"): (2, 0.0),
        ("q", "t"): (2, 0.0),  # +0.10 without the guard, -0.10 with it
        ("q.overflow", "none"): (2, 0.0),
        ("q.overflow", "weights"): (2, 0.2),  # +0.30 and +0.10
    }


def test_a_setting_that_only_had_no_effect_elsewhere_is_no_setting_of_its_own() -> None:
    rows = [row("a", 0.8, observer="minmax", observer__bins="n/a"), row("b", 0.8, observer="h", observer__bins="9")]
    rows += [row("c", 0.8, observer="moving", observer__bins="n/a")]
    assert {effect.setting for effect in report_effects.effects(rows)} == {"observer"}


def test_a_minor_field_that_goes_with_its_groups_choice_is_no_setting() -> None:
    rows = [
        row("a", 0.80, model="a", model__width="16"),
        row("b", 0.90, model="b", model__width="16"),
        row("c", 0.85, model="c", model__width="32"),
    ]
    assert {setting for setting, _ in effects(rows)} == {"model"}
    rows.append(row("d", 0.86, model="c", model__width="64"))  # typed
    assert {setting for setting, _ in effects(rows)} == {"model", "model.width"}


def test_what_was_resolved_is_no_setting() -> None:
    assert report_effects.effects([row("a", 0.8, resolved__bits="7"), row("b", 0.9, resolved__bits="8")]) == []
