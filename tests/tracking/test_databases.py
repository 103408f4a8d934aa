"""Stores that several share: an outputs folder for a group, a database for those who start at the same time."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from qexp import tracking
from qexp.errors import InputError
from qexp.tracking import databases
from tests.helpers import ROOT
from tests.helpers.cli import SMALL
from tests.helpers.stores import FIRST, GROUP, NEEDS_POSTGRES, SECOND, as_user, free_port, serving, settings

RUN = ["-m", "qexp", *SMALL]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An outputs folder with an empty store, made with the umask of those who share folders."""
    folder = tmp_path_factory.mktemp("shared") / "outputs"
    before = os.umask(0o002)
    try:
        tracking.connect(settings(), folder)
    finally:
        os.umask(before)
    return folder


def not_the_groups(folder: Path) -> list[Path]:
    """The paths in a folder that another user of its group can't write to."""
    return [path for path in (folder, *folder.rglob("*")) if not path.stat().st_mode & stat.S_IWGRP]


def test_a_new_store_is_the_groups_where_the_umask_lets_it(shared: Path) -> None:
    assert {path.name for path in shared.iterdir()} == {"mlflow.db", ".mlflow.db.lock"}
    assert not_the_groups(shared) == []


@pytest.mark.slow
def test_a_database_that_cannot_be_written_to_is_one_sentence_before_any_work(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    database = Path(shutil.copy(shared / "mlflow.db", tmp_path / "outputs"))
    database.chmod(0o444)
    command = [sys.executable, *RUN]
    if os.geteuid() == 0:
        (tmp_path / "outputs").chmod(0o777)
        command = [*as_user(SECOND), *command]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert f"MLflow's database {database} can't be written to by" in done.stderr
    assert "attempt to write a readonly database" in done.stderr
    assert not (tmp_path / "outputs" / "checkpoints").exists()  # nothing was trained
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        assert connection.execute("SELECT count(*) FROM runs").fetchone() == (0,)


def test_a_database_that_another_process_holds_is_not_said_to_be_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(databases, "SQLITE_SECONDS", 0.1)
    database = tmp_path / "mlflow.db"
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE t (x)")
        connection.commit()
        connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(InputError, match=rf"{database} has been locked by another process"):
            databases._check_sqlite(database, "outputs=x")
    databases._check_sqlite(database, "outputs=x")
    assert sqlite3.connect(database).execute("SELECT name FROM sqlite_master").fetchall() == [("t",)]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_two_users_of_a_group_share_one_outputs_folder(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    os.chown(shared, FIRST, GROUP)
    shared.chmod(0o2775)
    for user, swept in ((FIRST, "seed=0"), (SECOND, "seed=0,1")):
        done = subprocess.run(
            [*as_user(user), sys.executable, *RUN, f"outputs={shared / 'outputs'}", swept, *["-m"][: "," in swept]],
            cwd=shared, env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(shared)}, umask=0o002,
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert not_the_groups(shared) == []
    assert {path.stat().st_gid for path in shared.rglob("*")} == {GROUP}
    assert {path.stat().st_uid for path in shared.rglob("*")} == {FIRST, SECOND}


@pytest.mark.slow
@NEEDS_POSTGRES
def test_first_starts_on_an_empty_server_at_the_same_time_all_succeed(postgres: str, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.helpers.stores import begin, settings;"
        "from qexp import tracking; store = tracking.connect(settings(sys.argv[1]), Path(sys.argv[2]));"
        "begin(store).finish()"
    )
    command = [sys.executable, "-c", code, postgres]
    starts = [
        subprocess.Popen([*command, tmp_path / str(n)], cwd=ROOT, stdout=-1, stderr=subprocess.STDOUT, text=True)
        for n in range(3)
    ]
    said = [start.communicate(timeout=240)[0] for start in starts]
    assert [start.returncode for start in starts] == [0, 0, 0], said
    assert said == ["", "", ""]
    store = tracking.connect(settings(postgres), tmp_path)
    assert len(store.client.search_runs([store.client.get_experiment_by_name("qexp/digits").experiment_id])) == 3


WRITERS, EACH = 8, 3
WRITE = """
import multiprocessing, sys
from pathlib import Path
from qexp import tracking
from tests.helpers.stores import begin, settings

def write(number, parent, address, outputs):
    store = tracking.connect(settings(address), Path(outputs))
    uses = [tracking.DatasetUse("images", "d", "here", "evaluation")]
    file = Path(outputs) / f"{number}.txt"
    file.write_text(f"of {number}")
    for repeat in range(int(sys.argv[4])):
        with begin(store, f"{number}.{repeat}", parent, **{f"p{i}": str(number) for i in range(40)}) as run:
            metrics = {f"m{i}": float(100 * number + i) for i in range(40)}
            tags = {f"t{i}": "x" for i in range(30)}
            tracking.deliver(run, tracking.Outcome(metrics, tags, {"a/b.txt": file}, uses, {"q": "1"}), Path(outputs))

address, outputs = sys.argv[1:3]
store = tracking.connect(settings(address), Path(outputs))
with tracking.open_parent(store, experiment="qexp/digits", name="sweep", tags={}) as parent:
    forked = multiprocessing.get_context("fork")
    given = [(number, parent.id, address, outputs) for number in range(int(sys.argv[3]))]
    writers = [forked.Process(target=write, args=each) for each in given]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * len(writers)
    print(parent.id)
"""


@pytest.mark.slow
@NEEDS_POSTGRES
def test_eight_processes_write_through_a_server_on_postgresql(postgres: str, tmp_path: Path) -> None:
    """Each run is there once, whole, with its file, though all record the same data set for the first time at once."""
    with serving(postgres, tmp_path, free_port()) as address:
        done = subprocess.run(
            [sys.executable, "-c", WRITE, address, str(tmp_path), str(WRITERS), str(EACH)],
            cwd=ROOT, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        store = tracking.connect(settings(address), tmp_path)
        rows = tracking.children(store, done.stdout.strip())
        names = {f"{number}.{repeat}": 1 for number in range(WRITERS) for repeat in range(EACH)}
        assert Counter(row.name for row in rows) == names
        for row in rows:
            number = int(row.name.partition(".")[0])
            assert row.status == "FINISHED"
            assert row.params == {**{f"p{i}": str(number) for i in range(40)}, "q": "1"}
            assert row.metrics == {f"m{i}": float(100 * number + i) for i in range(40)}
            assert (tmp_path / "kept" / row.artifacts.partition(":/")[2] / "a" / "b.txt").read_text() == f"of {number}"
        run = store.client.get_run(rows[0].run_id)
        assert len(run.inputs.dataset_inputs) == 1
    assert not list((tmp_path / "unsent").iterdir())
    said = [line for line in done.stderr.splitlines() if "can't be reached" not in line and "is back" not in line]
    assert said == []
