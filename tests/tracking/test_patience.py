"""A server that can't be reached for a while is waited for, and nothing is made twice; a real server behind a line that
is cut."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest

from qexp import tracking
from qexp.errors import InputError, RunError
from tests.helpers.stores import Line, begin, settings


def connected(line: Line, outputs: Path, patience: float) -> tracking.Store:
    asked = settings(line.address)
    asked.patience = patience
    return tracking.connect(asked, outputs)


def runs(store: tracking.Store, name: str) -> list[str]:
    """Ids of the runs of this name."""
    experiment = store.client.get_experiment_by_name("qexp/digits")
    found = store.client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    return [run.info.run_id for run in found]


def test_a_lost_server_is_waited_for_and_each_call_made_once_it_is_back(
    line: Line, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = connected(line, tmp_path, patience=60)
    with begin(store, "waits") as run:
        line.cut()
        threading.Timer(1.5, line.mend).start()
        start = time.monotonic()
        run.log_result({"m": 1.0}, {"t": "x"}, {"a/b.txt": "text"})
        assert time.monotonic() - start > 1
    (found,) = (store.client.get_run(run_id) for run_id in runs(store, "waits"))
    assert (found.info.status, found.data.metrics) == ("FINISHED", {"m": 1.0})
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said[0] == (
        f"MLflow at {line.address} can't be reached (Connection refused); it is waited for, up to 60 s "
        "(tracking.patience)."
    )
    assert said[1].startswith(f"MLflow at {line.address} is back after")
    assert len(said) == 2


def test_a_request_whose_answer_is_lost_has_its_effect_once(line: Line, tmp_path: Path) -> None:
    store = connected(line, tmp_path, patience=60)
    begin(store, "makes the experiment").finish()
    use = tracking.DatasetUse("images", "d", "here", "evaluation")
    line.drop_answers = 1
    experiment = store.client.get_experiment_by_name("qexp/digits").experiment_id
    line.drop_answers = 1
    made = store.client.create_run(experiment, tags={"pid": "1"}, run_name="once")
    assert runs(store, "once") == [made.info.run_id]
    run = tracking.Run(store, made)
    for call in (
        lambda: run.log_result({"m": 1.0, "n": 2.0}, {"t": "x"}, {"a.txt": "text"}, [use], {"p": "1"}, at=5),
        run.finish,
    ):
        line.drop_answers = 1
        call()
    found = store.client.get_run(made.info.run_id)
    assert found.info.status == "FINISHED"
    assert len(found.inputs.dataset_inputs) == 1
    assert [point.timestamp for point in store.client.get_metric_history(made.info.run_id, "m")] == [5]


def test_a_server_that_stays_away_is_waited_for_once(line: Line, tmp_path: Path) -> None:
    store = connected(line, tmp_path, patience=0.6)
    run = begin(store, "left")
    line.cut()
    with pytest.raises(RunError, match=r"did not take the results of run left: Connection refused\."):
        run.log_result({"m": 1.0})
    start = time.monotonic()
    with pytest.raises(InputError, match=r"can't be reached for the experiment qexp/digits \(Connection refused\)\."):
        begin(store, "next")
    assert time.monotonic() - start < 0.6
    line.mend()
    run.finish()
