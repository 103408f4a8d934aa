"""A sweep's progress: a line on stdout for each job that ends, and a bar over all jobs where stderr is a terminal."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from tqdm import tqdm

from qexp.metrics import Metric
from qexp.records import RunRecord

_CLEAR_BELOW = "\x1b[J"


@dataclass
class SweepProgress:
    """The bar, with the best INT8 accuracy so far and how many jobs failed or were reused."""

    bar: Any
    reused: int = 0
    failed: int = 0
    best: float | None = None

    def add(self, record: RunRecord) -> None:
        accuracy = record.metrics.get(Metric.accuracy_int8)
        self.failed += record.status == "FAILED"
        self.best = max((value for value in (self.best, accuracy) if value is not None), default=None)
        best = f"best INT8 {Metric.accuracy_int8.text(self.best)}" if self.best is not None else ""
        failed = f"{self.failed} failed" if self.failed else ""
        reused = f"{self.reused} reused" if self.reused else ""
        self.bar.set_postfix_str(", ".join(text for text in (best, failed, reused) if text), refresh=False)
        self.bar.update()


# Of the sweep whose jobs this process runs.
_progress: SweepProgress | None = None


@contextlib.contextmanager
def bar(count: int, reused: int = 0) -> Iterator[None]:
    """Show a bar over `count` jobs, where stderr is a terminal. reused: how many of them aren't run again."""
    global _progress
    with tqdm(total=count, initial=reused, desc="jobs", unit="job", disable=None, leave=False, smoothing=0.1) as drawn:
        _progress = SweepProgress(drawn, reused)
        try:
            yield
        finally:
            _progress = None


def in_owner() -> bool:
    """True in the process that owns a sweep, False in one in which a launcher runs its jobs."""
    return _progress is not None


def shown() -> bool:
    """True if a bar is on the terminal."""
    return _progress is not None and not _progress.bar.disable


def report(line: str, record: RunRecord) -> None:
    """Print the line of a job that has ended above the bar, and advance the bar by one."""
    if shown():
        sys.stderr.write(_CLEAR_BELOW)  # other jobs' bars, which are drawn again a line below
    tqdm.write(line)
    sys.stdout.flush()
    if _progress is not None:
        _progress.add(record)


class Console(logging.StreamHandler[Any]):
    """Writes log lines above the bars."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


class LogFile(logging.FileHandler):
    """Writes a job's log file, as far as the disk has room for it."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing for a full disk, where Python prints a traceback for each line."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of what is still to be written
            super().close()


class Once(logging.Filter):
    """Passes each message below a warning once: all jobs of a sweep log some of the same."""

    said: ClassVar[set[str]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if record.levelno >= logging.WARNING or message not in Once.said:
            Once.said.add(message)
            return True
        return False
