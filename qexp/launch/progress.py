"""What a sweep shows while it runs: a line for each job on stdout, a bar over all of them on stderr's terminal."""

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
class _Jobs:
    """The bar, and what it says beside the jobs done: the best INT8 accuracy so far, how many failed or were reused."""

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


# The sweep's that this process runs the jobs of, one after the other.
_jobs: _Jobs | None = None


@contextlib.contextmanager
def over(count: int, reused: int = 0) -> Iterator[None]:
    """Show a bar over so many jobs, where stderr is a terminal; reused: how many of them needn't be run again."""
    global _jobs
    with tqdm(total=count, initial=reused, desc="jobs", unit="job", disable=None, leave=False, smoothing=0.1) as bar:
        _jobs = _Jobs(bar, reused)
        try:
            yield
        finally:
            _jobs = None


def shown() -> bool:
    """Whether there is a bar over jobs."""
    return _jobs is not None and not _jobs.bar.disable


def report(line: str, record: RunRecord) -> None:
    """A job has ended: print its line, above the bar, which goes on by one."""
    if shown():
        sys.stderr.write(_CLEAR_BELOW)  # the next job's bars, which are drawn anew, a line below where they were
    tqdm.write(line)
    sys.stdout.flush()
    if _jobs is not None:
        _jobs.add(record)


class Console(logging.StreamHandler[Any]):
    """Log lines above whatever bars there are."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


class Once(logging.Filter):
    """Lets each sentence through once: what all jobs of a sweep share is said by the first."""

    said: ClassVar[set[str]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if record.levelno >= logging.WARNING or message not in Once.said:
            Once.said.add(message)
            return True
        return False
