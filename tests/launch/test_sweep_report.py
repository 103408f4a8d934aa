"""What a sweep leaves of its report when it ends: in its folder, in its run in MLflow, and on the terminal."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qexp import tracking
from qexp.config.schema import Config
from qexp.launch import sweep, sweep_report
from qexp.records import RunRecord, Top1
from qexp.report import findings
from qexp.tracking import view
from tests.helpers.simulated_sweep import simulated_sweep
from tests.helpers.stores import settings

COUNT = 6
FAILED = RunRecord("", "broken", "FAILED", tags={"error": "too bad."})


@pytest.fixture(scope="module")
def simulated() -> tuple[list[RunRecord], dict[str, Top1]]:
    return simulated_sweep(COUNT, images=400)


@pytest.fixture
def store(empty: Path, tmp_path: Path) -> tracking.Store:
    (tmp_path / "outputs").mkdir()
    shutil.copy(empty, tmp_path / "outputs")
    return tracking.connect(settings(), tmp_path / "outputs")


def swept(
    store: tracking.Store, records: list[RunRecord], top1: Mapping[str, Top1], folder: Path
) -> tuple[tracking.Run, list[RunRecord]]:
    """An open parent run, and these runs under it as they are read back. folder: for files that are to be logged."""
    parent = tracking.open_parent(store, experiment="qexp/digits", name="sweep it", tags={})
    for record in records:
        np.savez_compressed(folder / "top1.npz", allow_pickle=False, **top1[record.run_id].arrays())
        tags = {name: value for name, value in record.tags.items() if not name.startswith("mlflow.")}
        with tracking.start_run(
            store, experiment="qexp/digits", name=record.name, params=record.params, tags=tags, parent=parent.id
        ) as run:
            run.log_result(record.metrics, artifacts={"top1.npz": folder / "top1.npz"})
    return parent, tracking.children(store, parent.id)


def files_of(store: tracking.Store, run_id: str) -> set[str]:
    return {file.path for file in store.client.list_artifacts(run_id, "report")}


def check_kept(store: tracking.Store, parent: tracking.Run) -> None:
    """The parent has ended with a report, a description and a view."""
    ended, _ = tracking.find(store, parent.id)
    assert ended.status == "FAILED"
    assert (ended.metrics["jobs/finished"], ended.metrics["jobs/failed"]) == (COUNT, 1)
    names = ("report.html", "runs.csv", "table.md", "figures")
    assert files_of(store, parent.id) >= {f"report/{name}" for name in names}
    assert "| setting" in ended.tags["mlflow.note.content"]
    saved = store.client.get_experiment(parent.experiment_id).tags[f"mlflow.sharedViewState.{parent.id}"]
    assert view.decoded(saved)["searchFilter"] == f"tags.`mlflow.parentRunId` = '{parent.id}'"
    assert "params.`calib.batches`" in view.decoded(saved)["selectedColumns"]


def test_a_sweep_leaves_its_report_with_its_run(
    store: tracking.Store,
    simulated: tuple[list[RunRecord], dict[str, Top1]],
    composed: Callable[..., Config],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parent, rows = swept(store, *simulated, tmp_path)
    sweep.close_sweep(store, parent, [*rows, FAILED], "FAILED", tmp_path, composed())
    check_kept(store, parent)
    printed = capsys.readouterr().out
    assert f"viewStateShareKey={parent.id}" in printed
    assert "too bad." in printed
    assert f"python -m qexp.report sweep={parent.id}" in printed
    assert (tmp_path / "outputs" / "reports" / f"sweep_it-{parent.id[:8]}" / "report.html").is_file()


@pytest.mark.slow
def test_a_sweep_leaves_its_report_on_a_server(
    server: tuple[str, Path],
    simulated: tuple[list[RunRecord], dict[str, Top1]],
    composed: Callable[..., Config],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = tracking.connect(settings(server[0]), tmp_path)
    parent, rows = swept(store, *simulated, tmp_path)
    sweep.close_sweep(store, parent, [*rows, FAILED], "FAILED", tmp_path, composed())
    check_kept(store, parent)
    assert f"{server[0]}/#/experiments/{parent.experiment_id}/runs?" in capsys.readouterr().out


def test_without_auto_there_are_no_files_and_the_rest_is_the_same(
    store: tracking.Store,
    simulated: tuple[list[RunRecord], dict[str, Top1]],
    composed: Callable[..., Config],
    tmp_path: Path,
) -> None:
    parent, rows = swept(store, *simulated, tmp_path)
    said, key = sweep_report.report(store, parent, rows, composed("report.auto=false"))
    assert key == parent.id
    assert files_of(store, parent.id) == set()
    assert not (tmp_path / "outputs" / "reports").exists()
    assert "| setting" in tracking.find(store, parent.id)[0].tags["mlflow.note.content"]
    whole, _ = sweep_report.report(store, parent, rows, composed())
    assert whole.startswith(said)


def test_a_report_that_fails_is_a_sentence_and_the_runs_are_listed(
    store: tracking.Store,
    simulated: tuple[list[RunRecord], dict[str, Top1]],
    composed: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*given: Any) -> Any:
        raise ZeroDivisionError("of all things")

    caplog.set_level(logging.WARNING)
    parent = tracking.open_parent(store, experiment="qexp/digits", name="sweep it", tags={})
    monkeypatch.setattr(findings, "find", broken)
    said, key = sweep_report.report(store, parent, [*simulated[0], FAILED], composed())
    assert [record.getMessage() for record in caplog.records] == [
        "the report could not be made: ZeroDivisionError: of all things; try it again with python -m qexp.report "
        f"sweep={parent.id}."
    ]
    assert said.splitlines()[0].startswith(simulated[0][0].name)
    assert said.endswith("FAILED  broken: too bad.")
    assert key == parent.id


def test_without_a_finished_run_there_is_no_report(
    store: tracking.Store, composed: Callable[..., Config], tmp_path: Path
) -> None:
    parent = tracking.open_parent(store, experiment="qexp/digits", name="sweep it", tags={})
    said, key = sweep_report.report(store, parent, [FAILED, replace(FAILED, status="KILLED")], composed())
    assert said.startswith("FAILED  broken: too bad.")
    assert key is None
    assert files_of(store, parent.id) == set()
