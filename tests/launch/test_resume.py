"""resume.py: what is finished is not run again, what was left open is closed, and a run is repeated as it was.

Real stores and real processes, killed where it matters. What costs time here is the start of processes,
so one story is told by several sweeps after each other.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from qexp import tracking
from qexp.config import code_digest, identity, schema
from qexp.config.schema import Config
from qexp.errors import ConfigError, InputError
from qexp.launch import resume
from qexp.metrics import Metric
from qexp.records import RunRecord
from qexp.system import cache, machine
from tests.helpers import ROOT

Composed = Callable[..., Config]
Command = Callable[..., subprocess.CompletedProcess[str]]

# How many times a sweep is killed; QEXP_KILLS=20 takes several minutes.
KILLS = int(os.environ.get("QEXP_KILLS", "3"))


# --------------------------------------------------------------------------------------------- what code is it


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a user's code: a module, one beside it, a package imported within a function, and others."""
    monkeypatch.syspath_prepend(str(tmp_path))
    files = {
        "usernet.py": "import torch\nfrom userwidth import WIDTH\n\ndef make():\n    import userpackage.deep\n",
        "userwidth.py": "WIDTH = 8\n",
        "userpackage/__init__.py": "",
        "userpackage/deep/__init__.py": "from . import sibling\n",
        "userpackage/deep/sibling.py": "",
        "userpackage/.venv/ignored.py": "",
        "unrelated.py": "",
        "README.md": "a commit to this changes nothing",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    yield tmp_path
    code_digest.code_hash.cache_clear()


def test_the_files_of_a_target_are_its_own_and_what_they_import_but_nothing_installed(user: Path) -> None:
    found = [str(file.relative_to(user)) for file in code_digest.files_of("usernet.make")]
    assert found == [
        "usernet.py", "userpackage/__init__.py", "userpackage/deep/__init__.py", "userpackage/deep/sibling.py",
        "userwidth.py",
    ]  # fmt: skip
    assert "usernet" not in sys.modules  # nothing was run
    assert code_digest.files_of("qexp.models.architectures.tiny") == []
    assert code_digest.files_of("nosuchmodule.make") == []
    installed = code_digest.files_of("filelock.FileLock")
    assert installed
    assert all("filelock" in file.parts for file in installed)


@pytest.mark.parametrize(
    ("file", "text", "counts"),
    [
        ("usernet.py", "def make(): pass\n", True),
        ("userwidth.py", "WIDTH = 16\n", True),
        ("userpackage/deep/sibling.py", "x = 1\n", True),
        ("userpackage/deep/sibling.py", "def broken(\n", True),
        ("unrelated.py", "x = 1\n", False),
        ("README.md", "other words", False),
    ],
)
def test_the_code_s_hash_changes_with_the_user_s_code_and_with_nothing_else(
    user: Path, file: str, text: str, counts: bool
) -> None:
    before, without = code_digest.code_hash("usernet.make", "qexp.data.builtin.digits"), code_digest.code_hash()
    (user / file).write_text(text)
    code_digest.code_hash.cache_clear()
    assert (code_digest.code_hash("usernet.make", "qexp.data.builtin.digits") != before) is counts
    assert code_digest.code_hash() == without != before
    assert code_digest.code_hash("qexp.models.architectures.tiny", "qexp.data.builtin.digits") == without


def test_the_checkpoint_counts_by_its_content(composed: Composed, tmp_path: Path) -> None:
    config = composed(f"model.checkpoint={tmp_path / 'net.pt'}")
    digests = [code_digest.checkpoint_digest(config)]
    for content in (b"a", b"b"):
        (tmp_path / "net.pt").write_bytes(content)
        os.utime(tmp_path / "net.pt", ns=(len(digests), len(digests)))
        digests.append(code_digest.checkpoint_digest(config))
    assert digests[0] == identity.NOT_APPLICABLE
    assert len(set(digests)) == 3


def test_what_a_result_would_depend_on_is_what_it_says_afterwards(
    composed: Composed, checkpoint: Path, tmp_path: Path
) -> None:
    from qexp.pipeline import input_checks
    from qexp.pipeline.run import run_experiment

    (tmp_path / "run").mkdir()
    given = ["model=tiny", "train=fast", "latency=off", f"model.checkpoint={checkpoint}"]
    configs = [composed(*given, *more) for more in ([], ["calib.seed=1"], ["flow=dynamic"], ["qconfig=per_tensor"])]
    before = input_checks.provenance_tags(configs)
    assert set(resume.DEPENDS_ON) <= set(before[0])
    for config, tags in zip(configs, before, strict=True):
        result = run_experiment(config, tmp_path / "run")
        assert {name: result.tags[name] for name in tags} == tags
    drawn = [tags["calib_digest"] for tags in before]
    assert drawn[0] == drawn[3] != drawn[1]
    assert drawn[2] == identity.NOT_APPLICABLE
    trained = input_checks.provenance_tags([composed("model=tiny", "train=fast")])[0]
    assert trained["data_digest"] != before[0]["data_digest"]  # the training images count where a model is trained


# ----------------------------------------------------------------------------------------------- whose run is it


def test_a_process_is_told_from_one_that_has_its_id_now() -> None:
    own = psutil.Process()
    started = machine.since_boot(own)
    assert machine.is_running(own.pid, started)
    assert not machine.is_running(own.pid, started - 60)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = machine.since_boot(psutil.Process(child.pid))
    assert machine.is_running(child.pid, started)
    child.kill()
    deadline = time.monotonic() + 20
    while machine.is_running(child.pid, started) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not machine.is_running(child.pid, started)  # a zombie, since nobody has waited for it
    assert psutil.pid_exists(child.pid)
    child.communicate()
    assert not machine.is_running(child.pid, started)


def settings() -> schema.Tracking:
    return schema.Tracking(
        uri=None, experiment=None, log_model=schema.LogModel.none, timeout=5.0, parent=None, name=None
    )


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of outputs with a database without runs; making one costs 3 s."""
    folder = tmp_path_factory.mktemp("empty")
    tracking.connect(settings(), folder)
    return folder


@pytest.fixture
def store(empty: Path, tmp_path: Path) -> tracking.Store:
    shutil.copytree(empty, tmp_path / "outputs")
    return tracking.connect(settings(), tmp_path / "outputs")


def begin(store: tracking.Store, name: str, parent: str | None = None, **tags: str) -> tracking.Run:
    return tracking.start_run(store, experiment="qexp/digits", name=name, params={}, tags=tags, parent=parent)


def open_sweep(store: tracking.Store, name: str, again: str | None = None, **tags: str) -> tracking.Run:
    return tracking.open_parent(store, experiment="qexp/digits", name=name, tags=tags, again=again)


def status(store: tracking.Store, run_id: str) -> str:
    return str(store.client.get_run(run_id).info.status)


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
        before = tracking.find(store, killed[1])[0]
        closed = tracking.close_orphans(store)
        assert {row.run_id for row in closed} == {killed[0], killed[2], reused.id}
        assert [status(store, run_id) for run_id in killed] == ["KILLED", "FINISHED", "KILLED"]
        assert [status(store, run_id) for run_id in alive] == ["RUNNING", "FINISHED", "RUNNING"]
        assert [status(store, run.id) for run in (mine, elsewhere, odd)] == ["RUNNING"] * 3
        assert tracking.find(store, killed[1])[0] == before
        assert tracking.find(store, killed[2])[0].tags["error"] == (
            f"process {processes[0].pid} ended without closing the run."
        )
        assert tracking.close_orphans(store) == []
    finally:
        for process in processes:
            process.kill()
            process.communicate()


# ------------------------------------------------------------------------------------------------ a study goes on


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


def test_only_what_would_give_the_same_is_carried_over_and_latest_first(
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
    found = resume.study(store, items, ["qexp/digits", "qexp/none yet"])
    assert found.parent == parent.id
    assert [item.name for item in found.left(items)] == ["failed", "other code", "new"]
    said = [entry.getMessage() for entry in caplog.records if entry.name == "qexp.launch.resume"]
    assert said == [
        "1 of 4 jobs are finished already under study=it's one and are not run again; resume=false runs all.",
        "1 were finished under it with another code, and are run again.",
    ]
    again = found.open(store, experiment="qexp/digits", name="sweep", tags={})
    assert again.id == parent.id
    new = begin(store, "new", again.id)
    new.finish()
    rows = found.with_done(items, found.new(tracking.children(store, again.id)))
    assert [(row.name, row.run_id) for row in rows] == [("same", ids["same"]), ("new", new.id)]
    assert rows[0].params == {"calib.seed": "0", "resolved.overflow": "none"}
    assert rows[0].tags["carried_over"] == "carried over: finished earlier under study=it's one."
    everything = dataclasses.replace(config, resume=False)
    assert resume.study(store, planned("same", config=everything), ["qexp/digits"]) == resume.Study()
    alone = dataclasses.replace(config, study=None)
    assert resume.study(store, planned("same", config=alone), ["qexp/digits"]) == resume.Study()


@pytest.mark.parametrize("tag", list(resume.DEPENDS_ON))
def test_whatever_a_result_depends_on_counts_and_the_cpu_where_it_was_timed(tag: str) -> None:
    then = dict.fromkeys(resume.DEPENDS_ON, "same")
    now = {**then, tag: "other"}
    assert resume.differing(then, now, timed=True) == [resume.DEPENDS_ON[tag]]
    assert resume.differing(then, now, timed=False) == ([] if tag == "cpu" else [resume.DEPENDS_ON[tag]])
    assert resume.differing({}, now, timed=True) == list(resume.DEPENDS_ON.values())
    assert resume.differing(then, dict(then), timed=True) == []


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
    tracking.close_parent(again, "FINISHED", "the table", {"finished": 1})
    assert status(store, parent.id) == "FINISHED"


def test_a_parent_that_another_process_has_open_is_not_taken_from_it(store: tracking.Store, config: Config) -> None:
    items = planned("one", config=config)
    first = open_sweep(store, "sweep", study="it's one")
    with begin(store, "one", first.id, study="it's one", **known(items)[0]) as run:
        pass
    found = resume.study(store, items, ["qexp/digits"])
    second = found.open(store, experiment="qexp/digits", name="sweep", tags={"study": "it's one"})
    assert second.id != first.id
    assert [row.run_id for row in found.with_done(items, [])] == [run.id]
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
    found = resume.study(store, items, ["qexp/digits"])
    second = found.open(store, experiment="qexp/digits", name="sweep", tags={"study": "it's one"})
    assert second.id != first.id
    assert [row.run_id for row in tracking.children(store, second.id)] == [run.id]


# ----------------------------------------------------------------------------------------------- a run once more


def job(config: Config, alone: bool = True, **overrides: str) -> Any:
    return SimpleNamespace(config=config, alone=alone, overrides=overrides)


def test_rerun_stands_alone(composed: Composed) -> None:
    config = composed("rerun=abc")
    resume.check(job(config, rerun="abc", outputs="x", study="s", **{"tracking.uri": "u"}))
    resume.check(job(composed(), alone=False, seed="1"))
    with pytest.raises(ConfigError, match="rerun=abc repeats one run by itself, not in a sweep; leave out -m"):
        resume.check(job(config, alone=False))
    with pytest.raises(ConfigError, match=r"rerun=abc repeats a run as it was, and latency=off would make it another"):
        resume.check(job(config, rerun="abc", latency="off"))


def test_the_params_of_a_repeated_run_are_those_that_it_had(composed: Composed) -> None:
    chosen = {group: f"{group}_choice" for group in identity.GROUPS}
    for overrides in (
        {"qconfig": "per_channel", "qconfig.weight.bits": "7", "evaluate.batch_size": "16"},
        {"flow": "dynamic", "calib.batches": "3"},
    ):
        config = composed(*(f"{key}={value}" for key, value in overrides.items()))
        params = identity.params(config, chosen, overrides)
        again = resume._as_asked({**params, "resolved.overflow": "none"})
        assert identity.params(config, *again) == params


def recorded(store: tracking.Store, config: Config, values: dict[str, Any] | None) -> str:
    """A run that holds these values as its configuration."""
    with begin(store, "first") as run:
        if values is not None:
            run.log_artifacts({"config.json": values})
    return run.id


def test_a_run_is_repeated_with_its_own_settings_and_recorded_where_it_is_said(
    store: tracking.Store, composed: Composed, tmp_path: Path
) -> None:
    then = composed("calib.batches=7", "study=old", "tracking.name=given", "outputs=elsewhere", "observer.bins=9")
    values = identity.plain(then)
    del values["per_layer"], values["calib"]["seed"]  # as of a version that had neither
    run_id = recorded(store, then, values)
    now = composed(f"rerun={run_id}", "study=new")
    found = resume.earlier(store, _Job(now, {"rerun": run_id, "study": "new"}, tmp_path))
    assert found is not None
    again = found.job.config
    assert identity.config_hash(again) == identity.config_hash(then)
    assert (again.rerun, again.study, again.outputs) == (run_id, "new", now.outputs)
    assert (again.tracking.experiment, again.tracking.name) == ("qexp/digits", "first")
    assert found.added == {"calib.seed": 0, "per_layer.images": now.per_layer.images}
    assert resume.earlier(store, _Job(composed(), {}, tmp_path)) is None


@dataclasses.dataclass(frozen=True)
class _Job:
    config: Config
    overrides: dict[str, str]
    folder: Path
    choices: dict[str, str] = dataclasses.field(default_factory=dict)
    alone: bool = True


def test_what_cannot_be_repeated_is_refused_in_a_sentence(
    store: tracking.Store, composed: Composed, tmp_path: Path
) -> None:
    plain = identity.plain(composed())
    sweep = open_sweep(store, "the sweep")
    cases = {
        "0" * 32: r"there is no run 0+ in MLflow at sqlite:.*",
        "no/id at all": "there is no run no/id at all in MLflow",
        sweep.id: r"is a whole sweep \('the sweep'\); give the id of one of the runs under it",
        recorded(store, composed(), None): "the run 'first' has no artifact config.json",
        recorded(store, composed(), {**plain, "gone": 1}): "can't take the configuration that the run has: .*gone",
        recorded(store, composed(), {**plain, "flow": "x"}): "can't take the configuration that the run has: .*x",
        recorded(store, composed(), {"calib": 3}): "can't take the configuration that the run has",
    }
    for run_id, message in cases.items():
        given = dataclasses.replace(composed(), rerun=run_id)
        with pytest.raises(InputError, match=message) as refused:
            resume.earlier(store, _Job(given, {"rerun": run_id}, tmp_path))
        assert "\n" not in str(refused.value)


LABELS = np.array([0, 1, 1, 0])


def images(int8: list[list[float]], ids: str = "abcd", fp32: list[list[float]] | None = None) -> dict[str, np.ndarray]:
    return {
        "labels": LABELS, "image_ids": np.array(list(ids)), "int8": np.array(int8), "fp32": np.array(fp32 or int8),
    }  # fmt: skip


ANSWERS = [[2.0, 1.0], [1.0, 2.0], [2.0, 1.0], [2.0, 1.0]]  # right, right, wrong, right


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (images(ANSWERS), "equal, the logits bit for bit"),
        (images([[3.0, 1.0], *ANSWERS[1:]]), "equal on every image, the logits not"),
        (images([*ANSWERS[:2], [1.0, 2.0], ANSWERS[3]]), "1 of 4 images answered otherwise, +1 right"),
        (images([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0], ANSWERS[3]]), "3 of 4 images answered otherwise, -1 right"),
        (images(ANSWERS, ids="abce"), "other images"),
        (images([[*row, 0.0] for row in ANSWERS]), "other images"),
    ],
)
def test_predictions_differ_by_so_many_images(now: dict[str, np.ndarray], said: str) -> None:
    assert resume.images_told(images(ANSWERS), now, "int8") == said


def test_a_run_of_old_whose_logits_were_no_numbers_is_not_compared_by_class() -> None:
    then = images([[np.nan, 1.0], *ANSWERS[1:]])
    assert resume.images_told(then, images(ANSWERS), "int8") == "1 of 4 images had NaN or infinity as logits then"


def test_two_runs_are_compared_by_what_they_depend_on_and_by_their_figures() -> None:
    def row(code: str, speedup: float, **tags: str) -> RunRecord:
        metrics = {
            Metric.accuracy_fp32: 0.75,
            Metric.accuracy_int8: 0.5,
            Metric.latency_fp32: 2.0,
            Metric.latency_int8: 2 / speedup,
        }
        metrics |= {Metric.speedup: speedup, Metric.speedup_low: 0.9 * speedup}
        metrics |= {Metric.speedup_high: 1.1 * speedup}
        return RunRecord("id", "name", "FINISHED", metrics=metrics, tags={"code_hash": code, "torch": "2.13", **tags})

    text = resume.comparison(row("aaa", 2.0), row("bbb", 2.2, cpu="EPYC"), images(ANSWERS), images(ANSWERS))
    cells = {line.split("  ")[0]: line for line in text.splitlines()}
    assert cells["code"].split() == ["code", "aaa", "bbb", "changed"]
    assert cells["torch"].split() == ["torch", "2.13", "2.13"]
    assert cells["CPU"].split() == ["CPU", "?", "EPYC", "unknown"]
    assert cells["accuracy INT8"].split()[2:4] == ["0.5000", "0.5000"]
    assert cells["accuracy INT8"].endswith("equal, the logits bit for bit")
    assert cells["latency INT8, ms"].split()[-3:] == ["1.000", "0.909", "-9.1%"]
    assert "2.00× [1.80, 2.20]" in cells["speedup [95%]"]
    assert cells["speedup [95%]"].endswith("the intervals overlap")
    apart = resume.comparison(row("aaa", 2.0), row("aaa", 4.0), None, None)
    assert "the intervals are apart" in apart
    nothing = resume.comparison(RunRecord("id", "n", "FAILED"), row("bbb", 2.0), None, images(ANSWERS))
    assert "speedup" not in nothing
    assert "0.5000" in nothing


# --------------------------------------------------------------------------------- as a user types it, and kills it


def table(folder: Path) -> list[dict[str, Any]]:
    """Every run under folder/outputs that wasn't deleted: its id, name, status and tags."""
    store = folder / "outputs" / "mlflow.db"
    if not store.exists():
        return []
    with contextlib.closing(sqlite3.connect(store, timeout=20)) as connection:
        tags: dict[str, dict[str, str]] = {}
        for run_id, key, value in connection.execute("select run_uuid, key, value from tags"):
            tags.setdefault(run_id, {})[key] = value
        rows = connection.execute(
            "select run_uuid, name, status from runs where lifecycle_stage = 'active' order by start_time"
        )
        return [
            {"id": run_id, "name": name, "status": status, "tags": tags.get(run_id, {})}
            for run_id, name, status in rows.fetchall()
        ]


def jobs_of(folder: Path, study: str | None = None) -> list[dict[str, Any]]:
    """The runs of jobs, without the sweeps' own."""
    runs = [run for run in table(folder) if tracking.SWEEP_TAG not in run["tags"]]
    return [run for run in runs if study is None or run["tags"].get("study") == study]


def sweeps_of(folder: Path, study: str | None = None) -> list[dict[str, Any]]:
    runs = [run for run in table(folder) if tracking.SWEEP_TAG in run["tags"]]
    return [run for run in runs if study is None or run["tags"].get("study") == study]


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
    given = ["model=custom", "model._target_=usernet.Net", "+model.num_classes=10", "latency=off", "study=s", "-m"]

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
    lines = [line.split()[0] for line in second.stdout.splitlines() if line.startswith("batch_size=")]
    assert lines[:3] == ["batch_size=16", "batch_size=7", "batch_size=8"]  # the table has all of them, in order
    assert "carried over: finished earlier under study=s." in second.stdout

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


@pytest.mark.slow
def test_a_run_is_repeated_and_compared_with_what_it_was(qexp: Command, tmp_path: Path, checkpoint: Path) -> None:
    first = qexp(f"model.checkpoint={checkpoint}", "qconfig=per_tensor,per_channel", "calib.batches=2", "-m")
    assert first.returncode == 0, first.stderr
    (parent,), jobs = sweeps_of(tmp_path), jobs_of(tmp_path)
    again = qexp(f"rerun={jobs[1]['id']}", small=False)
    assert again.returncode == 0, again.stderr
    assert again.stderr == ""
    repeated = jobs_of(tmp_path)[-1]
    assert (repeated["name"], repeated["status"]) == (jobs[1]["name"], "FINISHED")
    assert repeated["tags"]["rerun_of"] == jobs[1]["id"]
    assert "mlflow.parentRunId" not in repeated["tags"]
    assert repeated["tags"]["config_hash"] == jobs[1]["tags"]["config_hash"]
    assert again.stdout.count("equal, the logits bit for bit") == 2
    assert not [line for line in again.stdout.splitlines() if line.endswith(("changed", "unknown"))]
    assert "the intervals" in again.stdout

    before = len(table(tmp_path))
    for arguments, message in (
        ([f"rerun={'0' * 32}"], "there is no run 0000"),
        ([f"rerun={parent['id']}"], "is a whole sweep"),
        ([f"rerun={repeated['id']}", "seed=1"], "seed=1 would make it another"),
        ([f"rerun={repeated['id']}", "-m"], "not in a sweep; leave out -m"),
    ):
        refused = qexp(*arguments, small=False)
        assert refused.returncode == 1
        assert message in refused.stderr
        assert "Traceback" not in refused.stderr + refused.stdout
        assert len(refused.stderr.strip().splitlines()) == 1
    assert len(table(tmp_path)) == before


FAST = ("model=tiny", "latency=off", "qconfig.overflow=activations", "saturation.exact_images=0", "per_layer.images=0")


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
    """SIGKILL to the sweep's first process, or to one of those that it has started, where there are any."""
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(main.pid)
        others = first.children(recursive=True)
        (chance.choice(others) if others and chance.random() < 0.5 else first).send_signal(signal.SIGKILL)


def duplicates(runs: list[dict[str, Any]]) -> dict[str, int]:
    """How often each configuration was finished, where that isn't once."""
    finished = Counter(run["tags"]["config_hash"] for run in runs if run["status"] == "FINISHED")
    return {name: count for name, count in finished.items() if count != 1}


@pytest.mark.slow
def test_whatever_is_killed_and_whenever_the_same_command_ends_the_study(tmp_path: Path, checkpoint: Path) -> None:
    """At moments over the whole of a sweep, and, since most of that is its start, over its jobs alone in every other
    turn. The first turn begins in an empty folder, and so may hit the making of the store."""
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
        assert len(after) - len(before) == 4 - len(finished)  # as many were begun as were left to do
        assert len(sweeps_of(folder, study)) == 1
        assert all(cache._open(file) is not None for file in (folder / "outputs" / "cache").glob("*.npy"))
    assert [run["status"] for run in sweeps_of(folder)] == ["FINISHED"] * KILLS
