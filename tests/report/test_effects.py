"""Effects of settings, calibration samples and calibration sizes, as numbers; test_tables.py has them in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from qexp.metrics import Metric
from qexp.records import RunRecord
from qexp.report import effects as report_effects
from tests.helpers.rows import RISING, by_size, on_target, row


def effects(rows: Sequence[RunRecord]) -> dict[tuple[str, str], report_effects.MeanEffect]:
    return {(effect.setting, effect.value): effect for effect in report_effects.effects(rows)}


# ---- Accuracies


@pytest.mark.parametrize("source", list(report_effects.SOURCES))
def test_where_the_targets_cpu_is_another_its_accuracy_on_its_images_counts(source: str) -> None:
    found = report_effects.accuracy(on_target(row("a", 0.85), source, 0.8, -0.06))
    assert found is not None
    # FP32 is that on the images measured, so that the difference is the one of the two.
    assert (found.fp32, found.int8, found.delta.value, found.sampling) == pytest.approx((0.86, 0.8, -0.06, 0.01))
    assert (found.source, found.comparable) == (source, pytest.approx(0.84))


def test_where_the_target_runs_the_same_the_accuracy_of_what_ran_counts() -> None:
    here = report_effects.accuracy(row("a", 0.85))
    assert here is not None
    assert (here.fp32, here.int8, here.source, here.comparable) == (0.9, 0.85, "", 0.85)
    assert report_effects.accuracy(on_target(row("a", 0.85), "executed", 0.8, -0.06)) == here
    assert report_effects.accuracy(replace(row("a", 0.85), tags={"accuracy_source": "exact"})) == here  # not measured
    assert report_effects.accuracy(RunRecord("a", "a", "FINISHED")) is None


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


# ---- Draws


def drawn(qconfig: str, accuracies: Sequence[float]) -> list[RunRecord]:
    return [row(f"{qconfig} {n}", value, qconfig=qconfig, calib__seed=str(n)) for n, value in enumerate(accuracies)]


TENSOR, CHANNEL = drawn("per_tensor", (0.85, 0.86, 0.84)), drawn("per_channel", (0.88, 0.881))


def test_samples_are_runs_that_differ_in_their_seed_alone() -> None:
    tensor, channel = report_effects.calibration_samples([*TENSOR, *CHANNEL])
    assert (tensor.settings, tensor.accuracies) == ({"qconfig": "per_tensor"}, (0.85, 0.86, 0.84))
    assert (channel.settings, channel.accuracies) == ({"qconfig": "per_channel"}, (0.88, 0.881))
    assert tensor.sampling == pytest.approx(0.0022)
    assert report_effects.calibration_samples(TENSOR)[0].settings == {}  # nothing else varied


def test_samples_need_two_seeds_and_nothing_else_that_differs() -> None:
    assert report_effects.calibration_samples(TENSOR[:1]) == []
    assert report_effects.calibration_samples([TENSOR[0], CHANNEL[1]]) == []  # another seed, but of another setting
    assert report_effects.calibration_samples([TENSOR[0], replace(TENSOR[1], status="FAILED")]) == []
    assert (
        len(report_effects.calibration_samples([TENSOR[0], TENSOR[0], TENSOR[1]])[0].accuracies) == 2
    )  # twice one seed
    without = [replace(r, params={**r.params, "calib.seed": "n/a"}) for r in TENSOR]
    assert report_effects.calibration_samples(without) == []


def test_what_was_resolved_makes_no_setting_of_its_own() -> None:
    other = replace(TENSOR[1], params={**TENSOR[1].params, "resolved.weight_bits": "7"})
    assert len(report_effects.calibration_samples([TENSOR[0], other])) == 1


def test_the_two_kinds_of_chance_are_apart_and_both_standard_deviations() -> None:
    groups = report_effects.calibration_samples([*TENSOR, *CHANNEL])
    found = report_effects.spreads(groups)
    # 2 degrees of freedom with a variance of 0.01^2, and one with 0.001^2 / 2.
    assert found.samples.value == pytest.approx(math.sqrt((2 * 0.01**2 + 0.001**2 / 2) / 3))
    assert found.images == pytest.approx(0.0022 / stats.norm.isf(0.025))
    assert found.can_tell  # 0.82 points [0.46, 3.05] against 0.11
    for sampling, can_tell in ((0.5, True), (0.01, False), (0.02, False), (1e-5, True)):
        other = report_effects.spreads([replace(group, sampling=sampling) for group in groups])
        assert (other.samples, other.can_tell) == (found.samples, can_tell)


# ---- Calibration sizes


def test_sizes_are_in_order_and_all_images_have_no_sample() -> None:
    (found,) = report_effects.calibration_sizes(by_size(RISING))
    assert [(size.batches, size.images, size.exact) for size in found.sizes] == [
        (1, 16, False),
        (8, 128, False),
        (32, 512, False),
        (None, 898, True),
    ]
    assert [size.accuracies for size in found.sizes] == [RISING[batches] for batches in ("1", "8", "32", "null")]
    assert found.plateau is not None
    assert (found.plateau.index, found.enough, found.settings) == (1, 1, {})
    assert found.sampling == pytest.approx(0.0022)


def test_all_images_in_an_order_that_matters_have_samples() -> None:
    rows = by_size({"8": (0.80, 0.81), "null": (0.82, 0.83)})
    rows = [replace(r, params={**r.params, "calib.seed": r.name.split()[1]}) for r in rows]
    (found,) = report_effects.calibration_sizes(rows)
    assert (found.sizes[1].accuracies, found.sizes[1].exact) == ((0.82, 0.83), False)


def test_a_size_may_be_enough_only_since_all_images_have_no_spread() -> None:
    # The largest gain at 95% is t(2 degrees of freedom) * 0.05 points * sqrt(1/3): 0.12; with a spread of all, 0.25.
    (found,) = report_effects.calibration_sizes(by_size({"8": (0.80, 0.8005, 0.801), "null": (0.8005,)}))
    assert found.plateau is not None
    assert (found.plateau.gains[0].high, found.enough) == (pytest.approx(0.00124, abs=1e-5), 0)


def test_the_order_of_sizes_does_not_matter_and_a_seed_counts_once() -> None:
    rows = by_size(RISING)
    by_seed = sorted(rows, key=lambda r: (r.params["calib.seed"], -r.metrics[Metric.calibration_images]))
    assert report_effects.calibration_sizes([*by_seed, *rows]) == report_effects.calibration_sizes(rows)


def test_sizes_are_read_for_each_combination_of_the_other_settings() -> None:
    rows = [*by_size(RISING, qconfig="per_tensor"), *by_size(RISING, qconfig="per_channel")]
    found = report_effects.calibration_sizes(rows)
    assert [calibration.settings for calibration in found] == [{"qconfig": "per_tensor"}, {"qconfig": "per_channel"}]
    assert found[0].sizes == found[1].sizes


def test_all_images_go_with_each_way_of_sampling() -> None:
    rows = by_size(RISING)
    stratified = [
        replace(r, params={**r.params, "calib.sampling": "stratified"}) for r in rows if r.params["calib.seed"] != "n/a"
    ]
    found = report_effects.calibration_sizes([*rows, *stratified])
    assert [calibration.settings["calib.sampling"] for calibration in found] == ["random", "stratified"]
    assert [calibration.sizes for calibration in found] == [report_effects.calibration_sizes(rows)[0].sizes] * 2


def test_one_size_is_no_sweep_over_sizes() -> None:
    assert report_effects.calibration_sizes(by_size({"8": (0.80, 0.81)})) == []
    assert report_effects.calibration_sizes(TENSOR) == []
    assert report_effects.calibration_sizes([]) == []
