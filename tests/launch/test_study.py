"""A study: finished jobs are not run again, and runs that were left open are closed.

Real stores and real processes, killed where it matters. Starting processes is what costs time here, so one test runs
several sweeps after each other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from qexp import tracking
from qexp.config import identity
from qexp.config.schema import Config
from qexp.launch import study
from qexp.system import cache, machine
from tests.helpers import ROOT
from tests.helpers.cli import TORCHS
from tests.helpers.stores import jobs_of, settings, sweeps_of, table

Composed = Callable[..., Config]
Command = Callable[..., subprocess.CompletedProcess[str]]

# How many times a sweep is killed; QEXP_KILLS=20 takes several minutes.
KILLS = int(os.environ.get("QEXP_KILLS", "3"))


@pytest.fixture
def store(empty: Path, tmp_path: Path) -> tracking.Store:
    (tmp_path / "outputs").mkdir()
    shutil.copy(empty, tmp_path / "outputs")
    return tracking.connect(settings(), tmp_path / "outputs")


def begin(store: tracking.Store, name: str, parent: str | None = None, **tags: str) -> tracking.Run:
    return tracking.start_run(store, experiment="qexp/digits", name=name, params={}, tags=tags, parent=parent)


def open_sweep(store: tracking.Store, name: str, again: str | None = None, **tags: str) -> tracking.Run:
    return tracking.open_parent(store, experiment="qexp/digits", name=name, tags=tags, again=again)


def status(store: tracking.Store, run_id: str) -> str:
    return str(store.client.get_run(run_id).info.status)


def test_what_a_result_would_depend_on_is_what_it_says_afterwards(
    composed: Composed, checkpoint: Path, tmp_path: Path
) -> None:
    from qexp.pipeline import input_checks
    from qexp.pipeline.run import run_experiment

    (tmp_path / "run").mkdir()
    given = ["model=tiny", "train=fast", "latency=off", f"model.checkpoint={checkpoint}"]
    configs = [composed(*given, *more) for more in ([], ["calib.seed=1"], ["flow=dynamic"], ["qconfig=per_tensor"])]
    before = input_checks.provenance_tags(configs)
    assert set(study.DEPENDS_ON) <= set(before[0])
    for config, tags in zip(configs, before, strict=True):
        result = run_experiment(config, tmp_path / "run")
        assert {name: result.tags[name] for name in tags} == tags
    drawn = [tags["calib_digest"] for tags in before]
    assert drawn[0] == drawn[3] != drawn[1]
    assert drawn[2] == identity.NOT_APPLICABLE
    trained = input_checks.provenance_tags([composed("model=tiny", "train=fast")])[0]
    assert trained["data_digest"] != before[0]["data_digest"]  # the training images count where a model is trained


ABANDON = """
import sys, time
from pathlib import Path
from qexp import tracking
from qexp.config import schema
settings = schema.Tracking(
    uri=None, experiment=None, log_model=schema.LogModel.none, timeout=5.0, parent=None, name=None
)
store = tracking.connect(settings, Path(sys.argv[1]))
parent = tracking.open_parent(store, experiment="qexp/digits", name="sweep", tags={})
ended = tracking.start_run(store, experiment="qexp/digits", name="ended", params={}, tags={}, parent=parent.id)
ended.finish()
child = tracking.start_run(store, experiment="another", name="child", params={}, tags={}, parent=parent.id)
print(parent.id, ended.id, child.id, flush=True)
time.sleep(600)
"""


def test_runs_whose_process_was_killed_are_closed_and_no_others(store: tracking.Store, tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ABANDON, str(tmp_path / "outputs")],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        killed, alive = (process.stdout.readline().split() for process in processes if process.stdout)
        processes[0].kill()
        processes[0].wait()
        mine = begin(store, "mine")
        elsewhere = begin(store, "elsewhere", host="another machine", pid=str(processes[0].pid))
        reused = begin(store, "its process id is another's now", pid=str(os.getpid()), pid_started="1.00")
        odd = begin(store, "odd", pid="?")
        rebooted = begin(store, "its host was started again", boot="another")
        before = tracking.find(store, killed[1])[0]
        closed = tracking.close_orphans(store)
        assert {row.run_id for row in closed} == {killed[0], killed[2], reused.id, rebooted.id}
        assert [status(store, run_id) for run_id in killed] == ["KILLED", "FINISHED", "KILLED"]
        assert [status(store, run_id) for run_id in alive] == ["RUNNING", "FINISHED", "RUNNING"]
        assert [status(store, run.id) for run in (mine, elsewhere, odd)] == ["RUNNING"] * 3
        assert tracking.find(store, killed[1])[0] == before
        assert tracking.find(store, killed[2])[0].tags["error"] == (
            f"process {processes[0].pid} on {machine.host()} ended without closing the run."
        )
        assert tracking.close_orphans(store) == []
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def planned(*names: str, config: Config) -> list[Any]:
    """Jobs of a study, which differ in the seed of their calibration."""
    return [
        SimpleNamespace(
            name=name,
            job=SimpleNamespace(
                config=dataclasses.replace(config, calib=dataclasses.replace(config.calib, seed=seed)),
                params={"calib.seed": str(seed)},
            ),
        )
        for seed, name in enumerate(names)
    ]


@pytest.fixture
def config(composed: Composed, checkpoint: Path) -> Config:
    return dataclasses.replace(
        composed("model=tiny", f"model.checkpoint={checkpoint}", "latency=off"), study="it's one"
    )


def known(items: list[Any]) -> list[dict[str, str]]:
    from qexp.pipeline import input_checks

    return input_checks.provenance_tags([item.job.config for item in items])


def test_only_what_would_give_the_same_is_reused_and_latest_first(
    store: tracking.Store, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    items = planned("same", "failed", "other code", "new", config=config)
    tags = [{**one, "study": "it's one"} for one in known(items)]
    parent = open_sweep(store, "sweep", study="it's one")
    ids = {}
    for name, of in {"older": tags[0], "same": tags[0], "other code": {**tags[2], "code_hash": "x"}}.items():
        with begin(store, name, parent.id, **of) as run:
            run.log_params({"calib.seed": "typed then", "resolved.overflow": "none"})
        ids[name] = run.id
    begin(store, "failed", parent.id, **tags[1]).fail("too bad.", "")
    begin(store, "another study's", **{**tags[3], "study": "another"}).finish()
    parent.kill()
    found = study.find_study(store, items, ["qexp/digits", "qexp/none yet"])
    assert found.parent == parent.id
    assert [item.name for item in found.to_run(items)] == ["failed", "other code", "new"]
    said = [entry.getMessage() for entry in caplog.records if entry.name == "qexp.launch.study"]
    assert said == [
        "1 of 4 jobs are finished already under study=it's one and are not run again; resume=false runs all.",
        "1 were finished under it with another code, and are run again.",
    ]
    again = found.open(store, experiment="qexp/digits", name="sweep", tags={})
    assert again.id == parent.id
    new = begin(store, "new", again.id)
    new.finish()
    rows = found.with_reused(items, found.new(tracking.children(store, again.id)))
    assert [(row.name, row.run_id) for row in rows] == [("same", ids["same"]), ("new", new.id)]
    assert rows[0].params == {"calib.seed": "0", "resolved.overflow": "none"}
    everything = dataclasses.replace(config, resume=False)
    assert study.find_study(store, planned("same", config=everything), ["qexp/digits"]) == study.Study()
    alone = dataclasses.replace(config, study=None)
    assert study.find_study(store, planned("same", config=alone), ["qexp/digits"]) == study.Study()


@pytest.mark.parametrize("tag", list(study.DEPENDS_ON))
def test_whatever_a_result_depends_on_counts_and_the_cpu_where_it_was_timed(tag: str) -> None:
    then = dict.fromkeys(study.DEPENDS_ON, "same")
    now = {**then, tag: "other"}
    assert study.differing(then, now, timed=True) == [study.DEPENDS_ON[tag]]
    assert study.differing(then, now, timed=False) == ([] if tag == "cpu" else [study.DEPENDS_ON[tag]])
    assert study.differing({}, now, timed=True) == list(study.DEPENDS_ON.values())
    assert study.differing(then, dict(then), timed=True) == []


def test_a_study_s_parent_is_opened_again_without_what_was_said_of_its_end(store: tracking.Store) -> None:
    parent = open_sweep(store, "sweep", study="s", command="once")
    parent.fail("closed in between.", "")
    store.client.set_tag(parent.id, "pid", "1")
    again = open_sweep(store, "another name", again=parent.id, study="s", command="again")
    got = store.client.get_run(parent.id)
    assert (again.id, again.name, again.is_sweep) == (parent.id, "sweep", True)
    assert got.info.status == "RUNNING"
    assert got.data.tags["command"] == "again"
    assert got.data.tags["pid"] == str(os.getpid())
    assert "error" not in got.data.tags
    tracking.close_parent(again, "FINISHED", {"finished": 1})
    assert status(store, parent.id) == "FINISHED"


def test_a_parent_that_another_process_has_open_is_not_taken_from_it(store: tracking.Store, config: Config) -> None:
    items = planned("one", config=config)
    first = open_sweep(store, "sweep", study="it's one")
    with begin(store, "one", first.id, study="it's one", **known(items)[0]) as run:
        pass
    found = study.find_study(store, items, ["qexp/digits"])
    second = found.open(store, experiment="qexp/digits", name="sweep", tags={"study": "it's one"})
    assert second.id != first.id
    assert [row.run_id for row in found.with_reused(items, [])] == [run.id]
    assert [row.run_id for row in tracking.children(store, first.id)] == [run.id]  # it stays where it is


@pytest.mark.parametrize("how", ["deleted", "gone", "none"])
def test_runs_without_a_parent_come_under_the_one_that_carries_them_over(
    store: tracking.Store, config: Config, tmp_path: Path, how: str
) -> None:
    items = planned("one", config=config)
    first = open_sweep(store, "sweep", study="it's one")
    under = None if how == "none" else first.id
    with begin(store, "one", under, study="it's one", **known(items)[0]) as run:
        pass
    first.finish()
    store.client.delete_run(first.id)
    if how == "gone":
        with sqlite3.connect(tmp_path / "outputs" / "mlflow.db") as connection:
            for table in ("tags", "runs"):
                connection.execute(f"DELETE FROM {table} WHERE run_uuid = ?", (first.id,))
    found = study.find_study(store, items, ["qexp/digits"])
    second = found.open(store, experiment="qexp/digits", name="sweep", tags={"study": "it's one"})
    assert second.id != first.id
    assert [row.run_id for row in tracking.children(store, second.id)] == [run.id]


NET = """
import torch
from pathlib import Path
from userparts import WIDTH


class Net(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, WIDTH, 3, stride=4)
        self.fc = torch.nn.Linear(WIDTH, num_classes)

    def forward(self, x):
        if len(x) == 7 and Path("fail").exists():
            raise RuntimeError("seven images are too many")
        return self.fc(self.conv(x).mean((2, 3)))

    def fuse_model(self, is_qat=False):
        pass  # nothing to fuse, and nothing to trace for
"""


@pytest.mark.slow
def test_a_study_goes_on_where_it_stopped_and_runs_again_what_has_changed(qexp: Command, tmp_path: Path) -> None:
    (tmp_path / "usernet.py").write_text(NET)
    (tmp_path / "userparts.py").write_text("WIDTH = 8\n")
    (tmp_path / "fail").touch()
    model = "flow=eager", "model=custom", "model._target_=usernet.Net", "+model.num_classes=10"
    given = [*model, "latency=off", "study=s", "-m"]

    def sweep(*more: str) -> subprocess.CompletedProcess[str]:
        return qexp("calib.batch_size=16,7,8", "calib.batches=2", *given, *more)

    first = sweep()
    assert first.returncode == 1, first.stderr
    assert [run["status"] for run in jobs_of(tmp_path)] == ["FINISHED", "FAILED", "FINISHED"]

    (tmp_path / "fail").unlink()
    (tmp_path / "README.md").write_text("something else")
    second = sweep()
    assert second.returncode == 0, second.stderr + second.stdout
    assert (
        "2 of 3 jobs are finished already under study=s and are not run again; resume=false runs all." in second.stdout
    )
    assert [(run["name"], run["status"]) for run in jobs_of(tmp_path)][3:] == [("batch_size=7", "FINISHED")]
    lines = {line.split()[0] for line in second.stdout.splitlines() if line.startswith("batch_size=")}
    assert lines == {"batch_size=16", "batch_size=7", "batch_size=8"}  # the report has all of them

    third = sweep()
    assert third.returncode == 0
    assert "3 of 3 jobs are finished already" in third.stdout
    assert len(jobs_of(tmp_path)) == 4
    (parent,) = sweeps_of(tmp_path)
    assert parent["status"] == "FINISHED"
    assert {run["tags"]["mlflow.parentRunId"] for run in jobs_of(tmp_path)} == {parent["id"]}

    (tmp_path / "userparts.py").write_text("WIDTH = 16\n")
    changed = sweep()
    assert changed.returncode == 0, changed.stderr
    assert "3 were finished under it with another code, and are run again." in changed.stdout
    assert len(jobs_of(tmp_path)) == 7

    everything = sweep("resume=false")
    assert everything.returncode == 0
    assert "finished already" not in everything.stdout
    assert len(jobs_of(tmp_path)) == 10
    assert len(sweeps_of(tmp_path)) == 2


FAST = (
    "model=tiny", "latency=off", "qconfig.overflow=activations", "saturation.exact_images=0", "per_layer.images=0",
    TORCHS,
)  # fmt: skip


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "qexp", *FAST, *arguments, "-m"],
            cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=output, stderr=output,
        )  # fmt: skip


@pytest.mark.slow
def test_two_sweeps_may_start_at_once_in_an_empty_folder(tmp_path: Path, checkpoint: Path) -> None:
    sweeps = [start(tmp_path, f"model.checkpoint={checkpoint}", "calib.seed=0,1") for _ in range(2)]
    assert [sweep.wait(timeout=300) for sweep in sweeps] == [0, 0], (tmp_path / "output.txt").read_text()
    assert Counter(run["status"] for run in table(tmp_path)) == {"FINISHED": 6}
    parents = {run["id"] for run in sweeps_of(tmp_path)}
    assert len(parents) == 2
    assert Counter(run["tags"]["mlflow.parentRunId"] for run in jobs_of(tmp_path)) == dict.fromkeys(parents, 2)
    folders = [file.parent for file in (tmp_path / "outputs" / "sweeps").rglob("predictions.npz")]
    assert len(folders) == 4
    assert len({folder.parent for folder in folders}) == 2
    assert not list((tmp_path / "outputs").glob(".mlflow-*"))  # the database was made once, and nothing is left of it


def kill_one(main: subprocess.Popen[bytes], chance: random.Random) -> None:
    """Send SIGKILL to the sweep's first process, or to one of those that it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(main.pid)
        others = first.children(recursive=True)
        (chance.choice(others) if others and chance.random() < 0.5 else first).send_signal(signal.SIGKILL)


def duplicates(runs: list[dict[str, Any]]) -> dict[str, int]:
    """The number of finished runs of each configuration that doesn't have one."""
    finished = Counter(run["tags"]["config_hash"] for run in runs if run["status"] == "FINISHED")
    return {name: count for name, count in finished.items() if count != 1}


@pytest.mark.slow
def test_whatever_is_killed_and_whenever_the_same_command_ends_the_study(tmp_path: Path, checkpoint: Path) -> None:
    """Kill at random moments of a whole sweep and, in every other turn, of its jobs alone: the start takes longest.

    The first turn starts in an empty folder, so that it may hit the creation of the store.
    """
    given = (f"model.checkpoint={checkpoint}", "calib.seed=range(4)")
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    began = time.monotonic()
    assert start(tmp_path / "whole", *given, "study=whole").wait(timeout=300) == 0
    whole, folder, chance = time.monotonic() - began, tmp_path / "killed", random.Random(10)
    for turn in range(KILLS):
        study = f"s{turn}"
        sweep = start(folder, *given, f"study={study}")
        if turn % 2:
            while not jobs_of(folder, study) and sweep.poll() is None:
                time.sleep(0.02)
        with contextlib.suppress(subprocess.TimeoutExpired):
            sweep.wait(timeout=chance.uniform(0, whole / 4 if turn % 2 else whole))
        kill_one(sweep, chance)
        sweep.wait(timeout=300)
        before = jobs_of(folder, study)
        finished = {run["id"] for run in before if run["status"] == "FINISHED"}

        code = start(folder, *given, f"study={study}").wait(timeout=300)
        said = (folder / "output.txt").read_text()
        assert code == 0, said
        after = jobs_of(folder, study)
        assert "RUNNING" not in {run["status"] for run in table(folder)}, said
        assert len([run for run in after if run["status"] == "FINISHED"]) == 4
        assert duplicates(after) == {}
        assert finished <= {run["id"] for run in after}
        assert len(after) - len(before) == 4 - len(finished)  # as many were started as were not finished
        assert len(sweeps_of(folder, study)) == 1
        assert all(cache._open(file) is not None for file in (folder / "outputs" / "cache").glob("*.npy"))
    assert [run["status"] for run in sweeps_of(folder)] == ["FINISHED"] * KILLS
