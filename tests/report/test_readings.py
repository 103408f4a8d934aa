"""Readings of effects and of calibration, in a sentence each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from qexp.records import RunRecord, Top1
from qexp.report import calibration, classes, effects, layers, readings
from tests.helpers.rows import RISING, by_size, row
from tests.helpers.studies import grid, right, run, study


def said(rows: Sequence[RunRecord]) -> str:
    return "\n".join(readings.calibration(calibration.sizes(rows)))


def test_a_setting_within_noise_one_that_mattered_and_one_that_changed_nothing_are_told_apart() -> None:
    lost = {"minmax": 0, "mse": 1, "entropy": 100}
    runs = [
        run(f"{one['observer']} {one['fusion']}", right(*range(lost[one["observer"]])), 3.0, **one)
        for one in grid(observer=["minmax", "mse", "entropy"], fusion=["true", "false"])
    ]
    told = [readings.axis(axis) for axis in effects.main_effects(study(runs)).axes]
    assert told[0].startswith("observer: against minmax, accuracy: entropy -10.00 [-")
    assert told[0].endswith("points, the others within noise (0.75 points at most); speed: the same.")
    assert told[1] == "fusion changed nothing: every prediction is the same, and so is the timing."


def test_a_setting_of_which_nothing_is_shown_is_called_noise_with_the_most_that_it_could_be() -> None:
    speeds = {"minmax": 4.0, "mse": 4.02}
    runs = [run(name, right(*range(n, 5)), speed, observer=name) for n, (name, speed) in enumerate(speeds.items())]
    (axis,) = effects.main_effects(study(runs)).axes
    assert readings.axis(axis) == (
        "observer: against minmax, accuracy: within noise (0.56 points at most); speed: within noise (3.4% at most)."
    )
    untimed = [(replace(record, tags={}), top1) for record, top1 in runs]
    (axis,) = effects.main_effects(study(untimed)).axes
    assert readings.axis(axis) == "observer: against minmax, accuracy: within noise (0.56 points at most)."
    bare = [replace(record, metrics={}, tags={}) for record, _ in runs]
    (axis,) = effects.main_effects(study([(record, top1) for record, (_, top1) in zip(bare, runs, strict=True)])).axes
    assert readings.axis(axis) == "observer: can't be told, since no two runs differ in it alone."


def test_settings_that_depend_on_each_other_are_told_from_those_that_add_up() -> None:
    runs = []
    for number, one in enumerate(grid(a=["0", "1"], b=["0", "1"], c=["0", "1"])):
        both = one["a"] == one["b"] == "1"
        speedup = 4 * (1.2 if both else 1.0) * (1 + 0.0001 * number)
        runs.append(run(str(number), right(*range(100 * both)), speedup, **one))
    first, *others = (readings.interaction(one) for one in effects.interactions(study(runs)))
    assert first.startswith("With b=1 rather than 0, a=1 in place of 0 changes accuracy by -10.00 [-")
    assert "; With b=1 rather than 0, a=1 in place of 0 changes speed by another ×1.20 [1.1" in first
    assert others[0].startswith("The effects of the two add up, within noise (")
    corner = effects.interactions(study([runs[0], runs[2], runs[4]]))
    assert [readings.interaction(one) for one in corner] == [
        "The runs can't tell how far the effects of the two depend on each other."
    ]


def test_layers_and_classes_that_stand_out_are_named() -> None:
    rows = tuple(layers.LayerRow(str(n), "conv", True, None, 30.0 - 9 * (n < 6), None, None, None) for n in range(30))
    assert readings.layers(layers.LayerComparison(rows, rows, layers.noisy(rows))) == [
        "Layers to keep in FP32 first, for they add the most noise of their own: 0, 1, 2, 3, 4 and 1 more."
    ]
    assert readings.layers(layers.LayerComparison(rows, rows, ())) == []


@pytest.mark.parametrize(
    ("lost", "reading"),
    [
        ({"cat": 0, "dog": 0}, "No class loses accuracy."),
        (
            {"cat": 1, "dog": 0},
            "No class is shown to lose accuracy. The largest loss, within noise, is that of cat",
        ),
        ({"cat": 30, "dog": 0}, "The class that is shown to lose most is cat: -30.00 ["),
        ({"cat": 30, "dog": 40}, "The class that is shown to lose most is dog: -40.00 ["),
    ],
)
def test_the_class_that_loses_most_is_named(lost: dict[str, int], reading: str) -> None:
    labels = np.repeat(np.arange(2, dtype=np.int32), 100)
    int8 = labels.copy()
    for number, many in enumerate(lost.values()):
        int8[100 * number : 100 * number + many] = 7
    (text,) = readings.classes(classes.changes(Top1(labels, labels, {"eager": int8}, tuple(lost)), "eager"))
    assert text.startswith(reading)
    assert text.endswith("; 1 other class too.") == (min(lost.values()) > 0)


def test_a_winner_that_changes_with_the_seed_is_called_chance() -> None:
    mse, minmax = {"observer": "mse"}, {"observer": "minmax"}
    changing = calibration.Winners(12, {"0": (mse,), "1": (minmax,), "2": (mse,)})
    assert readings.winners(changing) == (
        "The most accurate of 12 settings is another one in 2 of 3 pairs of calibration seeds: a lead that a seed can "
        "turn is chance."
    )
    same = calibration.Winners(12, {"0": (mse,), "1": (mse, minmax)})
    assert readings.winners(same) == "The most accurate of 12 settings is the same with each of 2 calibration seeds."


def test_samples_are_told_apart_from_the_choice_of_test_images() -> None:
    rows = [row(str(seed), 0.85 + 0.001 * seed, calib__seed=str(seed)) for seed in range(3)]
    assert readings.samples(calibration.samples(rows)) == (
        "Another draw of calibration images (calib.seed) changes accuracy by a standard deviation of 0.10 points "
        "[0.05, 0.63]; other test images would change it by 0.11."
    )


def test_the_reading_of_a_sweep_over_sizes_says_from_where_and_how_much_could_be_missed() -> None:
    assert said(by_size(RISING)) == (
        "From 8 batches (128 images) on no rise of the mean accuracy is shown, but one of up to 0.09 "
        "points is possible (95%; SD of samples 0.03), less than the sampling error of a run (±0.22): more calibration "
        "would hardly help."
    )


def test_a_size_that_is_enough_is_named_where_a_smaller_one_only_could_be() -> None:
    drawn = {"1": (0.8457, 0.8463, 0.8408), "8": (0.8493, 0.8495, 0.8487), "32": (0.8497, 0.8496, 0.8505)}
    assert said(by_size(drawn)) == (
        "From 1 batch (16 images) on no rise of the mean accuracy is shown, but one of up to 1.17 "
        "points is possible (95%; SD of samples 0.18); from 8 batches (128 images) on it is less than the sampling "
        "error of a run (±0.22), so more than that would hardly help."
    )


def test_the_order_of_runs_does_not_matter() -> None:
    assert said(by_size(RISING)[::-1]) == said(by_size(RISING))


def test_accuracy_that_rises_up_to_the_largest_size_is_said_to() -> None:
    drawn = {"1": (0.80, 0.801, 0.802), "2": (0.82, 0.821, 0.822), "4": (0.84, 0.841, 0.842)}
    assert said(by_size(drawn)) == (
        "Accuracy still rises at the largest size tried, 4 batches (64 images), +2.00 "
        "[+1.77, +2.23] points over 2 batches (32 images): more may help."
    )
    assert "rises up to all 898 images" in said(by_size({**drawn, "null": (0.86,)}))


def test_more_images_that_make_it_worse_are_said_to() -> None:
    worse = said(by_size({"1": (0.84, 0.841, 0.842), "2": (0.80, 0.801, 0.802)}))
    assert "From 1 batch (16 images) on no rise of the mean accuracy is shown" in worse
    assert "every larger size is worse, 2 batches (32 images) by -4.00 [-4.23, -3.77] points." in worse


def test_one_larger_size_that_is_worse_is_named() -> None:
    drawn = {"1": (0.84, 0.841, 0.842), "2": (0.80, 0.801, 0.802), "4": (0.841, 0.842, 0.8405)}
    text = said(by_size(drawn))
    assert "but one of up to 0.2" in text
    assert "; more can be worse, 2 batches (32 images) by -4.00 [-4.2" in text


def test_wide_samples_are_not_taken_for_no_effect() -> None:
    text = said(by_size({"1": (0.82, 0.85), "2": (0.84, 0.83)}))
    assert "more than the sampling error of a run (±0.22) at every size: more samples (calib.seed) would tell" in text


def test_one_sample_a_size_says_what_would_tell() -> None:
    assert said(by_size({"1": (0.80,), "8": (0.849,), "null": (0.85,)})) == (
        "With one sample of calibration images a size, what the size does can't be told apart from "
        "what the sample does; calib.sampling=random calib.seed=0,1,2 would."
    )


def test_samples_that_dont_differ_give_no_spread_to_judge_by() -> None:
    text = said(by_size({"1": (0.80, 0.80), "8": (0.81, 0.81)}))
    assert "lie within 1.00 points" in text


def test_sizes_are_read_for_each_combination_of_the_other_settings() -> None:
    higher = {size: tuple(accuracy + 0.01 for accuracy in drawn) for size, drawn in list(RISING.items())[:-1]}
    rows = [*by_size(RISING, qconfig="per_tensor"), *by_size(higher, qconfig="per_channel")]
    lines = said(rows).splitlines()
    assert [line.split(",")[0] for line in lines] == ["With qconfig=per_tensor", "With qconfig=per_channel"]


def test_what_holds_for_several_combinations_is_said_once() -> None:
    once = {"1": (0.80,), "8": (0.85,)}
    rows = [*by_size(once, qconfig="per_tensor"), *by_size(once, qconfig="per_channel"), *by_size(RISING, qconfig="x")]
    undecided, decided = said(rows).splitlines()
    assert undecided.startswith("With 2 combinations of the other settings, with one sample")
    assert decided.startswith("With qconfig=x, from")


def test_one_size_is_no_sweep_over_sizes() -> None:
    assert said([row("a", 0.85, calib__batches="8")]) == ""
    assert said([]) == ""


def test_combinations_of_which_the_same_holds_share_a_sentence_with_the_range_of_its_numbers() -> None:
    wider = {size: tuple(0.02 + value + 0.0005 * n for n, value in enumerate(drawn)) for size, drawn in RISING.items()}
    (text,) = readings.calibration(
        calibration.sizes([*by_size(RISING, observer="minmax"), *by_size(wider, observer="mse")])
    )
    assert text.startswith("With 2 combinations of the other settings, from 8 batches (128 images) on no rise of the")
    assert "one of up to 0.09 to 0.2" in text


def test_classes_of_an_image_each_are_not_judged() -> None:
    labels = np.arange(300, dtype=np.int32)
    found = classes.changes(Top1(labels, labels, {"eager": labels[::-1].copy()}, ()), "eager")
    assert not classes.can_be_told(found)
    assert readings.classes(found) == ["No class can be judged by itself: none of the 300 has more than 1 image."]
