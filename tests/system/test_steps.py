"""Timing of the steps of a job."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from qexp.system import steps


@steps.step("inner")
def inner() -> str:
    time.sleep(0.01)
    return "done"


def test_steps_are_noted_by_name_and_all_of_them_make_the_whole(tmp_path: Path) -> None:
    started = time.perf_counter()
    with steps.noted(tmp_path / "steps.json"):
        with steps.step("outer"):
            assert inner() == "done"  # a part of it
        assert [inner(), inner()] == ["done"] * 2
        time.sleep(0.01)
    whole = time.perf_counter() - started
    seconds = json.loads((tmp_path / "steps.json").read_text())
    assert list(seconds) == ["outer", "inner", steps.OTHER]
    assert seconds["outer"] >= 0.01
    assert seconds["inner"] >= 0.02
    assert seconds[steps.OTHER] >= 0.01
    assert 0.04 <= sum(seconds.values()) <= whole


def test_nothing_is_noted_of_what_fails_and_where_nobody_asks(tmp_path: Path) -> None:
    assert inner() == "done"

    def failing() -> None:
        with steps.noted(tmp_path / "steps.json"), steps.step("a"):
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert not (tmp_path / "steps.json").exists()
