"""How long the steps of a job take."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

OTHER = "other"  # what is none of the steps

_seconds: ContextVar[dict[str, float] | None] = ContextVar("seconds", default=None)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Note the seconds that this takes; as a decorator, those that calls of the function take.

    A step within another counts as that other. Outside `noted` nothing is noted.
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
    """Write a JSON file with the seconds of each step that is taken within, by name in their order, and of the rest."""
    seconds: dict[str, float] = {}
    outside, started = _seconds.set(seconds), time.perf_counter()
    try:
        yield
    finally:
        _seconds.reset(outside)
    seconds[OTHER] = time.perf_counter() - started - sum(seconds.values())
    file.write_text(json.dumps(seconds, indent=1) + "\n")
