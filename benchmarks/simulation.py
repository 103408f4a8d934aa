"""A sweep of thousands of runs on many workers, simulated from the times that its parts take.

Each worker goes through runs one by one: it computes, measures alone on its host, and writes to the store. While one of
a host's workers measures, the others' computing stands still; the store takes so many requests at a time, in the order
in which they come.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Times:
    """Seconds of one run: computing, measuring alone on its host, and writing to the store."""

    compute: float
    timing: float
    store: float


@dataclass(frozen=True)
class Place:
    """hosts: each with so many workers; writers: runs that the store takes at a time."""

    hosts: int
    workers: int
    writers: int


@dataclass(frozen=True)
class Found:
    """The outcome of a simulation. seconds: of the whole sweep; locked: share of the workers' time that they wait for
    their host's lock; queued: for the store; store, timing: shares of the time in which a writer, or a host's lock, is
    busy."""

    seconds: float
    locked: float
    queued: float
    store: float
    timing: float


@dataclass
class _Host:
    """computing: when each worker will be done, by the host's clock, which stands still while one measures."""

    computing: list[tuple[float, int]] = field(default_factory=list)
    measuring: deque[int] = field(default_factory=deque)
    clock: float = 0.0
    since: float = 0.0
    version: int = 0


def simulate(runs: int, times: Times, place: Place) -> Found:
    """Simulate a sweep, event by event."""
    events: list[tuple[float, int, str, int, int]] = []
    order = itertools.count()
    hosts = [_Host() for _ in range(place.hosts)]
    free, queue = place.writers, deque[tuple[float, int, int]]()
    left, done, now = runs, 0, 0.0
    spent = 0.0  # seconds of all workers between the start and the end of their runs
    started: dict[tuple[int, int], float] = {}
    queued = 0.0

    def at(when: float, what: str, host: int, worker: int) -> None:
        heapq.heappush(events, (when, next(order), what, host, worker))

    def resume(number: int) -> None:
        """Let a host's clock go on from now, unless one measures there."""
        host = hosts[number]
        host.since, host.version = now, host.version + 1
        if host.computing and not host.measuring:
            at(now + host.computing[0][0] - host.clock, "computed", number, host.version)

    def pause(number: int) -> None:
        host = hosts[number]
        if not host.measuring:
            host.clock += now - host.since

    def begin(number: int, worker: int) -> None:
        nonlocal left
        if left:
            left -= 1
            started[number, worker] = now
            pause(number)
            heapq.heappush(hosts[number].computing, (hosts[number].clock + times.compute, worker))
            resume(number)

    def write() -> None:
        nonlocal free, queued
        while free and queue:
            asked, number, worker = queue.popleft()
            free, queued = free - 1, queued + now - asked
            at(now + times.store, "written", number, worker)

    for number, worker in itertools.product(range(place.hosts), range(place.workers)):
        begin(number, worker)
    while events:
        now, _, what, number, worker = heapq.heappop(events)
        host = hosts[number]
        if what == "computed" and worker == host.version:
            pause(number)
            _, worker = heapq.heappop(host.computing)
            host.measuring.append(worker)
            if len(host.measuring) == 1:
                at(now + times.timing, "measured", number, worker)
            resume(number)
        elif what == "measured":
            host.measuring.popleft()
            if host.measuring:
                at(now + times.timing, "measured", number, host.measuring[0])
            else:
                resume(number)
            queue.append((now, number, worker))
            write()
        elif what == "written":
            free, done = free + 1, done + 1
            spent += now - started[number, worker]
            write()
            begin(number, worker)
    needed = done * (times.compute + times.timing + times.store)
    return Found(
        seconds=now,
        locked=max(spent - needed - queued, 0.0) / spent,
        queued=queued / spent,
        store=done * times.store / (now * place.writers),
        timing=done * times.timing / (now * place.hosts),
    )
