"""Overrides of small jobs, and waiting for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

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


def without_times(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics but for those that differ from run to run with `latency=off`: how long something took."""
    return {name: value for name, value in metrics.items() if name not in ("calib/seconds", "machine/lock_wait_share")}
