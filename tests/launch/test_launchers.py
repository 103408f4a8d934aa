"""Hydra's launchers for joblib and submitit: the same results as one job after the other, checked where they run."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_launcher import BasicLauncher

from qexp import tracking
from qexp.config.composition import CONF
from qexp.config.error_messages import message_for
from qexp.config.schema import Config
from qexp.launch import job_process, sweep, tracked_run
from qexp.launch.job import Job
from qexp.system import machine
from tests.helpers import ROOT
from tests.helpers.jobs import without_times
from tests.helpers.stores import jobs_of, settings, sweeps_of

Command = Callable[..., subprocess.CompletedProcess[str]]

LAUNCHERS = ("joblib", "submitit_local")


def metrics(folder: Path) -> dict[str, dict[str, float]]:
    """The metrics of each job without times, by its name."""
    with closing(sqlite3.connect(folder / "outputs" / "mlflow.db")) as connection:
        rows = connection.execute("select run_uuid, key, value from latest_metrics")
        by_run: dict[str, dict[str, float]] = {}
        for run_id, key, value in rows:
            by_run.setdefault(run_id, {})[key] = value
    return {run["name"]: without_times(by_run[run["id"]]) for run in jobs_of(folder)}


@pytest.mark.slow
def test_two_at_a_time_give_what_one_after_the_other_gives_bit_for_bit(
    qexp: Command, checkpoint: Path, tmp_path: Path
) -> None:
    given = [
        f"model.checkpoint={checkpoint}", "latency=off", "per_layer.images=0", "saturation.exact_images=0",
        "calib=small", "compute.threads=1", "calib.seed=0,1", "-m",
    ]  # fmt: skip
    found = {}
    for launcher, at_a_time in {"basic": 1, "two at a time": 2, **dict.fromkeys(LAUNCHERS, 1)}.items():
        launched_by = f"hydra/launcher={launcher if launcher in LAUNCHERS else 'basic'}"
        done = qexp(*given, launched_by, f"job.at_a_time={at_a_time}", "cache.enabled=false")
        assert done.returncode == 0, done.stderr + done.stdout
        assert "UserWarning" not in done.stderr + done.stdout
        assert [run["status"] for run in jobs_of(tmp_path)] == ["FINISHED"] * 2
        (parent,) = sweeps_of(tmp_path)
        assert {run["tags"]["mlflow.parentRunId"] for run in jobs_of(tmp_path)} == {parent["id"]}
        pids = {run["tags"]["pid"] for run in jobs_of(tmp_path)}
        assert (pids == {parent["tags"]["pid"]}) == (launcher not in LAUNCHERS)
        assert "seed=0" in done.stdout.partition("setting")[2]  # in the report
        found[launcher] = metrics(tmp_path)
        shutil.move(tmp_path / "outputs", tmp_path / launcher)
    assert found["joblib"] == found["submitit_local"] == found["two at a time"] == found["basic"]
    assert found["basic"]["seed=0"] != found["basic"]["seed=1"]
    assert [name for name in found["basic"]["seed=0"] if name.startswith("runtime_accuracy/")]
    logs = list((tmp_path / "submitit_local" / "sweeps").glob("*/.submitit/*/*_log.out"))
    assert sum("FINISHED" in log.read_text() or "seed=" in log.read_text() for log in logs) == 2


@pytest.mark.filterwarnings("ignore:.*is validated against ConfigStore schema")
@pytest.mark.parametrize("launcher", [*LAUNCHERS, "submitit_slurm"])
def test_each_launcher_has_a_ready_configuration_that_its_own_schema_accepts(launcher: str) -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        composed = compose(
            "config", [f"hydra/launcher={launcher}", "compute.threads=3"], return_hydra_config=True
        ).hydra.launcher
    if launcher != "joblib":
        assert (composed.cpus_per_task, composed.mem_gb, composed.name) == (3, 4, "qexp")
        assert composed.nodes == 1  # of the launcher's own configuration


def test_a_launcher_that_is_not_installed_is_said_with_what_to_install() -> None:
    unknown = "Unknown plugin class : 'hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher'"
    assert message_for(RuntimeError(unknown)) == (
        "hydra/launcher: hydra_plugins.hydra_joblib_launcher is not installed; install it by pip install "
        "'qexp[joblib]', or leave out hydra/launcher: job.at_a_time jobs then run at a time on this machine."
    )
    assert message_for(RuntimeError("something else")) is None


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_job_on_another_machine_is_checked_there(
    composed: Callable[..., Config],
    empty: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    elsewhere: bool,
) -> None:
    (tmp_path / "outputs").mkdir()
    shutil.copy(empty, tmp_path / "outputs")
    store = tracking.connect(settings(), tmp_path / "outputs")
    parent = tracking.open_parent(store, experiment="qexp/digits", name="sweep", tags={"cpu": "a CPU"})
    if elsewhere:
        store.client.set_tag(parent.id, "host", "node1")
    checked: list[Any] = []
    monkeypatch.setattr(job_process, "check_inputs_in_child", checked.extend)
    monkeypatch.setattr(machine, "allowed_cores", lambda *_: 2)
    config = composed(f"tracking.parent={parent.id}", "compute.threads=4")
    tracked_run.check_here(Job(config, {}, {}, tmp_path, tmp_path))
    said = [record.getMessage() for record in caplog.records if record.name == tracked_run.__name__]
    assert said[0] == f"compute.threads=4: {machine.host()} has 2 cores for this job, which they share."
    assert checked == ([config] if elsewhere else [])
    other_seed = replace(config, calib=replace(config.calib, seed=1))
    tracked_run.check_here(Job(other_seed, {}, {}, tmp_path, tmp_path))
    assert checked == ([config] if elsewhere else [])  # once on a host
    monkeypatch.setattr(machine, "boot", lambda: "another")
    tracked_run.check_here(Job(config, {}, {}, tmp_path, tmp_path))
    assert checked == ([config] * 2 if elsewhere else [])
    here = machine.describe().cpu
    assert said[1:] == (
        [f"this job is on {machine.host()}, whose processor is {here}, and the sweep was started on node1 with a CPU: "
         "a report compares no figures of the two."] if elsewhere else []
    )  # fmt: skip
    parent.finish()
    assert json.dumps(sweeps_of(tmp_path)[0]["tags"]["cpu"]) == '"a CPU"'


@pytest.mark.parametrize(
    ("own", "jobs", "threads", "said"),
    [
        (False, 4, 1, []),
        (False, 3, 2, ["hydra.launcher.n_jobs=3 with compute.threads=2: 6 threads compute at a time on 4 cores"]),
        (False, -1, 2, ["hydra.launcher.n_jobs=4 with compute.threads=2: 8 threads compute at a time on 4 cores"]),
        (True, 2, 4, []),  # as by default, one of which reads and writes while the other computes
        (True, 3, 2, ["job.at_a_time=3 with compute.threads=2: 6 threads compute at a time on 4 cores"]),
    ],
)
def test_more_threads_than_cores_are_said_before_the_sweep(
    composed: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    own: bool,
    jobs: int,
    threads: int,
    said: list[str],
) -> None:
    monkeypatch.setattr(machine, "allowed_cores", lambda *_: 4)
    config = composed(f"compute.threads={threads}", *([f"job.at_a_time={jobs}"] if own else []))
    sweep.warn_of_cores(BasicLauncher() if own else SimpleNamespace(joblib={"n_jobs": jobs}), config)
    found = [record.getMessage() for record in caplog.records if record.name == sweep.__name__]
    assert [text.partition(", which")[0] for text in found] == said


THREADS = """
from types import SimpleNamespace
import psutil, torch
from qexp.pipeline import stages

def used():
    process, x = psutil.Process(), torch.rand(600, 600)
    before = {thread.id: thread.user_time for thread in process.threads()}
    until = process.cpu_times().user + 0.6
    while process.cpu_times().user < until:
        x @ x
    return sum(thread.user_time - before.get(thread.id, 0) > 0.1 for thread in process.threads())

for threads in (2, 1):
    asked = dict(compute=SimpleNamespace(threads=threads), cache=SimpleNamespace(max_gb=1.0), seed=0)
    with stages.job_settings(SimpleNamespace(**asked)):
        print(torch.get_num_threads(), used())
"""


def test_compute_threads_is_what_computes_whatever_a_launcher_has_set() -> None:
    """joblib's pool sets these variables in its workers, others set them for their jobs; threads are counted by the
    processor time that each has taken."""
    variables = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run([sys.executable, "-c", THREADS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["2 2", "1 1"]
