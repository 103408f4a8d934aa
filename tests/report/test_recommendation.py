"""Recommendations in words: two plain sentences with all the numbers that matter."""

from __future__ import annotations

import re

from qexp.metrics import Metric
from qexp.report import decision, sentences
from tests.helpers.planted import Planted, question, study


def said(*planted: Planted, images: int = 10_000, share: float = 0, objective: str = "fastest", **given: object) -> str:
    whole = study(*planted, images=images, share=share)
    first, second = sentences.recommendation(decision.recommend(whole, question(objective, **given)))
    assert first.endswith(".")
    assert second.endswith(".")
    return f"{first}\n{second}"


def with_setting(name: str, broken: int, speedup: float | None = 2.0, **params: str) -> Planted:
    return Planted(name, broken, speedup, params={"observer": name, **params})


def test_a_setting_that_ships_is_named_with_its_speed_its_accuracy_and_its_p_value() -> None:
    runs = [
        Planted(
            "mse", 10, 5.3, params={"observer": "mse", "calib.batches": "8"}, metrics={Metric.calibration_images: 128}
        ),
        with_setting("entropy", 12, 5.3),
        with_setting("minmax", 0, 3.0),
    ]
    assert said(*runs) == (
        "Ship mse, 8 batches in eager (run mse): 5.30× [5.28, 5.32] as fast as the fastest FP32, accuracy -0.10 points "
        "[-0.18, -0.05], shown to lose less than 0.5 points (p < 0.0001 after Holm over 3 candidates).\n"
        "entropy, 32 batches in eager is as fast, as far as can be told, and this is the simplest of them."
    )


def test_one_run_says_so() -> None:
    assert said(Planted("a", 30, 2.0)) == (
        "Ship INT8 in eager (run a): 2.00× [1.98, 2.02] as fast as the fastest FP32, accuracy -0.30 points "
        "[-0.43, -0.21], shown to lose less than 0.5 points (p = 0.0023).\n"
        "No other candidate that qualifies is as fast."
    )


def test_seeds_and_those_left_out_are_told() -> None:
    seeds = [
        Planted(f"s{seed}", list(range(seed, 3 * seed + 1)), params={"observer": "mse", "calib.seed": str(seed)})
        for seed in range(3)
    ]
    text = said(*seeds, with_setting("minmax", 40), margin=0.008)
    assert (
        "No other candidate that qualifies is as fast; 1 more is shown to be less accurate; accuracies are means over "
        "3 calibration seeds (-0.05 to -0.01 points), and the run is that of the first (-0.01)." in text
    )


def test_many_that_are_tied_are_counted() -> None:
    text = said(*(with_setting(f"o{i}", 0) for i in range(7)))
    assert "6 other candidates are as fast" in text


def test_staying_says_why_and_what_came_nearest() -> None:
    assert said(with_setting("a", 300), with_setting("b", 900, 3.0), with_setting("c", 0, 0.9)) == (
        "Stay on FP32: 2 of 3 candidates are shown to lose 0.5 points or more, and 1 of 3 candidates is not shown to "
        "be faster than FP32.\n"
        "The most accurate candidate is c in eager (run c): accuracy +0.00 points [-0.04, +0.04], 0.90× [0.88, 0.92] "
        "as fast as the fastest FP32."
    )


def test_an_open_question_says_how_many_images_would_do() -> None:
    text = said(*(with_setting(f"s{i}", 0, 2 + i / 10) for i in range(48)), images=744)
    assert re.fullmatch(
        r"Can't tell with these 744 images: 744 images can't show for any of 48 candidates that it loses less than "
        r"0\.5 points, even if not a single image were answered otherwise\.\n"
        r"Provisionally the best is s47 in eager \(run s47\): 6\.70× \[6\.68, 6\.72\] as fast as the fastest FP32, "
        r"accuracy \+0\.00 points \[-0\.51, \+0\.51\]; to know, it would take about [\d,]+ test images in place of "
        r"744\.",
        text,
    ), text


def test_an_unknown_speed_names_what_qualifies_and_what_to_do() -> None:
    noisy = {"latency_valid": "false", "latency_reason": "2 of 2 processors were busy"}
    assert said(Planted("a", 0, tags=noisy)) == (
        "How fast INT8 is can't be said: the one candidate can't be recommended: the timing can't be trusted: 2 of "
        "2 processors were busy.\n"
        "It is shown to lose less than 0.5 points: INT8 in eager (run a), accuracy +0.00 points [-0.04, +0.04]; to "
        "know, it would take timings on a quiet machine."
    )


def test_the_other_objectives_say_what_they_chose_by() -> None:
    small = said(with_setting("a", 0, None), objective="smallest")
    assert small.startswith("Ship INT8 in eager (run a): 10.00 MB, where FP32 has 40.00 MB, accuracy +0.00 points")
    runs = [with_setting("a", 0, 4.0), with_setting("b", 900, 8.0), with_setting("c", 0, 3.0)]
    accurate = said(*runs, objective="accurate", max_ms=6)
    assert accurate.startswith(
        "Ship a in eager (run a): nothing within 6 ms is shown to be more accurate; 2.50 ms, 4.00× [3.98, 4.02] as fast"
    )
    assert (
        "c in eager is as accurate, as far as can be told, and this is the fastest of them; 1 more is shown" in accurate
    )


def test_a_winner_that_was_chosen_on_other_images_says_so() -> None:
    text = said(with_setting("a", 0), with_setting("b", 0, 3.0), share=0.3)
    assert "(p < 0.0001, tested once on 7,000 images after it was chosen on 3,000 others)" in text


def test_nothing_measured_is_said_in_two_sentences_too() -> None:
    text = said(Planted("a", 0, metrics={Metric.images: float("nan")}))
    assert text.startswith("Can't tell: the one candidate can't be recommended: the runs don't record")
    assert "of unknown accuracy" in text


def test_settings_are_named_in_short() -> None:
    values = {"qconfig": "per_channel*", "calib.batches": "null", "qconfig.overflow": "none", "observer.bins": "n/a"}
    assert sentences.setting(values) == "per_channel, all calibration images, overflow=none"
    assert sentences.setting({"calib.batches": "1", "fusion": "false"}) == "1 batch, fusion=false"
    assert sentences.setting({}) == "INT8"
