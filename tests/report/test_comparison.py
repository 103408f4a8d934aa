"""Two runs compared image by image, against counts that are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qexp import statistics
from qexp.errors import InputError
from qexp.records import RunRecord
from qexp.report import comparison, html
from tests.helpers.rows import row

IMAGES = 200


def arrays(classes: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """What a run stores of predictions with these classes."""
    logits = np.eye(10, dtype=np.float32)[classes]
    ids = np.array([f"image {number}" for number in range(len(labels))])
    return {"fp32": np.eye(10, dtype=np.float32)[labels], "int8": logits, "labels": labels, "image_ids": ids}


@pytest.fixture
def found() -> comparison.Compared:
    """Seven images that only the first has right, three that only the second has, and two that both have wrong."""
    labels = np.arange(IMAGES) % 10
    first, second = labels.copy(), labels.copy()
    second[:7] = (labels[:7] + 1) % 10
    first[10:13] = (labels[10:13] + 1) % 10
    first[20:22], second[20:22] = (labels[20:22] + 1) % 10, (labels[20:22] + 2) % 10
    first[30:40] = second[30:40] = (labels[30:40] + 1) % 10  # equally wrong, so no difference
    runs = row("a", 0.9, observer="minmax", seed="0"), row("b", 0.9, observer="mse", seed="0")
    return comparison.compared(runs, [arrays(first, labels), arrays(second, labels)])


def test_the_images_and_the_paired_test_are_those_of_a_direct_count(found: comparison.Compared) -> None:
    assert list(found.first_only) == list(range(7))
    assert list(found.second_only) == [10, 11, 12]
    assert list(found.both_wrong) == [20, 21]
    assert found.delta == statistics.tango(7, 3, IMAGES)
    assert found.p == statistics.mcnemar(7, 3)
    assert found.same_fp32
    assert found.settings == {"observer": ("minmax", "mse")}


def test_what_is_printed_says_what_is_shown_and_what_differs(found: comparison.Compared) -> None:
    text = comparison.text(found, Path("x/compare.html"), "")
    assert text.startswith("No difference in INT8 accuracy between 'a' and 'b' is shown: -2.00 [-")
    assert "12 of 200 images get another class" in " ".join(text.split())
    assert "observer  minmax → mse" in text


def test_a_difference_that_is_shown_names_the_better_run() -> None:
    labels = np.arange(IMAGES) % 10
    worse = np.where(np.arange(IMAGES) < 40, (labels + 1) % 10, labels)
    runs = row("a", 0.9), row("b", 0.9)
    found = comparison.compared(runs, [arrays(worse, labels), arrays(labels, labels)])
    assert comparison.conclusion(found).startswith("'b' is shown to be more accurate in INT8 than 'a'")


def test_runs_of_other_images_are_refused() -> None:
    labels = np.arange(IMAGES) % 10
    runs = row("a", 0.9), row("b", 0.9)
    with pytest.raises(InputError, match="'a' has 200 images and 'b' 100"):
        comparison.compared(runs, [arrays(labels, labels), arrays(labels[:100], labels[:100])])


def test_the_contact_sheet_shows_each_image_with_its_classes(found: comparison.Compared) -> None:
    names = [f"class <{number}>" for number in range(10)]
    pictures = {int(index): "data:image/png;base64,AAAA" for index in found.differing}
    page = html.render(comparison.page(found, names, pictures, ""))
    assert page.count("<img ") == 12
    assert "Only the first is right: 7 images." in page
    assert "is class &lt;0&gt;" in page
    assert "<script" not in page


def test_without_the_images_the_page_has_their_names_and_says_why(found: comparison.Compared) -> None:
    page = html.render(comparison.page(found, (), {}, "The images are not shown, since there are none."))
    assert "The images are not shown, since there are none." in page
    assert "image 0" in page
    assert "<img" not in page


def test_runs_of_one_setting_and_equal_answers_differ_in_nothing() -> None:
    labels = np.arange(IMAGES) % 10
    same = [arrays(labels, labels)] * 2
    found = comparison.compared((RunRecord("1", "a", "FINISHED"), RunRecord("2", "a", "FINISHED")), same)
    assert comparison.counted(found) == "Both give all of 200 images the same class."
    assert "Nothing: both have the same settings." in html.render(comparison.page(found, (), {}, ""))
