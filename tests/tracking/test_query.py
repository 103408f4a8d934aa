"""Runs found for a report, and their files, in every kind of store."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from qexp import tracking
from qexp.errors import InputError
from qexp.records import RunRecord, Top1
from qexp.tracking.query import latest
from tests.helpers.simulated_sweep import simulated_sweep, write_sweep
from tests.helpers.stores import NEEDS_POSTGRES, settings

COUNT = 6
Sweep = tuple[list[RunRecord], dict[str, Top1]]


@pytest.fixture(scope="module")
def sweep() -> Sweep:
    return simulated_sweep(COUNT, images=200)


@pytest.fixture
def store(empty: Path, tmp_path: Path) -> tracking.Store:
    shutil.copy(empty, tmp_path)
    return tracking.connect(settings(), tmp_path)


def check(store: tracking.Store, sweep: Sweep, ids: Mapping[str, str]) -> None:
    """The store has these runs and predicted classes. ids: in the store, of runs by their ids in `sweep`."""
    found = tracking.find_runs(store)
    (records, top1), names = sweep, {there: here for here, there in ids.items()}
    assert [names[row.run_id] for row in found.records] == [row.run_id for row in records]
    for row, record in zip(found.records, records, strict=True):
        assert (row.name, row.status, row.params, row.metrics) == (
            record.name, record.status, record.params, record.metrics,
        )  # fmt: skip
        assert row.tags.items() >= record.tags.items()
    read = tracking.top1(store, found.records)
    assert {names[run_id] for run_id in read} == {*top1}
    for run_id, classes in read.items():
        expected = top1[names[run_id]]
        assert np.array_equal(classes.labels, expected.labels)
        assert np.array_equal(classes.int8["eager"], expected.int8["eager"])
        assert classes.int8["eager"] is classes.int8["torchscript"]
        assert classes.classes == expected.classes
    assert tracking.artifacts(store, found.records, "none.json") == {}
    unplaced = [dataclasses.replace(row, artifacts="") for row in found.records]
    assert tracking.artifacts(store, unplaced, "top1.npz").keys() == read.keys()


def test_a_sweep_is_read_back_from_a_local_store(store: tracking.Store, sweep: Sweep, tmp_path: Path) -> None:
    write_sweep(store, *sweep)
    ids = {row.run_id: row.run_id for row in sweep[0]}
    check(store, sweep, ids)
    # Also where the folder has moved.
    moved = tmp_path.with_name(f"{tmp_path.name}-moved")
    tmp_path.rename(moved)
    check(tracking.connect(settings(), moved), sweep, ids)
    moved.rename(tmp_path)


@pytest.mark.slow
@NEEDS_POSTGRES
def test_a_sweep_is_read_back_from_postgresql(postgres: str, sweep: Sweep, tmp_path: Path) -> None:
    store = tracking.connect(settings(postgres), tmp_path)
    write_sweep(store, *sweep)
    check(store, sweep, {row.run_id: row.run_id for row in sweep[0]})


def test_a_sweep_is_read_back_from_a_server(server: tuple[str, Path], sweep: Sweep, tmp_path: Path) -> None:
    store = tracking.connect(settings(server[0], "qexp/queried"), tmp_path)
    records, top1 = sweep
    parent = tracking.open_parent(store, experiment="qexp/queried", name="sweep", tags={})
    ids = {}
    for record in records:
        np.savez_compressed(tmp_path / "top1.npz", allow_pickle=False, **top1[record.run_id].arrays())
        own = {name: value for name, value in record.tags.items() if not name.startswith("mlflow.")}
        given = {"experiment": "qexp/queried", "params": record.params, "tags": own, "parent": parent.id}
        with tracking.start_run(store, name=record.name, **given) as run:  # type: ignore[arg-type]
            run.log_result(record.metrics, artifacts={"top1.npz": tmp_path / "top1.npz"})
        ids[record.run_id] = run.id
    tracking.close_parent(parent, "FINISHED", {})
    # What the client says of itself.
    bare = [
        dataclasses.replace(row, tags={n: v for n, v in row.tags.items() if not n.startswith(("mlflow.", "host"))})
        for row in records
    ]
    check(store, (bare, top1), ids)


def test_runs_are_found_by_sweep_study_and_filter(store: tracking.Store, sweep: Sweep) -> None:
    with pytest.raises(InputError, match=r"has no sweep; run one first"):
        tracking.find_runs(store)
    records, _ = sweep
    studied = [dataclasses.replace(row, tags={**row.tags, "study": "it's"}) for row in records]
    first = write_sweep(store, studied[:4], {}, name="one")
    second = write_sweep(store, studied[4:6], {}, name="two")
    with tracking.start_run(store, experiment="qexp/digits", name="alone", params={"observer": "mse"}, tags={}) as run:
        pass

    def names(**how: str) -> set[str]:
        return {row.run_id for row in tracking.find_runs(store, **how).records}

    def ids(start: int, end: int) -> set[str]:
        return {row.run_id for row in records[start:end]}

    assert names() == names(sweep="two") == names(sweep=second.run_id) == ids(4, 6)
    assert names(sweep="one") == ids(0, 4)
    assert tracking.find_runs(store, sweep=first.run_id).parent == first
    assert names(study="it's") == ids(0, 6)
    chosen = {row.run_id for row in records[:6] if row.params["observer"] == "mse"}
    assert names(filter="params.observer = 'mse'") == {*chosen, run.id}
    assert tracking.find_runs(store, study="it's").name == "it's"
    with pytest.raises(InputError, match=r"no sweep=three, neither an id nor a name; the latest are 'one', 'two'\."):
        tracking.find_runs(store, sweep="three")
    with pytest.raises(InputError, match=r"no run with study=none\."):
        tracking.find_runs(store, study="none")
    with pytest.raises(InputError, match=r"refuses the filter observer=mse: Invalid"):
        tracking.find_runs(store, filter="observer=mse")
    other = dataclasses.replace(store, experiment="other")
    with pytest.raises(InputError, match="has no sweep"):
        tracking.find_runs(other)


def test_a_run_is_replaced_by_a_later_finished_one_of_the_same_configuration() -> None:
    def run(name: str, status: str, config: str = "c", cpu: str = "x") -> RunRecord:
        return RunRecord(name, name, status, tags={"config_hash": config, **({"cpu": cpu} if cpu else {})})

    def kept(*runs: RunRecord) -> list[str]:
        return [row.name for row in latest(runs)]

    assert kept(run("1", "FINISHED"), run("2", "FINISHED")) == ["2"]
    assert kept(run("1", "FAILED", cpu=""), run("2", "FINISHED")) == ["2"]
    assert kept(run("1", "FINISHED"), run("2", "FAILED", cpu="")) == ["1", "2"]
    assert kept(run("1", "FINISHED", cpu="y"), run("2", "FINISHED")) == ["1", "2"]
    assert kept(run("1", "FINISHED", "a"), run("2", "FINISHED", "b")) == ["1", "2"]
    assert kept(run("1", "FINISHED", "", ""), run("2", "FINISHED", "", "")) == ["1", "2"]


def test_predicted_classes_that_cannot_be_read_are_left_out(
    store: tracking.Store, sweep: Sweep, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records, top1 = sweep
    caplog.set_level(logging.WARNING)
    write_sweep(store, records, dict(list(top1.items())[:4]))
    files = sorted((tmp_path / "artifacts").rglob("top1.npz"))
    for file, content in zip(files, (b"", b"PK", files[2].read_bytes()[:-40]), strict=False):
        file.write_bytes(content)
    assert len(tracking.top1(store, tracking.find_runs(store).records)) == 1
    assert caplog.text.count("is left out") == 3
