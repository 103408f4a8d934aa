"""Changes of each class, against direct counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qexp import statistics
from qexp.records import Top1
from qexp.report import classes

LABELS = np.repeat(np.arange(4, dtype=np.int32), 100)
FP32 = LABELS.copy()
FP32[LABELS == 3] = 0  # FP32 has none of the last class
INT8 = FP32.copy()
INT8[:30] = 1  # loses 30 of the first class
INT8[100:102] = 2  # and 2 of the second,
INT8[300:304] = 3  # and wins 4 of the last
TOP1 = Top1(LABELS, FP32, {"eager": INT8}, ("a", "b", "c"))


def test_changes_are_counted_and_the_shown_loss_comes_first() -> None:
    found = classes.changes(TOP1, "eager")
    assert [(one.name, one.fp32_only, one.int8_only, one.shown) for one in found] == [
        ("a", 30, 0, True),
        ("b", 2, 0, False),
        ("c", 0, 0, False),
        ("3", 0, 4, False),  # without a name
    ]
    assert [one.change.value for one in found] == pytest.approx([-0.3, -0.02, 0, 0.04])
    assert [one.fp32 for one in found] == [1, 1, 1, 0]


def test_intervals_allow_for_the_number_of_classes() -> None:
    alone = statistics.tango(30, 0, 100, confidence=1 - 0.05 / 4)
    found = classes.changes(TOP1, "eager")[0].change
    assert (found.low, found.high, found.confidence) == (pytest.approx(alone.low), pytest.approx(alone.high), 0.95)


def test_a_shown_loss_comes_before_a_larger_one_of_few_images() -> None:
    few = replace(TOP1, labels=np.append(LABELS, 5), fp32=np.append(FP32, 5), int8={"eager": np.append(INT8, 0)})
    assert [(one.name, one.images) for one in classes.changes(few, "eager")[:2]] == [("a", 100), ("5", 1)]


def test_where_the_target_was_measured_its_answers_on_its_images_count() -> None:
    images = np.array([0, 1, 100, 399])
    found = classes.changes(replace(TOP1, target_images=images, target=LABELS[images]), "torchscript")
    assert {one.name: (one.images, one.fp32_only, one.int8_only) for one in found} == {
        "a": (2, 0, 0), "b": (1, 0, 0), "3": (1, 0, 1),
    }  # fmt: skip


def test_without_predictions_nothing_is_told() -> None:
    assert classes.changes(TOP1, "onnxruntime") == []
    none = np.array([], dtype=np.int32)
    assert classes.changes(Top1(none, none, {"eager": none}, ()), "eager") == []
