"""Results that a server has not taken are kept, and sent once, by whatever comes to it next."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qexp import tracking
from qexp.errors import RunError
from qexp.records import RACING_TAG
from tests.helpers.stores import Line, begin
from tests.tracking.test_patience import connected


def outcome(folder: Path) -> tracking.Outcome:
    (folder / "model").mkdir()
    (folder / "model" / "int8.pt").write_bytes(b"weights")
    use = tracking.DatasetUse("images", "d", "here", "evaluation", {"images": 3})
    return tracking.Outcome(
        {"m": 1.0, "infinite": float("inf")}, {"verdict": "good"}, {"model": folder / "model"}, [use],
        {"resolved.overflow": "none"},
    )  # fmt: skip


def test_results_are_kept_and_sent_once_by_the_next_who_comes(
    line: Line, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = connected(line, tmp_path, patience=0.6)
    found = outcome(tmp_path)
    run = begin(store, "kept")
    line.cut()
    with pytest.raises(RunError) as refused, run:
        tracking.deliver(run, found, tmp_path)
    (file,) = (tmp_path / "unsent").iterdir()
    assert str(refused.value) == (
        f"MLflow at {line.address} can't be reached (Connection refused); the results are kept in {file}, and the same "
        "command sends them when it is back."
    )
    tracking.send_unsent(store, tmp_path)  # it isn't back yet
    assert file.is_file()
    line.mend()
    store.client.set_tag(run.id, "error", "process 1 ended without closing the run.")
    store.client.set_terminated(run.id, "KILLED")
    caplog.clear()
    for _ in range(2):
        tracking.send_unsent(store, tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"1 results that MLflow at {line.address} had not taken are sent: 'kept'."
    ]
    assert not list((tmp_path / "unsent").iterdir())
    sent = store.client.get_run(run.id)
    assert (sent.info.status, sent.data.metrics) == ("FINISHED", {"m": 1.0})
    assert (sent.data.params, len(sent.inputs.dataset_inputs)) == ({"resolved.overflow": "none"}, 1)
    assert (sent.data.tags["verdict"], sent.data.tags["not_finite"]) == ("good", "infinite=inf")
    assert "error" not in sent.data.tags
    assert [point.timestamp for point in store.client.get_metric_history(run.id, "m")] == [found.at]
    fetched = Path(store.client.download_artifacts(run.id, "model/int8.pt", str(tmp_path)))
    assert fetched.read_bytes() == b"weights"


def test_a_run_that_racing_stopped_is_sent_as_one(line: Line, tmp_path: Path) -> None:
    store = connected(line, tmp_path, patience=0.6)
    run = begin(store, "raced")
    line.cut()
    seen = {RACING_TAG: "futility"}
    with pytest.raises(RunError, match="the same command sends them"), run:
        tracking.deliver(run, tracking.Outcome({"racing/images": 96.0}, seen, {}, [], {}, status="KILLED"), tmp_path)
    line.mend()
    # Closed as an orphan meanwhile, it has the status that it is to have, and nothing of what it saw.
    store.client.set_terminated(run.id, "KILLED")
    tracking.send_unsent(store, tmp_path)
    sent = store.client.get_run(run.id)
    assert (sent.info.status, sent.data.metrics) == ("KILLED", {"racing/images": 96.0})
    assert sent.data.tags[RACING_TAG] == "futility"
    assert not list((tmp_path / "unsent").iterdir())


def test_what_can_t_be_sent_stays_and_is_said(line: Line, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = connected(line, tmp_path, patience=5)
    with begin(store, "delivered") as run:
        tracking.deliver(run, outcome(tmp_path), tmp_path)
    assert run.status == "FINISHED"
    kept = {"uri": line.address, "metrics": {}, "tags": {}, "files": {}, "datasets": [], "params": {}, "at": 1,
            "status": "FINISHED"}  # fmt: skip
    folder = tmp_path / "unsent"
    assert not list(folder.iterdir())
    for name, content in {"0" * 32: kept, "elsewhere": {**kept, "uri": "http://another"}, run.id: kept}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    tracking.send_unsent(store, tmp_path)
    assert sorted(path.stem for path in folder.iterdir()) == ["0" * 32, "elsewhere"]
    (said,) = (record.getMessage() for record in caplog.records if "stay there" in record.getMessage())
    assert said.startswith(f"the results in {folder / ('0' * 32)}.json can't be sent, and stay there: ")
