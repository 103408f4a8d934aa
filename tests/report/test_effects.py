"""Effects of settings and their interactions in studies whose answers are known by construction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from qexp.metrics import Metric
from qexp.records import RunRecord, Top1
from qexp.report.contrasts import Difference
from qexp.report.effects import Axis, AxisKind, Effect, Interaction, MainEffects, interactions, main_effects
from qexp.report.study import studies
from tests.helpers.studies import grid, right, run, study

Run = tuple[RunRecord, Top1]
GRID = grid(a=["0", "1"], b=["0", "1", "2"], c=["0", "1"])


def planted(setting: Mapping[str, str]) -> Run:
    """A run that loses 40 images with a=0, 10 others with c=0, and that is half as fast again with b=2."""
    lost = [*range(40 * (setting["a"] == "0")), *range(100, 100 + 10 * (setting["c"] == "0"))]
    speedup = 4 * (1.5 if setting["b"] == "2" else 1 + 0.001 * int(setting["b"]))
    # As measured: each timing is another.
    noise = 1 + 0.0001 * GRID.index(dict(setting))
    return run(str(dict(setting)), right(*lost), speedup * noise, **setting)


def axes(found: MainEffects) -> dict[str, Axis]:
    return {axis.setting: axis for axis in found.axes}


def effect(found: MainEffects, setting: str, value: str) -> Effect:
    return next(one for one in axes(found)[setting].effects if one.value == value)


def difference(found: Difference | None) -> Difference:
    assert found
    return found


# ---- Main effects


def test_planted_effects_are_found_and_the_others_are_not() -> None:
    found = main_effects(study([planted(setting) for setting in GRID]))
    assert [(axis.setting, axis.first, [one.value for one in axis.effects]) for axis in found.axes] == [
        ("a", "0", ["1"]),
        ("b", "0", ["1", "2"]),
        ("c", "0", ["1"]),
    ]
    a, c, b = effect(found, "a", "1"), effect(found, "c", "1"), effect(found, "b", "2")
    assert (a.pairs, a.runs, difference(a.accuracy).value) == (6, 6, pytest.approx(0.04))
    assert difference(a.accuracy).shown
    assert (difference(c.accuracy).value, difference(c.accuracy).shown) == (pytest.approx(0.01), True)
    assert difference(b.accuracy).nothing
    assert (difference(b.speed).value, difference(b.speed).shown) == (pytest.approx(1.5, abs=0.002), True)
    assert not difference(effect(found, "b", "1").speed).shown
    assert not difference(a.speed).shown
    assert (found.unpaired, found.untimed) == (0, 0)
    assert {axis.setting: axis.kind for axis in found.axes} == dict.fromkeys("abc", AxisKind.mattered)


def test_a_setting_that_changes_no_answer_and_shares_its_timing_changed_nothing() -> None:
    runs = [run(str(setting), right(*range(20)), 4.0, **setting) for setting in grid(a=["0", "1"], b=["0", "1"])]
    found = main_effects(study(runs))
    assert [axis.kind for axis in found.axes] == [AxisKind.nothing, AxisKind.nothing]


def test_a_difference_of_a_few_images_is_within_noise() -> None:
    runs = [run(value, right(*lost), **{"a": value}) for value, lost in (("0", range(5)), ("1", range(3, 10)))]
    (axis,) = main_effects(study(runs)).axes
    assert (axis.kind, difference(axis.effects[0].accuracy).value) == (AxisKind.within_noise, pytest.approx(-0.002))
    assert axis.effects[0].speed is None


def test_an_effect_is_of_pairs_alone() -> None:
    """A run without a partner counts nowhere, and a failed one is no partner."""
    cells = {("0", "0"): 30, ("1", "0"): 10, ("0", "1"): 5}
    runs = [run(f"{a}{b}", right(*range(lost)), a=a, b=b) for (a, b), lost in cells.items()]
    failed = run("11", right(), a="1", b="1")
    found = main_effects(study([*runs, (replace(failed[0], status="FAILED"), failed[1])]))
    assert (effect(found, "a", "1").pairs, effect(found, "a", "1").runs) == (1, 1)
    assert difference(effect(found, "a", "1").accuracy).value == pytest.approx(0.02)
    assert difference(effect(found, "b", "1").accuracy).value == pytest.approx(0.025)
    apart = study([run(a + b, right(), a=a, b=b) for a, b in (("0", "1"), ("1", "0"), ("1", "2"))])
    assert {axis.setting: axis.kind for axis in main_effects(apart).axes} == {
        "a": AxisKind.unknown,
        "b": AxisKind.unknown,
    }


def test_one_run_and_none_have_no_effects() -> None:
    assert main_effects(study([run("a", right(), 4.0, a="0")])).axes == ()
    unfinished = replace(run("a", right(), a="0")[0], status="RUNNING")
    found = main_effects(studies([unfinished])[0])
    assert (found.axes, math.isnan(found.critical)) == ((), True)
    assert interactions(studies([unfinished])[0]) == []


def test_seeds_are_paired_and_all_images_with_each() -> None:
    """Calibration's seed is no axis; a run that it has no effect in is the partner of each."""
    runs = [
        run(f"8 {seed}", right(*range(20 + 10 * seed)), calib__batches="8", calib__seed=str(seed)) for seed in range(3)
    ]
    runs += [
        run(f"32 {seed}", right(*range(10 * seed)), calib__batches="32", calib__seed=str(seed)) for seed in range(3)
    ]
    runs += [run("all", right(), calib__batches="null", calib__seed="n/a")]
    (axis,) = main_effects(study(runs)).axes
    assert axis.setting == "calib.batches"
    assert [(one.value, one.pairs, difference(one.accuracy).value) for one in axis.effects] == [
        ("32", 3, pytest.approx(0.02)),
        ("null", 3, pytest.approx(0.03)),
    ]


def test_a_setting_without_effect_elsewhere_is_an_axis_of_the_runs_in_which_it_has_one() -> None:
    settings = [("minmax", "n/a"), ("histogram", "512"), ("histogram", "2048")]
    runs = [run(bins, right(*range(n)), observer=o, observer__bins=bins) for n, (o, bins) in enumerate(settings)]
    found = main_effects(study(runs))
    assert (effect(found, "observer", "histogram").pairs, axes(found)["observer.bins"].first) == (2, "512")
    assert effect(found, "observer.bins", "2048").pairs == 1


def test_the_fields_that_a_groups_choice_sets_go_with_it() -> None:
    rows = {"1": ("t", "s"), "2": ("c", "s"), "3": ("t", "u"), "4": ("c", "u")}
    runs = [
        run(
            choice, right(*range(10 * n)), qconfig=choice, qconfig__weight__granularity=w, qconfig__activation__scheme=a
        )
        for n, (choice, (w, a)) in enumerate(rows.items())
    ]
    found = main_effects(study(runs))
    assert effect(found, "qconfig.weight.granularity", "c").pairs == 2
    assert {(one.row, one.column) for one in interactions(study(runs))} == {
        ("qconfig.weight.granularity", "qconfig.activation.scheme")
    }


def test_a_field_swept_beside_its_groups_choice_is_held_and_so_is_the_choice() -> None:
    """As `experiment=overflow` does."""
    lost = {("c", "none"): 300, ("t", "none"): 200, ("c", "weights"): 0, ("t", "weights"): 100}
    runs = [
        run(choice + guard, right(*range(number)), q=choice, q__weight=choice, q__overflow=guard)
        for (choice, guard), number in lost.items()
    ]
    found = main_effects(study(runs))
    assert {name: (axis.effects[0].pairs, axis.effects[0].value) for name, axis in axes(found).items()} == {
        "q": (2, "t"),
        "q.overflow": (2, "weights"),
    }
    # +0.10 without the guard and -0.10 with it; +0.30 and +0.10.
    assert difference(effect(found, "q", "t").accuracy).value == pytest.approx(0)
    assert difference(effect(found, "q.overflow", "weights").accuracy).value == pytest.approx(0.2)


def test_what_nobody_varied_by_itself_is_no_axis() -> None:
    def varied(*runs: Mapping[str, str]) -> set[str]:
        return set(axes(main_effects(study([run(str(n), right(), **one) for n, one in enumerate(runs)]))))

    choices = [{"observer": "minmax"}, {"observer": "histogram", "observer__bins": "9"}, {"observer": "mse"}]
    assert varied(*choices) == {"observer"}
    minor = [
        {"qconfig": "a", "qconfig__z": "1"},
        {"qconfig": "b", "qconfig__z": "1"},
        {"qconfig": "c", "qconfig__z": "2"},
    ]
    assert varied(*minor) == {"qconfig"}
    assert varied(*minor, {"qconfig": "c", "qconfig__z": "3"}) == {"qconfig", "qconfig.z"}
    assert varied({"resolved__bits": "7"}, {"resolved__bits": "8"}) == set()


def test_without_predictions_intervals_are_conservative_and_estimates_the_same() -> None:
    runs = [planted(setting) for setting in GRID]
    known, unknown = main_effects(study(runs)), main_effects(study(runs, predictions=False))
    assert unknown.unpaired == len(GRID)
    for setting, value in (("a", "1"), ("b", "1"), ("c", "1")):
        one, other = (difference(effect(found, setting, value).accuracy) for found in (known, unknown))
        assert other.value == pytest.approx(one.value)
        assert one.interval
        assert other.interval
        assert other.interval.low < one.interval.low < one.interval.high < other.interval.high


def test_predictions_of_other_images_are_not_paired() -> None:
    runs = [run(value, right(*range(10 * int(value))), a=value) for value in "01"]
    other = replace(runs[1][1], labels=runs[1][1].labels + 1)
    found = main_effects(study([runs[0], (runs[1][0], other)]))
    one = difference(effect(found, "a", "1").accuracy)
    assert one.interval
    assert (found.unpaired, one.value) == (1, pytest.approx(-0.01))
    assert "conservative" in one.interval.method


def test_answers_on_the_target_count_where_they_were_measured() -> None:
    """With a=0 the accuracy on the target was measured, on the first ten images, of which it has none right."""
    images = np.arange(10)
    record, top1 = run("0", right(), a="0")
    target = {Metric.target_accuracy: 0.0, Metric.target_delta: -1.0, Metric.target_images: 10.0}
    target |= {Metric.target_delta_low: -1.0, Metric.target_delta_high: -0.6}
    record = replace(record, metrics={**record.metrics, **target}, tags={**record.tags, "accuracy_source": "emulated"})
    top1 = replace(top1, target_images=images, target=np.ones(10, dtype=np.int32))
    found = main_effects(study([(record, top1), run("1", right(0), a="1")]))
    one = difference(effect(found, "a", "1").accuracy)
    assert (one.value, one.units) == (pytest.approx(0.9), 10)


def test_values_that_are_no_numbers_count_as_missing() -> None:
    runs = [run(str(setting), right(), 4.0, **setting) for setting in grid(a=["0", "1"], b=["0", "1"])]
    record = runs[3][0]
    metrics = {**record.metrics, Metric.accuracy_int8: math.nan, Metric.runtime_speedup.of("torchscript"): math.nan}
    runs[3] = replace(record, metrics=metrics), runs[3][1]
    found = main_effects(study(runs))
    assert (difference(effect(found, "a", "1").accuracy).value, found.untimed) == (0, 1)
    (one,) = interactions(study(runs))
    assert (one.accuracy[1][1], one.speedup[1][1], one.runs[1][1]) == (None, None, 1)
    assert (one.accuracy_departure, one.speed_departure) == (None, None)


def test_a_timing_that_cant_be_trusted_has_no_effect() -> None:
    runs = [run(value, right(), 4.0 + int(value), a=value) for value in "012"]
    runs[1] = replace(runs[1][0], tags={**runs[1][0].tags, "latency_valid": "false"}), runs[1][1]
    found = main_effects(study(runs))
    assert (effect(found, "a", "1").speed, found.untimed) == (None, 1)
    assert difference(effect(found, "a", "2").speed).value == pytest.approx(1.5)


def test_runtimes_are_an_axis_within_each_run() -> None:
    """The other axes are of the headline's runtime; of the one asked for, where one is."""
    runs = [
        run(
            value,
            {"torchscript": right(*range(10 * int(value))), "onnxruntime": right(*range(50))},
            {"torchscript": 4.0 + 0.01 * int(value), "onnxruntime": 6.0 + int(value)},
            a=value,
        )
        for value in "01"
    ]
    found = main_effects(study(runs))
    within = effect(found, "runtime", "onnxruntime")
    assert (axes(found)["runtime"].first, within.runs, within.pairs) == ("torchscript", 2, 2)
    assert difference(within.accuracy).value == pytest.approx(-0.045)
    assert difference(within.speed).value == pytest.approx(math.sqrt(6 / 4 * 7 / 4.01))
    assert difference(effect(found, "a", "1").accuracy).value == pytest.approx(-0.01)
    other = main_effects(study(runs), runtime="onnxruntime")
    assert list(axes(other)) == ["a"]
    assert difference(effect(other, "a", "1").accuracy).nothing
    assert difference(effect(other, "a", "1").speed).value == pytest.approx(7 / 6)


def test_two_machines_are_two_studies() -> None:
    runs = [run(f"{a}{cpu}", right(*range(10 * int(a))), a=a, cpu=cpu) for a in "01" for cpu in "xy"]
    records = [replace(record, tags={**record.tags, "cpu": record.name[1]}) for record, _ in runs]
    found = [main_effects(one) for one in studies(records, {record.run_id: top1 for record, top1 in runs})]
    assert [effect(one, "a", "1").pairs for one in found] == [1, 1]


def test_twenty_settings_are_told_apart() -> None:
    """A fractional design: each run and its twin that differs in one setting; the third costs 30 images."""
    names = [f"s{index:02}" for index in range(20)]
    base = dict.fromkeys(names, "0")
    settings = [base, *({**base, name: "1"} for name in names)]
    runs = [run(str(n), right(*range(30 * int(one["s02"]))), **one) for n, one in enumerate(settings)]
    found = main_effects(study(runs))
    assert {axis.setting for axis in found.axes if axis.kind is AxisKind.mattered} == {"s02"}
    assert {one.effects[0].pairs for one in found.axes} == {1}
    assert {axis.kind for axis in found.axes if axis.setting != "s02"} == {AxisKind.nothing}
    assert len(found.axes) == 20
    assert interactions(study(runs))[0].departures == ()


# ---- Interactions


def interaction(found: list[Interaction], row: str, column: str) -> Interaction:
    return next(one for one in found if (one.row, one.column) == (row, column))


def test_a_planted_interaction_is_the_first_and_has_its_size() -> None:
    """b=2 costs 100 images, and is 1.2 times as fast, with a=1 only."""
    runs = []
    for setting in GRID:
        both = setting["a"] == "1" and setting["b"] == "2"
        speedup = 4 * (1.2 if both else 1) * (1 + 0.0001 * GRID.index(setting))
        lost = [*range(100 * both), *range(500, 500 + 10 * int(setting["a"]))]
        runs.append(run(str(setting), right(*lost), speedup, **setting))
    found = interactions(study(runs))
    first = found[0]
    assert (first.row, first.column, first.rows, first.columns) == ("a", "b", ("0", "1"), ("0", "1", "2"))
    assert first.runs == ((2, 2, 2), (2, 2, 2))
    assert first.accuracy[0] == pytest.approx((0, 0, 0))
    assert first.accuracy[1] == pytest.approx((-0.01, -0.01, -0.11))
    assert first.speedup[1][2] == pytest.approx(4.8, abs=0.01)
    departure, speed = first.accuracy_departure, first.speed_departure
    assert departure
    assert (departure.row, departure.column, departure.blocks) == ("1", "2", 2)
    assert (departure.difference.value, departure.difference.shown) == (pytest.approx(-0.1), True)
    assert speed
    assert (speed.row, speed.column, speed.difference.shown) == ("1", "2", True)
    assert speed.difference.value == pytest.approx(1.2, abs=0.001)
    assert [one.shown for one in found] == [True, False, False]


def test_effects_that_add_up_depart_from_nothing() -> None:
    found = interaction(interactions(study([planted(setting) for setting in GRID])), "a", "c")
    assert found.accuracy_departure
    assert found.accuracy_departure.difference.value == pytest.approx(0)
    assert not found.shown


def test_a_grid_with_a_missing_cell_is_shown_and_one_with_two_of_six_is_not() -> None:
    cells = grid(a=["0", "1"], b=["0", "1", "2"])
    runs = [run(str(n), right(*range(5 * n)), **cell) for n, cell in enumerate(cells)]
    (found,) = interactions(study(runs[:-1]))
    assert found.accuracy[1] == (pytest.approx(-0.015), pytest.approx(-0.02), None)
    assert found.speedup == ((None, None, None), (None, None, None))
    assert found.accuracy_departure
    assert (found.accuracy_departure.row, found.accuracy_departure.column) == ("1", "1")
    assert interactions(study([runs[0], runs[1], runs[2], runs[3]])) == []


def test_departures_are_of_blocks_that_are_equal_in_all_else() -> None:
    """With c=1 a cell is missing, so that only the block with c=0 counts."""
    runs = [
        run(str(cell), right(*range(10 * (cell["a"] == cell["b"] == "1") + 30 * (cell["c"] == "1"))), **cell)
        for cell in grid(a=["0", "1"], b=["0", "1"], c=["0", "1"])
        if list(cell.values()) != ["0", "1", "1"]
    ]
    found = interaction(interactions(study(runs)), "a", "b").accuracy_departure
    assert found
    assert (found.blocks, found.difference.value) == (1, pytest.approx(-0.01))
