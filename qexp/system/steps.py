"""Timing of the steps of a job."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

OTHER = "other"  # time outside of any step

_seconds: ContextVar[dict[str, float] | None] = ContextVar("seconds", default=None)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Add the seconds that the context takes, or as a decorator the calls of the function, to step `name`.

    A step within another counts as the outer one. Outside `noted` nothing is recorded.
    """
    seconds = _seconds.get()
    if seconds is None:
        yield
        return
    outside = _seconds.set(None)
    started = time.perf_counter()
    try:
        yield
    finally:
        _seconds.reset(outside)
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started


@contextmanager
def noted(file: Path) -> Iterator[None]:
    """Write a JSON file with the seconds of each step within the context, in their order, and of the time between."""
    seconds: dict[str, float] = {}
    outside, started = _seconds.set(seconds), time.perf_counter()
    try:
        yield
    finally:
        _seconds.reset(outside)
    seconds[OTHER] = time.perf_counter() - started - sum(seconds.values())
    file.write_text(json.dumps(seconds, indent=1) + "\n")
