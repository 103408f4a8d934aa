"""Accuracies as reports compare them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from qexp.metrics import Metric
from qexp.records import RunRecord
from qexp.report import accuracies
from tests.helpers.rows import on_target, row


@pytest.mark.parametrize("source", list(accuracies.SOURCES))
def test_where_the_targets_cpu_is_another_its_accuracy_on_its_images_counts(source: str) -> None:
    found = accuracies.accuracy(on_target(row("a", 0.85), source, 0.8, -0.06))
    assert found is not None
    # FP32 is that on the images measured, so that the difference is the one of the two.
    assert (found.fp32, found.int8, found.delta.value, found.sampling) == pytest.approx((0.86, 0.8, -0.06, 0.01))
    assert (found.source, found.comparable) == (source, pytest.approx(0.84))


def test_where_the_target_runs_the_same_the_accuracy_of_what_ran_counts() -> None:
    here = accuracies.accuracy(row("a", 0.85))
    assert here is not None
    assert (here.fp32, here.int8, here.source, here.comparable) == (0.9, 0.85, "", 0.85)
    assert accuracies.accuracy(on_target(row("a", 0.85), "executed", 0.8, -0.06)) == here
    assert accuracies.accuracy(replace(row("a", 0.85), tags={"accuracy_source": "exact"})) == here  # not measured
    assert accuracies.accuracy(RunRecord("a", "a", "FINISHED")) is None


def test_what_is_no_number_is_no_accuracy() -> None:
    record = row("a", 0.85)
    assert accuracies.accuracy(replace(record, metrics={**record.metrics, Metric.delta_low: math.nan})) is None
