"""A run in a line, and in half a screen."""

from __future__ import annotations

from dataclasses import replace

from qexp.metrics import Metric
from qexp.records import WARNING_TAG, RunRecord, Verdict, VerdictKind, WarningCode
from qexp.report import single_run
from tests.helpers.rows import on_target, row

NO_LOSS = Verdict(VerdictKind.no_loss, 0.005, 10_000)
CANT_TELL = Verdict(VerdictKind.undecided, 0.005, 10_000, 24_000)


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
    tags |= {"latency_valid": str(trusted).lower()}
    typed = {key.replace("__", "."): value for key, value in params.items()}
    typed["resolved.runtime"] = "torchscript"
    return RunRecord(name, name, "FINISHED", params=typed, metrics=metrics, tags=tags)


def test_a_line_says_the_verdict_in_words_and_marks_the_timing() -> None:
    assert single_run.line(measured("a", 0.85, CANT_TELL, trusted=False)) == (
        "a  0.8507 → 0.8500  -0.07 [-0.29, +0.15]  can't tell with 10,000 images  4.90 → 0.86?  "
        "5.70×? [5.41, 5.93]  44.72 → 11.23  21 of 21"
    )


def test_a_line_says_where_its_accuracy_comes_from_and_leaves_out_what_is_not_known() -> None:
    other = on_target(measured("a", 0.8507), "exact", 0.8150, -0.035)
    assert "0.8500 → 0.8150 (exact)  -3.50 [-4.50, -2.50]" in single_run.line(other)
    assert single_run.line(RunRecord("a", "a", "FINISHED")) == "a"


def test_a_failure_is_named_with_its_error() -> None:
    rows = [row("a", 0.8), replace(row("b", 0.1), status="FAILED", tags={"error": "too bad."})]
    assert single_run.failures(rows) == "FAILED  b: too bad."
    assert single_run.summary(rows[1], 80) == "FAILED  b: too bad."


def test_a_run_is_told_in_half_a_screen_that_fits_its_width() -> None:
    warnings = {WARNING_TAG + code: f"{code} " * 30 for code in WarningCode}
    tags = {
        "latency_valid": "false", "latency_reason": "because " * 60, "latency_from": "another " * 20, "cpu": "c " * 60,
        "isa": "i", "torch": "t",
    }  # fmt: skip
    one = measured("a" * 200, 0.85, CANT_TELL)
    one = on_target(replace(one, tags={**one.tags, **tags, **warnings}), "emulated", 0.8, -0.05)
    for columns in (60, 80, 200):
        lines = single_run.summary(one, columns).splitlines()
        assert len(lines) <= 20
        assert max(map(len, lines)) <= columns
    assert f"! and {len(WarningCode) - 4} more warnings, in the tags of the run" in lines


def test_what_matters_of_a_run_is_kept() -> None:
    text = single_run.summary(measured("a", 0.85), 100)
    for told in (
        "0.8507 → 0.8500, -0.07 [-0.29, +0.15] points (95%)", "no loss beyond 0.5 points", "4.90 → 0.86 ms",
        "5.70× [5.41, 5.93]", "torchscript 0.86, eager 2.05 ms", "44.72 → 11.23 MB", "21 of 21 in INT8",
    ):  # fmt: skip
        assert told in text
    other = on_target(measured("a", 0.8507, target="avx2"), "exact", 0.8150, -0.035)
    assert "0.8500 → 0.8150, -3.50 [-4.50, -2.50] points (95%); on the CPU of target=avx2" in single_run.summary(
        other, 100
    )
