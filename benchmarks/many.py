"""A sweep of hundreds of runs of the smallest model: the cost of its last runs against its first, and the share of it
that is neither the model's nor Hydra's."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
from tqdm import tqdm

from benchmarks.size import sized
from benchmarks.speed import TORCHS, composed
from benchmarks.study import ROOT, listed, steps
from qexp.config.schema import Config
from qexp.launch import job_process
from qexp.system.steps import OTHER

RUNS = sized(500, 8)
EDGE = sized(50, 3)  # runs at the start, after the first few, and at the end, that are compared
FIRST = sized(5, 2)
HYDRAS = sized(50, 4)
ALONE = sized(10, 1)
SMALLEST = (
    "model=tiny",
    "train=fast",
    "latency=off",
    "per_layer.images=0",
    "saturation.exact_images=0",
    "calib=small",
    TORCHS,
)
# The steps of a run that aren't the model's: loading images, writing files.
RECORDS = ("load data", "result", OTHER)


@dataclass(frozen=True)
class Ended:
    """The end of a job: its time in seconds and the memory of the sweep's lasting processes, in MB (10^6 bytes)."""

    at: float
    megabytes: float


def many(outputs: str) -> None:
    """Measure seconds per run and memory at both ends of RUNS runs, a run's time by step, and the same sweep again."""
    kept = f"{outputs}/many"
    asked = ("-m", "qexp", "-m", *SMALLEST, "study=many", f"outputs={kept}", f"calib.seed=range({RUNS})")
    ended = watched(RUNS, *asked)[FIRST:]
    ends = [ended[: EDGE + 1], ended[-EDGE - 1 :]]
    first, last = (each(part) for part in ends)
    before, after = (statistics.median(one.megabytes for one in part) for part in ends)
    print(f"{EDGE} runs at the start {first:.3f} s each, at the end {last:.3f} s: {last / first:.2f}×")
    print(f"memory at the start {before:.0f} MB, at the end {after:.0f} MB: {after / before:.2f}×", flush=True)

    configs = [composed(kept, *SMALLEST, "sweep=many", f"calib.seed={RUNS + n}") for n in range(ALONE)]
    folder = Path(outputs) / "alone"
    folder.mkdir()
    runs = in_processes_of_their_own(configs, folder)
    by_step = {name: statistics.median(run.get(name, 0) for run in runs) for name in runs[0]}
    model = sum(value for name, value in by_step.items() if name not in RECORDS)
    hydras = each(watched(HYDRAS, "-m", "benchmarks.nothing", "-m", f"calib.seed=range({HYDRAS})")[FIRST:])
    outside = statistics.fmean([first, last]) - model
    print(f"beyond the {model:.3f} s that a run's model takes by itself: {outside:.3f} s, beside which jobs overlap")
    print(f"a job of Hydra's that does nothing takes {hydras:.3f} s")
    print(f"a run by itself: {listed(by_step)}", flush=True)

    started = time.perf_counter()
    watched(0, *asked)
    whole = time.perf_counter() - started
    print(f"the same sweep again, all runs finished: {whole:.1f} s, {whole / RUNS:.3f} s a run", flush=True)


def in_processes_of_their_own(configs: list[Config], folder: Path) -> list[dict[str, float]]:
    """The seconds of each step (see `study.steps`) of each configuration, in a new forked process as a sweep's job."""
    job_process.start_server()
    forked = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(1, forked, max_tasks_per_child=1) as executor:
        return [executor.submit(steps, config, folder).result() for config in configs]


def each(ended: list[Ended]) -> float:
    """Median seconds between one job's end and the next."""
    return statistics.median(after.at - before.at for before, after in itertools.pairwise(ended))


def watched(jobs: int, *arguments: str) -> list[Ended]:
    """Run a fresh interpreter that prints a line with # for each job that has ended.

    Ends the benchmark where it fails or runs another number of jobs than `jobs`.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found: list[Ended] = []
    command = [sys.executable, *arguments]
    with (
        tqdm(total=jobs, desc=arguments[1], disable=None, leave=False) as bar,
        subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process,
    ):
        root = psutil.Process(process.pid)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("#"):
                # The sweep, and the server that its jobs are forked from; the jobs are the server's children.
                lasting = sum(one.memory_info().rss for one in [root, *root.children()])
                found.append(Ended(time.perf_counter(), lasting / 1e6))
                bar.update()
    if process.returncode or len(found) != jobs:
        sys.exit(f"{' '.join(arguments)}: status {process.returncode}, {len(found)} of {jobs} jobs ended")
    return found
