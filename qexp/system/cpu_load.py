"""The machine's load: counters of processor time, and how much of it other processes and a hypervisor took."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import psutil


def load_average() -> float | None:
    """Runnable tasks, mean of the last minute; None where the system doesn't say."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return None


@dataclass(frozen=True)
class CpuCounters:
    """Seconds of processor time since boot, over all processors, and of this process (all its threads) since its start.

    busy: of all processes; steal: in which a hypervisor ran something else although this machine had work, None where
    the system doesn't say; own: of this process. clock: seconds of a monotonic clock.
    """

    clock: float
    busy: float
    steal: float | None
    own: float


def cpu_counters() -> CpuCounters:
    """The counters now; the difference of two readings says what happened between them."""
    times = psutil.cpu_times()._asdict()
    idle = ("idle", "iowait", "steal", "guest", "guest_nice")  # guests' time is in user time already
    busy = sum(seconds for name, seconds in times.items() if name not in idle)
    return CpuCounters(time.monotonic(), busy, times.get("steal"), time.process_time())


def others(before: CpuCounters, after: CpuCounters) -> float:
    """The mean number of processors that were busy with other processes than this one between two readings."""
    elapsed = after.clock - before.clock
    # The system counts in ticks of 10 ms, and this process's own time is exact: the difference may fall below 0.
    return max(0.0, (after.busy - before.busy - (after.own - before.own)) / elapsed) if elapsed > 0 else 0.0


def stolen(before: CpuCounters, after: CpuCounters) -> float | None:
    """The mean number of processors that a hypervisor gave to something else although this machine had work for them.

    None where the system doesn't say.
    """
    if before.steal is None or after.steal is None or after.clock <= before.clock:
        return None
    return (after.steal - before.steal) / (after.clock - before.clock)
