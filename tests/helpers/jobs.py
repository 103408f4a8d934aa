"""Overrides of small jobs, and waiting for them."""

from __future__ import annotations

import time
from collections.abc import Callable

TIMED = (
    "model=tiny", "calib.batches=2", "per_layer.images=0", "saturation.exact_images=0", "latency=quick",
    "latency.seconds=0.1", "latency.warmup_seconds=0", "runtimes=[eager]",
)  # fmt: skip


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Return once the condition holds; AssertionError after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
