"""The bar over a sweep's jobs, and the lines that are printed above it."""

from __future__ import annotations

import contextlib
import io
import logging
import sys

import pytest

from qexp.launch import progress
from qexp.metrics import Metric
from qexp.records import RunRecord


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def row(accuracy: float | None) -> RunRecord:
    if accuracy is None:
        return RunRecord("", "job", "FAILED")
    return RunRecord("", "job", "FINISHED", metrics={Metric.accuracy_int8: accuracy})


def test_a_bar_tells_jobs_done_failed_reused_and_the_best_so_far(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.bar(6, reused=2):
        assert progress.shown()
        for number, accuracy in enumerate((0.8, 0.9, None, 0.7)):
            progress.report(f"#{number}", row(accuracy))
            assert capsys.readouterr().out == f"#{number}\n"
        progress._progress.bar.refresh()  # type: ignore[union-attr]
    assert not progress.shown()
    last = [text for text in terminal.getvalue().split("\r") if text.strip()][-1]
    assert "6/6" in last
    assert "best INT8 0.9000, 1 failed, 2 reused" in last


def test_where_there_is_no_terminal_there_are_lines_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar(1):
        assert not progress.shown()
        progress.report("#1", row(0.8))
    progress.report("#2", row(0.8))  # in a process of another launcher
    assert capsys.readouterr() == ("#1\n#2\n", "")


def test_a_log_line_is_written_once_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    for name in ("stderr", "stdout"):
        monkeypatch.setattr(sys, name, terminal)
    handler = progress.Console(terminal)
    with progress.bar(2):
        handler.handle(logging.LogRecord("qexp", logging.INFO, "", 0, "a line", (), None))
    written = terminal.getvalue()
    assert written.count("a line") == 1
    assert "\ra line\n" in written  # at the start of a line that has been cleared


def test_a_full_disk_costs_lines_of_the_log_file_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    record = logging.LogRecord("qexp", logging.INFO, "", 0, "a line", (), None)
    for kind in (logging.FileHandler, progress.LogFile):
        handler = kind("/dev/full")
        handler.handle(record)
        assert ("Traceback" in capsys.readouterr().err) == (kind is logging.FileHandler)
        with contextlib.suppress(OSError):
            handler.close()
    handler = progress.LogFile("/dev/full")
    handler.handle(record)
    handler.close()
    handler.handle(logging.LogRecord("qexp", logging.INFO, "", 0, "%d", ("no number",), None))
    assert "TypeError" in capsys.readouterr().err
