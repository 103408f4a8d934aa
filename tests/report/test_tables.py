"""The final table, and what it says of effects, calibration samples and sizes, and latencies."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qexp.metrics import Metric
from qexp.records import RunRecord, Verdict, VerdictKind
from qexp.report import tables
from tests.helpers.rows import RISING, by_size, on_target, row

NO_LOSS = Verdict(VerdictKind.no_loss, 0.005, 10_000)
CANT_TELL = Verdict(VerdictKind.undecided, 0.005, 10_000, 24_000)
CAUSE = {"lost": 0.0355, "lost_to_saturation": 0.0355, "saturation_only": True, "remedy": "qconfig.overflow=auto"}
SATURATED = "3.5 points lost, all of it to 16-bit sums that saturate; qconfig.overflow=auto avoids it"
UNTRUSTED = {"warning.timing_untrusted": "the timing can't be trusted."}


def test_a_line_shows_accuracies_and_the_difference_in_points_with_its_interval() -> None:
    text = tables.runs([row("a", 0.89, half=0.02)])
    assert "0.9000 → 0.8900" in text
    assert "-1.00 [-3.00, +1.00]" in text
    assert "latency" not in text  # nothing was timed


def test_a_warning_stands_once_below_the_table_and_marks_its_runs() -> None:
    warned = {"warning.saturation_unguarded": "holds here only"}
    rows = [RunRecord(name, name, "FINISHED", tags=tags) for name, tags in (("a", warned), ("b", warned), ("c", {}))]
    text = tables.runs(rows)
    assert text.count("holds here only") == 1
    assert [line.split()[:2] for line in text.splitlines()[2:4]] == [["a", "(1)"], ["b", "(1)"]]
    assert "c (" not in text


def test_a_failed_run_has_no_line_and_is_named_with_its_error() -> None:
    rows = [row("a", 0.8, x="1"), replace(row("b", 0.1, x="2"), status="FAILED", tags={"error": "too bad."})]
    assert "b" not in tables.runs(rows).split()
    assert tables.effects_table(rows) == ""
    assert tables.failures(rows) == "FAILED  b: too bad."
    assert tables.runs(rows[1:]) == "No run was finished."


def measured(
    name: str, int8: float, verdict: Verdict = NO_LOSS, *, fp32: float = 0.8507, trusted: bool = True, **params: str
) -> RunRecord:
    """A run of ResNet-18 as it is logged, with an interval of 0.22 points to each side."""
    delta = int8 - fp32
    metrics = {
        Metric.accuracy_fp32: fp32,
        Metric.accuracy_int8: int8,
        Metric.accuracy_delta: delta,
        Metric.delta_low: delta - 0.0022,
        Metric.delta_high: delta + 0.0022,
        Metric.runtime_latency.of("fp32_eager"): 7.9,
        Metric.runtime_latency.of("fp32_eager_channels_last"): 4.9,
        Metric.runtime_latency.of("int8_eager"): 2.05,
        Metric.runtime_latency.of("int8_torchscript"): 0.86,
        Metric.latency_fp32: 4.9,
        Metric.latency_int8: 0.86,
        Metric.speedup: 5.7,
        Metric.speedup_low: 5.41,
        Metric.speedup_high: 5.93,
        Metric.size_fp32: 44.72,
        Metric.size_int8: 11.31 if "per_channel" in name else 11.23,
        Metric.layers_int8: 21.0,
        Metric.layers_float: 0.0,
    }
    tags = {**verdict.tags(), "fastest.fp32": "eager_channels_last"}
    tags |= {"latency_valid": str(trusted).lower(), **({} if trusted else UNTRUSTED)}
    typed = {key.replace("__", "."): value for key, value in params.items()}
    typed["resolved.runtime"] = "torchscript"
    return RunRecord(name, name, "FINISHED", params=typed, metrics=metrics, tags=tags)


def granularity() -> list[RunRecord]:
    drawn = {"per_tensor": (0.8501, 0.8505, 0.8487), "per_channel": (0.8493, 0.8494, 0.8493)}
    rows = [
        measured(f"{q} seed={seed}", accuracy, qconfig=q, calib__batches="32", calib__seed=str(seed))
        for q, accuracies in drawn.items()
        for seed, accuracy in enumerate(accuracies)
    ]
    rows[2] = replace(rows[2], tags={**rows[2].tags, **CANT_TELL.tags()})
    rows[4] = replace(rows[4], tags={**rows[4].tags, "latency_valid": "false", **UNTRUSTED})
    return rows


def test_the_table_of_a_sweep() -> None:
    assert tables.runs(granularity()) == (
        """\
run                     FP32 → INT8      points [95%]          verdict              latency, ms    speedup [95%]
----------------------  ---------------  --------------------  -------------------  -------------  -------------------
per_tensor seed=0       0.8507 → 0.8501  -0.06 [-0.28, +0.16]  no loss > 0.5        4.90 → 0.86    5.70× [5.41, 5.93]
per_tensor seed=1       0.8507 → 0.8505  -0.02 [-0.24, +0.20]  no loss > 0.5        4.90 → 0.86    5.70× [5.41, 5.93]
per_tensor seed=2       0.8507 → 0.8487  -0.20 [-0.42, +0.02]  can't tell (24,000)  4.90 → 0.86    5.70× [5.41, 5.93]
per_channel seed=0      0.8507 → 0.8493  -0.14 [-0.36, +0.08]  no loss > 0.5        4.90 → 0.86    5.70× [5.41, 5.93]
per_channel seed=1 (1)  0.8507 → 0.8494  -0.13 [-0.35, +0.09]  no loss > 0.5        4.90 → 0.86?   5.70×? [5.41, 5.93]
per_channel seed=2      0.8507 → 0.8493  -0.14 [-0.36, +0.08]  no loss > 0.5        4.90 → 0.86    5.70× [5.41, 5.93]
every run: 21 of 21 layers in INT8, 44.72 → 11.23 to 11.31 MB
no loss > 0.5: none beyond 0.5 points, at 95%; can't tell (24,000): 24,000 test images would do
(1) the timing can't be trusted."""
    )


def test_a_verdict_that_all_runs_share_is_said_once_and_in_full() -> None:
    text = tables.runs([measured("a", 0.85, CANT_TELL), measured("b", 0.85, CANT_TELL)])
    assert "verdict of every run: can't tell with 10,000 images; 24,000 would do" in text
    assert text.count("can't tell") == 1
    lost = Verdict(VerdictKind.loss, 0.005, 10_000, **CAUSE)  # type: ignore[arg-type]
    assert f"verdict: loss; {SATURATED}" in tables.runs([measured("a", 0.8, lost)])


def test_what_is_added_to_a_verdict_stands_below_and_is_marked_at_it() -> None:
    text = tables.runs([measured("a", 0.8152, replace(CANT_TELL, **CAUSE)), measured("b", 0.85)])  # type: ignore[arg-type]
    assert "can't tell (24,000) (1)" in text
    assert text.endswith(f"(1) {SATURATED}")


def test_a_run_without_a_verdict_that_is_known_has_none() -> None:
    other = replace(measured("a", 0.85), tags={"verdict": "something else", "verdict.margin": "0.1"})
    assert other.verdict is None
    assert "verdict" not in tables.runs([other])


def test_layers_and_sizes_that_differ_have_a_column() -> None:
    a, b = measured("a", 0.85), measured("b", 0.85)
    b = replace(b, metrics={**b.metrics, Metric.layers_float: 3.0, Metric.size_int8: 20.0})
    text = tables.runs([a, b])
    assert "21 of 24" in text
    assert "44.72 → 20.00" in text
    assert "every run: 21" not in text


@pytest.mark.parametrize(("source", "how"), [("exact", "don't saturate"), ("emulated", "16-bit sums emulated")])
def test_where_the_targets_cpu_is_another_its_accuracy_is_shown_and_marked(source: str, how: str) -> None:
    other = on_target(measured("a", 0.8507, target="avx2"), source, 0.8150, -0.035)
    text = tables.runs([other, measured("b", 0.85)])
    # FP32 is that on the images measured, so that the difference is the one of the two.
    assert "0.8500 → 0.8150 (1)" in text
    assert "-3.50 [-4.50, -2.50]" in text
    last = text.splitlines()[-1]
    assert last.startswith("(1) accuracy on target=avx2")
    assert how in last
    assert "on 2,000 images" in last
    assert f"0.8500 → 0.8150 ({source})" in tables.line(other)


def test_the_accuracy_of_what_ran_is_shown_where_the_target_runs_the_same() -> None:
    same = on_target(measured("a", 0.8507), "executed", 0.8, -0.05)
    assert tables.runs([same]) == tables.runs([measured("a", 0.8507)])


def test_that_accuracies_are_compared_by_their_difference_to_fp32_is_said_where_images_differ() -> None:
    rows = [on_target(measured("a", 0.8507, x="1"), "exact", 0.8150, -0.035), measured("b", 0.8497, x="2")]
    assert "FP32's on all test images" in tables.effects_table(rows)
    assert "FP32's on all test images" not in tables.effects_table([measured("a", 0.8, x="1"), rows[1]])


def test_a_line_says_the_verdict_in_words_and_marks_the_timing() -> None:
    assert tables.line(measured("a", 0.85, CANT_TELL, trusted=False)) == (
        "a  0.8507 → 0.8500  -0.07 [-0.29, +0.15]  can't tell with 10,000 images  4.90 → 0.86?  "
        "5.70×? [5.41, 5.93]  44.72 → 11.23  21 of 21"
    )


def test_every_variant_that_was_timed_has_its_latency() -> None:
    assert tables.latencies([measured("a", 0.85), measured("b", 0.85, trusted=False)]) == (
        """\
latency, ms (p50); the speedup is fp32 eager channels-last over int8 torchscript; \
? not to be trusted (1 of 2 runs; the tag latency_reason says why)
run    fp32 eager    fp32 eager channels-last    int8 eager    int8 torchscript
-----  ------------  --------------------------  ------------  ------------------
a      7.90          4.90                        2.05          0.86
b      7.90?         4.90?                       2.05?         0.86?"""
    )


def test_of_a_single_run_every_pair_is_shown() -> None:
    assert tables.latencies([measured("a", 0.85)]) == (
        """\
latency, ms (p50); the speedup is fp32 eager channels-last over int8 torchscript
                          ms    over int8 eager, 2.05 ms    over int8 torchscript, 0.86 ms
------------------------  ----  --------------------------  --------------------------------
fp32 eager                7.90  3.85×                       9.19×
fp32 eager channels-last  4.90  2.39×                       5.70×"""
    )


def test_the_pair_of_the_speedup_is_starred_where_runs_differ_in_it() -> None:
    b = measured("b", 0.85)
    text = tables.latencies([measured("a", 0.85), replace(b, params={**b.params, "resolved.runtime": "eager"})])
    lines = text.splitlines()
    assert lines[0].endswith("over int8 torchscript (1), fp32 eager channels-last over int8 eager (1)")
    assert lines[3].split() == ["a", "7.90", "4.90*", "2.05", "0.86*"]
    assert lines[4].split() == ["b", "7.90", "4.90*", "2.05*", "0.86"]


def test_of_many_runs_the_range_of_latencies_is_shown() -> None:
    rows = [measured(str(n), 0.85) for n in range(13)]
    rows = [
        replace(r, metrics={**r.metrics, Metric.runtime_latency.of("fp32_eager"): float(n)})
        for n, r in enumerate(rows, start=1)
    ]
    lines = tables.latencies(rows).splitlines()
    assert [line.split()[3] for line in lines[3:]] == ["1.00", "7.00", "13.00"]


def test_nothing_timed_no_latencies() -> None:
    failed = replace(measured("b", 0.8), status="FAILED")
    assert tables.latencies([row("a", 0.8), failed]) == ""


def test_the_table_of_effects() -> None:
    first, second = (0.80, 0.70, 0.75), (0.84, 0.71, 0.77)
    rows = [row(f"a{n}", value, 2.0, x="1", y=str(n)) for n, value in enumerate(first)]
    rows += [row(f"b{n}", value, 2.5, x="2", y=str(n)) for n, value in enumerate(second)]
    # Of 4, 1 and 2 points: 2.33 ± 4.303 * 1.528 / sqrt(3).
    assert tables.effects_table(rows) == (
        """\
setting    value    runs    INT8 accuracy    points to first    [95%]           speedup    to first
---------  -------  ------  ---------------  -----------------  --------------  ---------  ----------
x          1        3       0.7500           +0.00                              2.00×      +0.00
x          2        3       0.7733           +2.33              [-1.46, +6.13]  2.50×      +0.50
y          0        2       0.8200           +0.00                              2.25×      +0.00
y          1        2       0.7050           -11.50                             2.25×      +0.00
y          2        2       0.7600           -6.00                              2.25×      +0.00
[95%]: from pair to pair of runs that differ in this setting alone (t, 3 pairs or more)."""
    )
    two = [r for r in rows if r.params["y"] in "01"]
    assert "[95%]" not in tables.effects_table(two)


def test_samples_are_reported_apart_from_the_sampling_error() -> None:
    assert tables.calibration_samples(granularity()) == (
        """\
qconfig      samples    mean INT8    lowest    highest    SD of samples    sampling error
-----------  ---------  -----------  --------  ---------  ---------------  ----------------
per_tensor   3          0.8498       0.8487    0.8505     0.09             ±0.22
per_channel  3          0.8493       0.8493    0.8494     0.01             ±0.22
SD of samples: what other calibration images (calib.seed) change on the same test images, in points.
sampling error: what other test images would change, half the 95% interval of one run, in points.
As standard deviations, 0.07 between calibration samples over all settings (95% [0.04, 0.19]) against 0.11 \
between test images: the test images seem to be the larger source of chance, but 6 samples can't settle it."""
    )


def test_the_spread_of_samples_is_free_of_the_width_of_intervals() -> None:
    wide = [replace(r, metrics={**r.metrics, Metric.delta_low: -0.5, Metric.delta_high: 0.5}) for r in granularity()]
    spread = "As standard deviations, 0.07 between calibration samples over all settings (95% [0.04, 0.19])"
    assert spread in tables.calibration_samples(wide)
    assert "the test images are the larger source" in tables.calibration_samples(wide)
    narrow = [
        replace(r, metrics={**r.metrics, Metric.delta_low: -1e-5, Metric.delta_high: 1e-5}) for r in granularity()
    ]
    assert spread in tables.calibration_samples(narrow)
    assert "the calibration samples are the larger source" in tables.calibration_samples(narrow)


def test_where_no_setting_has_two_samples_nothing_is_said_of_them() -> None:
    assert tables.calibration_samples(granularity()[:1]) == ""


def test_the_spread_is_compared_for_each_calibration_size_by_itself() -> None:
    rows = [
        measured(f"{b} {s}", 0.8 + spread * s, calib__batches=b, calib__seed=str(s))
        for b, spread in (("1", 0.02), ("8", 0.001), ("32", 0.0001))
        for s in range(3)
    ]
    assert tables.calibration_samples(rows).splitlines()[-1] == (
        "As standard deviations, against 0.11 between test images: samples vary more with calib.batches=1; "
        "it can't be told with calib.batches=8; samples vary less with calib.batches=32."
    )


def test_the_reading_of_a_sweep_over_sizes_says_from_where_and_how_much_could_be_missed() -> None:
    assert tables.calibration_sizes(by_size(RISING)) == (
        "calibration size: from 8 batches (128 images) on no rise of the mean accuracy is shown, but one of up to 0.09 "
        "points is possible (95%; SD of samples 0.03), less than the sampling error of a run (±0.22): more calibration "
        "would hardly help."
    )


def test_a_size_that_is_enough_is_named_where_a_smaller_one_only_could_be() -> None:
    drawn = {"1": (0.8457, 0.8463, 0.8408), "8": (0.8493, 0.8495, 0.8487), "32": (0.8497, 0.8496, 0.8505)}
    assert tables.calibration_sizes(by_size(drawn)) == (
        "calibration size: from 1 batch (16 images) on no rise of the mean accuracy is shown, but one of up to 1.17 "
        "points is possible (95%; SD of samples 0.18); from 8 batches (128 images) on it is less than the sampling "
        "error of a run (±0.22), so more than that would hardly help."
    )


def test_the_order_of_runs_does_not_matter() -> None:
    assert tables.calibration_sizes(by_size(RISING)[::-1]) == tables.calibration_sizes(by_size(RISING))


def test_accuracy_that_rises_up_to_the_largest_size_is_said_to() -> None:
    drawn = {"1": (0.80, 0.801, 0.802), "2": (0.82, 0.821, 0.822), "4": (0.84, 0.841, 0.842)}
    assert tables.calibration_sizes(by_size(drawn)) == (
        "calibration size: accuracy still rises at the largest size tried, 4 batches (64 images), +2.00 points "
        "[+1.77, +2.23] over 2 batches (32 images): more may help."
    )
    assert "rises up to all 898 images" in tables.calibration_sizes(by_size({**drawn, "null": (0.86,)}))


def test_more_images_that_make_it_worse_are_said_to() -> None:
    worse = tables.calibration_sizes(by_size({"1": (0.84, 0.841, 0.842), "2": (0.80, 0.801, 0.802)}))
    assert "from 1 batch (16 images) on no rise of the mean accuracy is shown" in worse
    assert "every larger size is worse, 2 batches (32 images) by -4.00 points [-4.23, -3.77]." in worse


def test_one_larger_size_that_is_worse_is_named() -> None:
    drawn = {"1": (0.84, 0.841, 0.842), "2": (0.80, 0.801, 0.802), "4": (0.841, 0.842, 0.8405)}
    text = tables.calibration_sizes(by_size(drawn))
    assert "but one of up to 0.2" in text
    assert "; more can be worse, 2 batches (32 images) by -4.00 points [-4.2" in text


def test_wide_samples_are_not_taken_for_no_effect() -> None:
    text = tables.calibration_sizes(by_size({"1": (0.82, 0.85), "2": (0.84, 0.83)}))
    assert "more than the sampling error of a run (±0.22) at every size: more samples (calib.seed) would tell" in text


def test_one_sample_a_size_says_what_would_tell() -> None:
    assert tables.calibration_sizes(by_size({"1": (0.80,), "8": (0.849,), "null": (0.85,)})) == (
        "calibration size: with one sample of calibration images a size, what the size does can't be told apart from "
        "what the sample does; calib.sampling=random calib.seed=0,1,2 would."
    )


def test_samples_that_dont_differ_give_no_spread_to_judge_by() -> None:
    text = tables.calibration_sizes(by_size({"1": (0.80, 0.80), "8": (0.81, 0.81)}))
    assert "lie within 1.00 points" in text


def test_sizes_are_read_for_each_combination_of_the_other_settings() -> None:
    higher = {size: tuple(accuracy + 0.01 for accuracy in drawn) for size, drawn in list(RISING.items())[:-1]}
    rows = [*by_size(RISING, qconfig="per_tensor"), *by_size(higher, qconfig="per_channel")]
    lines = tables.calibration_sizes(rows).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "calibration size, qconfig=per_tensor",
        "calibration size, qconfig=per_channel",
    ]


def test_what_holds_for_several_combinations_is_said_once() -> None:
    once = {"1": (0.80,), "8": (0.85,)}
    rows = [*by_size(once, qconfig="per_tensor"), *by_size(once, qconfig="per_channel"), *by_size(RISING, qconfig="x")]
    undecided, decided = tables.calibration_sizes(rows).splitlines()
    assert undecided.startswith("calibration size, 2 combinations of the other settings: with one sample")
    assert decided.startswith("calibration size, qconfig=x: from")


def test_one_size_is_no_sweep_over_sizes() -> None:
    assert tables.calibration_sizes(granularity()) == ""
    assert tables.calibration_sizes([]) == ""


def test_a_timing_that_another_run_made_is_marked_and_named_once() -> None:
    own, *carried = [measured(f"per_channel {name}", 0.85) for name in ("minmax", "mse", "entropy")]
    carried = [replace(row, tags={**row.tags, "latency_from": "minmax (sweeps/x/0)"}) for row in carried]
    text = tables.runs([own, *carried])
    assert text.count("4.90 → 0.86 (1)") == 2
    assert text.count("4.90 → 0.86") == 3
    assert text.endswith("\n(1) timed by minmax (sweeps/x/0), whose INT8 model executes the same operators.")
