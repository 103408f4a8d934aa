"""A sweep's next job is begun while one evaluates: it changes no result, waits its turn, disturbs no timing."""

from __future__ import annotations

import itertools
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from qexp.config import schema
from qexp.errors import RunError
from qexp.launch import jobs
from qexp.metrics import Metric
from qexp.records import Result
from tests.helpers.jobs import TIMED

Composed = Callable[..., schema.Config]

SMALL = (
    "model=tiny", "latency=off", "per_layer.images=0", "saturation.exact_images=0", "calib=small",
    "cache.enabled=false",
)  # fmt: skip


@dataclass(frozen=True)
class Beginning:
    """Of a job's process: its folder's name, when, and its process id."""

    name: str
    at: float
    pid: int | None


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[Beginning]:
    """Every job's process that is begun from now on."""
    found: list[Beginning] = []
    begin = jobs._begin

    def watched(order: jobs.Order) -> jobs._Begun:
        at, job = time.time(), begin(order)
        found.append(Beginning(order.folder.name, at, job.process.pid))
        return job

    monkeypatch.setattr(jobs, "_begin", watched)
    return found


def one_after_the_other(
    asked: Sequence[schema.Config], tmp_path: Path, foreseen: Sequence[schema.Config]
) -> tuple[list[Result], list[float]]:
    """What each job gives, and when it had ended; foreseen: what is thought to come."""
    folders = [tmp_path / f"job{number}" for number in range(len(asked))]
    following = dict(zip(folders, zip(foreseen[1:], folders[1:], strict=True), strict=False))
    results, ended = [], []
    with jobs.in_turn(following.get, tmp_path / "turn"):
        for config, folder in zip(asked, folders, strict=True):
            folder.mkdir(exist_ok=True)
            results.append(jobs.run(config, folder))
            ended.append(time.time())
    return results, ended


def numbers(result: Result) -> dict[str, float]:
    return {name: value for name, value in result.metrics.items() if name != Metric.calibration_seconds}


def test_the_next_job_is_begun_before_its_turn_and_gives_what_it_gives_by_itself(
    composed: Composed, checkpoint: Path, tmp_path: Path, begun: list[Beginning]
) -> None:
    asked = [composed(*SMALL, f"model.checkpoint={checkpoint}", f"calib.seed={seed}") for seed in range(3)]
    results, ended = one_after_the_other(asked, tmp_path, foreseen=asked)
    assert [one.name for one in begun] == ["job0", "job1", "job2"]
    assert begun[1].at < ended[0]
    assert begun[2].at < ended[1]
    assert not (tmp_path / "turn").exists()
    (tmp_path / "alone").mkdir()
    alone = [jobs.run(config, tmp_path / "alone") for config in asked]
    assert list(map(numbers, results)) == list(map(numbers, alone))
    assert len({result.tags["calib_digest"] for result in results}) == 3


def test_another_job_than_was_foreseen_is_run_as_asked_and_none_is_begun_ahead_after_it(
    composed: Composed, checkpoint: Path, tmp_path: Path, begun: list[Beginning]
) -> None:
    asked = [composed(*SMALL, f"model.checkpoint={checkpoint}", f"calib.seed={seed}") for seed in range(3)]
    other = composed(*SMALL, f"model.checkpoint={checkpoint}", "calib.seed=7")
    results, ended = one_after_the_other(asked, tmp_path, foreseen=[asked[0], other, asked[2]])
    assert [one.name for one in begun] == ["job0", "job1", "job1", "job2"]
    assert begun[3].at > ended[1]
    (tmp_path / "alone").mkdir()
    assert numbers(results[1]) == numbers(jobs.run(asked[1], tmp_path / "alone"))


def test_a_job_whose_turn_never_comes_is_ended(
    composed: Composed, checkpoint: Path, tmp_path: Path, begun: list[Beginning]
) -> None:
    config = composed(*SMALL, f"model.checkpoint={checkpoint}")
    first = tmp_path / "first"
    first.mkdir()
    with jobs.in_turn({first: (config, tmp_path / "second")}.get, tmp_path / "turn"):
        jobs.run(config, first)
    assert [one.name for one in begun] == ["first", "second"]
    assert not psutil.pid_exists(begun[1].pid or 0)
    assert not (tmp_path / "second" / jobs.CRASH).exists()


def timing_of(folder: Path) -> tuple[float, float]:
    """When a job began to time, and when it had done so."""
    rows = json.loads((folder / "latency.json").read_text())["rows"]
    return min(row["started"] for row in rows), max(row["ended"] for row in rows)


def test_the_next_job_is_prepared_when_one_times_and_waits_until_it_has(
    composed: Composed, checkpoint: Path, tmp_path: Path, begun: list[Beginning]
) -> None:
    settings = (*TIMED, f"model.checkpoint={checkpoint}", "latency.reuse=false")
    asked = [composed(*settings, f"calib.seed={seed}") for seed in range(3)]
    one_after_the_other(asked, tmp_path, foreseen=asked)
    folders = [tmp_path / one.name for one in begun]
    assert [folder.name for folder in folders] == ["job0", "job1", "job2"]
    for timing, following in itertools.pairwise(folders):
        started, ended = timing_of(timing)
        saved = [path.stat().st_mtime for path in (following / "model").glob("int8_*.pt")]
        assert saved
        assert max(saved) < started
        assert (following / "predictions.npz").stat().st_mtime > ended


TROUBLE = """
import os, time


def make(split, seconds):
    time.sleep(seconds)
    os._exit(3)
"""


@pytest.fixture
def trouble(composed: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], schema.Config]:
    """trouble(seconds) -> the configuration of a job whose process ends after so long, in its first step."""
    (tmp_path / "trouble.py").write_text(TROUBLE)
    monkeypatch.syspath_prepend(tmp_path)
    custom = ("dataset=custom", "dataset._target_=trouble.make")
    return lambda seconds: composed(*custom, f"+dataset.seconds={seconds}")


def test_a_job_that_ends_while_it_is_prepared_is_no_hindrance_to_the_one_that_times(
    composed: Composed,
    checkpoint: Path,
    tmp_path: Path,
    begun: list[Beginning],
    trouble: Callable[[float], schema.Config],
) -> None:
    asked = [composed(*TIMED, f"model.checkpoint={checkpoint}"), trouble(0)]
    with pytest.raises(RunError, match="ended with exit status 3"):
        one_after_the_other(asked, tmp_path, foreseen=asked)
    assert [one.name for one in begun] == ["job0", "job1"]
    assert begun[1].at < timing_of(tmp_path / "job0")[0]


@pytest.mark.slow
def test_waiting_for_the_next_job_does_not_count_for_the_timeout(
    composed: Composed, checkpoint: Path, tmp_path: Path, trouble: Callable[[float], schema.Config]
) -> None:
    asked = [composed(*TIMED, f"model.checkpoint={checkpoint}", "job.timeout=30"), trouble(40)]
    began = time.time()
    with pytest.raises(RunError, match="ended with exit status 3"):
        one_after_the_other(asked, tmp_path, foreseen=asked)
    assert timing_of(tmp_path / "job0")[0] > began + 40


@pytest.mark.parametrize(("ahead", "lines"), [("true", 2), ("false", 0)])
def test_a_sweep_begins_its_jobs_ahead_unless_told_otherwise(
    qexp: Callable[..., subprocess.CompletedProcess[str]], checkpoint: Path, tmp_path: Path, ahead: str, lines: int
) -> None:
    result = qexp(
        *SMALL, f"model.checkpoint={checkpoint}", "calib.seed=1,2,3", f"job.ahead={ahead}",
        "hydra.verbose=[qexp.launch.jobs]", "-m",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (result.stdout + result.stderr).count("is begun while") == lines
    assert "foreseen" not in result.stdout + result.stderr
    # Each has what it was composed of, whether or not Hydra had written it when the job was begun.
    assert len(list(tmp_path.glob("outputs/artifacts/*/artifacts/hydra/overrides.yaml"))) == 3
