"""A tracking server that is killed in the middle of a sweep and started again: nothing lost, nothing twice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from mlflow import MlflowClient

from qexp.records import PARENT_TAG
from qexp.tracking import SWEEP_TAG
from tests.helpers import ROOT
from tests.helpers.cli import TORCHS
from tests.helpers.jobs import wait_until
from tests.helpers.stores import free_port, serving

JOBS = 4


@pytest.mark.slow
def test_a_sweep_outlasts_its_tracking_server(checkpoint: Path, empty: Path, tmp_path: Path) -> None:
    """What it can't send in time, the same command does."""
    shutil.copy(empty, tmp_path / "server.db")
    database, port, said = f"sqlite:///{tmp_path / 'server.db'}", free_port(), tmp_path / "said"
    command = [
        sys.executable, "-m", "qexp", "-m", "model=tiny", f"model.checkpoint={checkpoint}", "latency=off", "study=s",
        "per_layer.images=0", "saturation.exact_images=0", "calib=small", f"calib.seed=range({JOBS})",
        "tracking.log_model=artifact", "tracking.patience=4", f"tracking.uri=http://127.0.0.1:{port}",
        TORCHS,
    ]  # fmt: skip

    def sweep() -> subprocess.Popen[str]:
        with said.open("a") as output:
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=output, stderr=output, text=True)

    with serving(database, tmp_path, port):
        process = sweep()
        wait_until(lambda: "seed=0" in said.read_text() or process.poll() is not None, seconds=120)
    assert process.wait(timeout=120) == 1, said.read_text()
    unsent = tmp_path / "outputs" / "unsent"
    assert "can't be reached (Connection refused); it is waited for, up to 4 s" in said.read_text()
    assert "the same command sends them when it is back" in said.read_text()
    assert len(list(unsent.iterdir())) >= 1
    with serving(database, tmp_path, port) as address:
        assert sweep().wait(timeout=120) == 0, said.read_text()
        assert "had not taken are sent" in said.read_text()
        assert not list(unsent.iterdir())
        client = MlflowClient(address)
        (experiment,) = (one for one in client.search_experiments() if one.name == "qexp/digits")
        runs = client.search_runs([experiment.experiment_id])
        jobs = [run for run in runs if SWEEP_TAG not in run.data.tags and run.info.status == "FINISHED"]
        (parent,) = (run for run in runs if SWEEP_TAG in run.data.tags)
        assert Counter(run.info.run_name for run in jobs) == {f"seed={n}": 1 for n in range(JOBS)}
        assert {run.data.tags[PARENT_TAG] for run in jobs} == {parent.info.run_id}
        assert {len(run.data.metrics) for run in jobs} == {len(jobs[0].data.metrics)}
        for run in jobs:
            for name in run.data.metrics:
                assert len(client.get_metric_history(run.info.run_id, name)) == 1
            files = {file.path for file in client.list_artifacts(run.info.run_id)}
            assert {"predictions.npz", "config.json", "model"} <= files
            kept = client.download_artifacts(run.info.run_id, "model/artifacts.json", str(tmp_path))
            assert Path(kept).stat().st_size
