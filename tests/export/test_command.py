"""`python -m qexp.export`: a run's model is made again and is the same, or what can't be exported is refused."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import ROOT

Run = Callable[..., subprocess.CompletedProcess[str]]


def export(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qexp.export", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_finished_run_is_exported_and_checked(qexp: Run, checkpoint: Path, tmp_path: Path) -> None:
    done = qexp(f"model.checkpoint={checkpoint}", "latency=off", "flow=fx")
    assert done.returncode == 0, done.stderr
    with sqlite3.connect(tmp_path / "outputs" / "mlflow.db") as connection:
        (run_id,) = connection.execute("select run_uuid from runs").fetchone()
    said = export(tmp_path, f"run_id={run_id}", "folder=ships")
    assert said.returncode == 0, said.stderr
    assert "python " in said.stdout.splitlines()[-1]
    checked = subprocess.run([sys.executable, "ships/check.py"], cwd=tmp_path, capture_output=True, text=True)
    assert checked.stdout.endswith("ok\n"), checked.stderr
    again = export(tmp_path, f"run_id={run_id}", "folder=ships")
    assert again.returncode == 1
    assert again.stderr.strip().endswith("ships is not empty: remove it, or give another.")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "run_id has no value: give the id of a run in MLflow, as in run_id=ID."),
        (["run_id=1", "batch_size=0"], "batch_size=0: must be positive."),
        (
            ["run_id=1", "precision=fp32", "format=pt2"],
            "format=pt2 with precision=fp32: must be one of format=onnx, format=openvino, format=torchscript, "
            "format=aoti.",
        ),
        (["run_id=1"], "has no runs (there is no mlflow.db in it); give the folder that has, or tracking.uri=ADDRESS."),
    ],
)
def test_what_can_not_be_exported_is_refused_in_a_sentence(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    done = export(tmp_path, *arguments)
    assert done.returncode == 1
    assert done.stderr.strip().endswith(sentence)
    assert len(done.stderr.strip().splitlines()) == 1
