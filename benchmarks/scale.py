"""Runs per hour with one worker and with two, what the machine's lock costs, and 10,000 runs on 100 workers, simulated
from the times that a run's parts take here."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from benchmarks.many import watched
from benchmarks.simulation import Place, Times, simulate
from benchmarks.size import sized
from benchmarks.speed import TORCHS
from qexp import tracking
from qexp.config.schema import Connection
from qexp.metrics import Metric
from qexp.records import RunRecord

RUNS = sized(8, 3)
ROUNDS = sized(2, 1)
WRITES = sized(30, 3)
SMALL = sized((), ("model=tiny", "per_layer.images=0", "saturation.exact_images=0", "calib=small"))
KINDS = {"accuracies alone": ("latency=off",), "timed too": ("latency=quick", *sized((), ("latency.seconds=0.1",)))}
SIMULATED = 10_000
# Hosts, with so many workers on each; and runs that the store takes at a time.
PLACES = ((100, 1), (25, 4), (10, 10))
WRITERS = (1, 4, 16)


def scale(outputs: str) -> None:
    """Measure the same sweep with one and two workers, alternately, and simulate large ones."""
    fixed = ("-m", "qexp", "-m", TORCHS, "train=fast", *SMALL, "compute.threads=1", f"outputs={outputs}")
    first, seconds = 0, {}
    for kind, settings in KINDS.items():
        took: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(ROUNDS):
            for workers in took:
                study = f"{kind} {workers}"
                seeds = f"calib.seed=range({first},{first + RUNS})"
                first += RUNS
                ended = watched(RUNS, *fixed, *settings, f"job.at_a_time={workers}", f"study='{study}'", seeds)
                # From the end of the first that ran together: start-up, and training, are no part of it.
                took[workers].append((ended[-1].at - ended[workers - 1].at) / (RUNS - workers))
        one, two = (statistics.median(took[workers]) for workers in took)
        shares = " and ".join(f"{waited(runs(outputs, f'{kind} {workers}')):.0%}" for workers in took)
        print(f"{kind}: {3600 / one:.0f} runs an hour with one worker, {3600 / two:.0f} with two: {one / two:.2f}×")
        print(f"  of the runs' time with one and two workers, {shares} went to waiting for the lock", flush=True)
        seconds[kind] = statistics.median(duration(run) * (1 - share_of(run)) for run in runs(outputs, f"{kind} 1"))
    store = writing(Path(outputs))
    alone = seconds["accuracies alone"]
    timing = max(seconds["timed too"] - alone, 0.0)
    times = Times(max(alone - store, 0.01), timing, store)
    print(f"a run computes for {times.compute:.2f} s, is timed for {timing:.2f} s, and is written in {store:.3f} s")
    for kind, each in {"each timed": times, "none timed": Times(times.compute, 0.0, store)}.items():
        for hosts, workers in PLACES:
            for writers in WRITERS:
                say(kind, each, Place(hosts, workers, writers))


def say(kind: str, times: Times, place: Place) -> None:
    """Print what the simulation of SIMULATED runs finds."""
    found = simulate(SIMULATED, times, place)
    where = f"{kind}, {place.hosts} hosts of {place.workers}, {place.writers} writers at a time"
    waits = f"waiting for the lock {found.locked:.0%}, for the store {found.queued:.0%}"
    busy = f"the store is busy {found.store:.0%}, the hosts' locks {found.timing:.0%}"
    print(f"{where}: {found.seconds / 3600:.2f} h; {waits}; {busy}", flush=True)


def runs(outputs: str, study: str) -> list[RunRecord]:
    """The jobs of a study in the store of these outputs."""
    store = tracking.connect_existing(Connection(None, None, 10.0), Path(outputs))
    return list(tracking.find_runs(store, study=study).records)


def duration(run: RunRecord) -> float:
    return (run.end or run.start) - run.start


def waited(records: list[RunRecord]) -> float:
    """The share of the runs' time that they waited for the lock."""
    total = sum(map(duration, records))
    return sum(duration(run) * share_of(run) for run in records) / total


def share_of(run: RunRecord) -> float:
    return run.metrics[Metric.lock_wait_share]


def writing(outputs: Path) -> float:
    """Median seconds for all that is written of a run to the store: opened, filled as those here, ended."""
    store = tracking.connect_existing(Connection(None, None, 10.0), outputs)
    like = runs(str(outputs), "accuracies alone 1")[0]
    took = []
    for number in range(WRITES):
        began = time.perf_counter()
        with tracking.start_run(store, experiment="scale", name=f"{number}", params=like.params, tags={}) as run:
            run.log_artifacts({"config.json": dict(like.params)})
            use = tracking.DatasetUse("images", "d", "here", "evaluation")
            outcome = tracking.Outcome(like.metrics, {"verdict": "x" * 100}, {}, [use], {})
            tracking.deliver(run, outcome, outputs)
        took.append(time.perf_counter() - began)
    return statistics.median(took)
