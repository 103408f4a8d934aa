"""Sweeps of other sweepers than qexp's: their trials are under one parent run, and each has its own name."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qexp.launch import foreign_sweeper, job

FAST = ("latency=off", "per_layer.images=0", "saturation.exact_images=0", "calib=small")


def runs(folder: Path) -> list[tuple[str, str, str, str]]:
    """(id, name, status, parent's id or "") of every run under folder/outputs, in the order in which they started."""
    with contextlib.closing(sqlite3.connect(folder / "outputs" / "mlflow.db")) as connection:
        return connection.execute(
            "select r.run_uuid, r.name, r.status, coalesce(t.value, '') from runs r left join tags t "
            "on t.run_uuid = r.run_uuid and t.key = 'mlflow.parentRunId' order by r.start_time"
        ).fetchall()


@pytest.mark.slow
def test_trials_have_a_parent_and_names_of_their_own(
    qexp: Callable[..., subprocess.CompletedProcess[str]], checkpoint: Path, tmp_path: Path
) -> None:
    given = [*FAST, f"model.checkpoint={checkpoint}", "hydra/sweeper=basic", "calib.sampling=random,stratified"]
    fixed = f"hydra.sweep.dir={tmp_path / 'fixed'}"
    done = qexp(*given, fixed, "hydra.sweep.subdir=${hydra.job.num}-${hydra.job.override_dirname}", "-m")
    assert done.returncode == 0, done.stderr
    parent, *children = runs(tmp_path)
    assert (parent[2:], parent[1]) == (("FINISHED", ""), "sweep fixed")
    name = "tiny* digits per_channel minmax 8"
    assert [child[1:] for child in children] == [(f"{name} #{n}", "FINISHED", parent[0]) for n in (1, 2)]
    assert not [path.name for path in (tmp_path / "fixed").iterdir() if "tracking" in path.name]
    assert f"viewStateShareKey={parent[0]}" in done.stdout

    again = qexp(*given, fixed, "-m")
    assert again.returncode == 1
    assert again.stderr == (
        f"hydra.sweep.dir={tmp_path / 'fixed'}: a finished run's files are there, and would be written over; give "
        "another folder.\n"
    )

    failed = qexp(*given, "calib.batches=1,100000", "-m")
    assert failed.returncode == 1
    assert [run[2] for run in runs(tmp_path) if run[1].startswith("sweep ")] == ["FINISHED", "FAILED"]


def test_an_open_parent_is_closed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    monkeypatch.setattr(foreign_sweeper, "_open", [ended.append])
    foreign_sweeper.close_parent("FAILED")
    foreign_sweeper.close_parent("FINISHED")
    assert ended == ["FAILED"]


def test_a_trial_is_known_by_its_number_whatever_name_was_given() -> None:
    config: Any = SimpleNamespace(tracking=SimpleNamespace(name="mine"), calib=SimpleNamespace(batches=None))
    nothing = dict.fromkeys(("model", "dataset", "qconfig", "observer"), "")

    class Known(job.Job):
        params = nothing  # type: ignore[assignment]

    jobs = [Known(config, {}, {}, Path(), Path(), number, False, None, True) for number in range(2)]
    assert [job.name for job in jobs] == ["mine #1", "mine #2"]
