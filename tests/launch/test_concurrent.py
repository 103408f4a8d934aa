"""Two jobs of a sweep at a time: it changes no result, disturbs no timing, and each fails, logs and ends by itself."""

from __future__ import annotations

import itertools
import json
import logging
import re
import sqlite3
import subprocess
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from hydra.core.utils import JobReturn, JobStatus

from qexp.config import schema
from qexp.errors import RunError
from qexp.latency import shared_timings
from qexp.launch import concurrent, job_process
from qexp.launch.job_process import JobProcess
from qexp.records import Result
from qexp.system import machine_lock
from tests.helpers.jobs import TIMED, without_times

Composed = Callable[..., schema.Config]

SMALL = ("model=tiny", "latency=off", "per_layer.images=0", "saturation.exact_images=0", "calib=small")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The starts (`+job0`) and ends (`-job0`) of jobs from now on, in their order, by the names of their folders."""
    found: list[str] = []
    start, end = job_process.start, JobProcess.end

    def started(config: schema.Config, folder: Path) -> JobProcess:
        found.append(f"+{folder.name}")
        return start(config, folder)

    def ended(job: JobProcess) -> None:
        if job.ended and not job.channel.closed:
            found.append(f"-{job.task.folder.name}")
        end(job)

    monkeypatch.setattr(job_process, "start", started)
    monkeypatch.setattr(JobProcess, "end", ended)
    return found


def work(
    config: schema.Config, folder: Path, thrown: list[BaseException] | None = None
) -> Generator[JobProcess, Any, Any]:
    """Start a job and yield its process, as a run does. thrown: collects the errors that are thrown in."""
    folder.mkdir(exist_ok=True)
    process = job_process.start(config, folder)
    try:
        return (yield process)
    except BaseException as error:
        if thrown is not None:
            thrown.append(error)
        raise
    finally:
        process.end()


def launched(asked: Sequence[schema.Config], tmp_path: Path, count: int = 2) -> list[JobReturn]:
    """Launch jobs one after the other, in the folders job0, job1, ..., and return what Hydra's launcher would."""
    returned = [JobReturn(status=JobStatus.COMPLETED) for _ in asked]
    with concurrent.at_a_time(count) as running:
        for number, config in enumerate(asked):
            try:
                returned[number].return_value = concurrent.perform(number, work(config, tmp_path / f"job{number}"))
            except RunError as error:
                returned[number].status, returned[number].return_value = JobStatus.FAILED, error
    for number, one in enumerate(returned):
        running.complete(number, one)
    return returned


def numbers(result: Result) -> dict[str, float]:
    return without_times(result.metrics)


def test_two_jobs_run_at_a_time_and_give_what_they_give_by_themselves(
    composed: Composed, checkpoint: Path, tmp_path: Path, seen: list[str]
) -> None:
    elsewhere = f"outputs={tmp_path / 'elsewhere'}"
    asked = [composed(*SMALL, f"model.checkpoint={checkpoint}", f"calib.seed={seed}") for seed in range(3)]
    alone = [composed(*SMALL, f"model.checkpoint={checkpoint}", f"calib.seed={seed}", elsewhere) for seed in range(3)]
    results = [one.return_value for one in launched(asked, tmp_path)]
    assert seen[:2] == ["+job0", "+job1"]
    assert seen[2] == "+job2"  # before anything else is done for the one that has ended
    assert sorted(seen[3:]) == ["-job0", "-job1", "-job2"]
    seen.clear()
    one_by_one = [one.return_value for one in launched(alone, tmp_path, count=1)]
    assert seen == ["+job0", "-job0", "+job1", "-job1", "+job2", "-job2"]
    assert list(map(numbers, results)) == list(map(numbers, one_by_one))
    assert len({result.tags["calib_digest"] for result in results}) == 3


def windows_of(folder: Path) -> tuple[float, float]:
    """The times at which a job started and ended timing."""
    rows = json.loads((folder / "latency.json").read_text())["rows"]
    return min(row["started"] for row in rows), max(row["ended"] for row in rows)


def test_nobody_computes_while_one_times(composed: Composed, checkpoint: Path, tmp_path: Path) -> None:
    settings = (*TIMED, f"model.checkpoint={checkpoint}", "latency.reuse=false", "sweep=one")
    asked = [composed(*settings, f"calib.seed={seed}") for seed in range(4)]
    assert all(one.status is JobStatus.COMPLETED for one in launched(asked, tmp_path))
    folders = sorted(tmp_path.glob("job*"))
    for timing in folders:
        began, until = windows_of(timing)
        written = [file.stat().st_mtime for other in folders if other != timing for file in other.rglob("*.*")]
        written += [file.stat().st_mtime for file in (tmp_path / "outputs" / "cache").glob("*.npy")]
        assert not [when for when in written if began < when < until]
    spans = sorted(map(windows_of, folders))
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))


def test_of_two_jobs_that_want_one_timing_the_second_waits_for_it(
    composed: Composed, checkpoint: Path, tmp_path: Path
) -> None:
    settings = (*TIMED, f"model.checkpoint={checkpoint}", "sweep=one")
    asked = [composed(*settings, f"calib.seed={seed}") for seed in range(5)]
    results = [one.return_value for one in launched(asked, tmp_path)]
    made = [result.tags["latency_valid"] == "true" for result in results if "latency_from" not in result.tags]
    # On a machine that is not quiet there are more attempts, none of which is valid but perhaps the last.
    assert 1 <= len(made) <= shared_timings.TIMING_ATTEMPTS
    assert sum(made) <= 1


TROUBLE = """
import logging, os, time


def make(split, what, seconds=0):
    logging.getLogger("trouble").info("this is %s", what)
    time.sleep(seconds)
    os._exit(3)
"""


@pytest.fixture
def trouble(composed: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., schema.Config]:
    """trouble(what, seconds) -> the configuration of a job that logs `what` and crashes after so many seconds."""
    (tmp_path / "trouble.py").write_text(TROUBLE)
    monkeypatch.syspath_prepend(tmp_path)
    custom = ("dataset=custom", "dataset._target_=trouble.make")
    return lambda what, seconds, *more: composed(*custom, f"+dataset.what={what}", f"+dataset.seconds={seconds}", *more)


def test_each_fails_alone_and_the_others_go_on(
    composed: Composed, checkpoint: Path, tmp_path: Path, trouble: Callable[..., schema.Config]
) -> None:
    good = composed(*SMALL, f"model.checkpoint={checkpoint}")
    late = trouble("late", 600, "job.timeout=2")
    first, second, third, fourth = launched([trouble("bad", 0), good, late, good], tmp_path)
    assert [one.status for one in (first, second, third, fourth)] == [
        JobStatus.FAILED, JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.COMPLETED
    ]  # fmt: skip
    assert str(first._return_value) == "the job's process ended with exit status 3 before the job was done."
    assert str(third._return_value) == "job.timeout=2: the job was not done after 2 s, and was ended."
    assert numbers(second.return_value) == numbers(fourth.return_value)
    assert not list(tmp_path.glob(f"*/{job_process.CRASH}"))


def test_what_stops_the_sweep_ends_all_and_is_thrown_into_every_run(
    tmp_path: Path, trouble: Callable[..., schema.Config]
) -> None:
    thrown: list[BaseException] = []
    started: list[JobProcess] = []
    pids: list[int] = []

    def stopped() -> None:
        with concurrent.at_a_time(2) as running:
            for number in range(2):
                concurrent.perform(number, work(trouble(number, 600), tmp_path / f"job{number}", thrown))
            started.extend(running._running)
            pids.extend(one.process.pid or 0 for one in started)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert [type(error) for error in thrown] == [KeyboardInterrupt] * 2
    assert all(one.channel.closed for one in started)
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
    with machine_lock.computing(wait=False):
        pass  # nothing of it is held


@contextmanager
def logging_to(*handlers: logging.Handler) -> Iterator[None]:
    """Log to these handlers within the context and close them, as Hydra does for a job."""
    before = logging.root.handlers, logging.root.level
    logging.root.handlers = list(handlers)
    logging.root.setLevel(logging.INFO)
    try:
        yield
    finally:
        logging.root.handlers = before[0]
        logging.root.setLevel(before[1])
        for handler in handlers:
            handler.close()


def test_each_job_logs_into_its_own_file(tmp_path: Path, trouble: Callable[..., schema.Config]) -> None:
    with concurrent.at_a_time(2):
        for number in range(3):
            with logging_to(logging.FileHandler(tmp_path / f"{number}.log")):
                concurrent.perform(number, work(trouble(f"job{number}", 0.5), tmp_path / f"job{number}"))
    said = [(tmp_path / f"{number}.log").read_text() for number in range(3)]
    assert said == [f"this is job{number}\n" for number in range(3)]
    here = [Path(file.path).name for file in psutil.Process().open_files()]
    assert not [name for name in here if name.endswith(".log") and name[0].isdigit()]


def test_the_setting_that_was_before_is_refused(qexp: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    refused = qexp("job.ahead=false", "-m")
    assert refused.returncode == 1
    assert refused.stderr == "job.ahead is now job.at_a_time: use job.at_a_time=... in its place.\n"


@pytest.mark.parametrize(("count", "beside"), [(2, True), (1, False)])
def test_a_sweep_runs_two_jobs_at_a_time_unless_told_otherwise(
    qexp: Callable[..., subprocess.CompletedProcess[str]], checkpoint: Path, tmp_path: Path, count: int, beside: bool
) -> None:
    result = qexp(
        *SMALL, f"model.checkpoint={checkpoint}", "calib.seed=1,2,3", f"job.at_a_time={count}", "-m",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = re.findall(r"^#(\d)  ", result.stdout, re.MULTILINE)
    assert sorted(lines) == ["1", "2", "3"]
    with closing(sqlite3.connect(tmp_path / "outputs" / "mlflow.db")) as connection:
        found = connection.execute(
            "select r.start_time, r.end_time, r.status from runs r join tags t on t.run_uuid = r.run_uuid "
            "and t.key = 'mlflow.parentRunId' order by r.start_time"
        ).fetchall()
    assert [status for *_, status in found] == ["FINISHED"] * 3
    assert (found[1][0] < found[0][1]) == beside
    assert len(list(tmp_path.glob("outputs/artifacts/*/artifacts/hydra/overrides.yaml"))) == 3
    sweeps = {
        json.loads(path.read_text())["sweep"] for path in tmp_path.glob("outputs/artifacts/*/artifacts/config.json")
    }
    assert len(sweeps) == 1
    assert None not in sweeps
