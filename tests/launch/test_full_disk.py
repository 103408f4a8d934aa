"""A disk that is full in the middle of a sweep: said in a sentence, and resumed by the same command."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.helpers.cli import SMALL
from tests.helpers.jobs import wait_until
from tests.helpers.stores import jobs_of, sweeps_of

SECONDS = 180


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """The folder outputs, with 30 MB of its own."""
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("needs root on Linux, to mount a small disk")
    folder = tmp_path / "outputs"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_named_and_the_same_command_goes_on_once_there_is_room(
    disk: Path, checkpoint: Path, empty: Path, tmp_path: Path
) -> None:
    shutil.copy(empty, disk)
    command = [
        sys.executable, "-m", "qexp", "-m", *SMALL, f"model.checkpoint={checkpoint}", "calib=small", "study=full",
        "per_layer.images=0", "saturation.exact_images=0", "calib.seed=0,1,2", "job.at_a_time=1",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    filler = disk / "filler"
    try:
        wait_until(lambda: "FINISHED" in {run["status"] for run in jobs_of(tmp_path)} or process.poll(), SECONDS)
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 12))
        said, _ = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 1, said
    assert "no room" in said or "No space left on device" in said or "disk is full" in said
    assert "Traceback" not in said
    finished = [run["id"] for run in jobs_of(tmp_path) if run["status"] == "FINISHED"]
    assert 1 <= len(finished) < 3

    filler.unlink()
    again = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert again.returncode == 0, again.stdout + again.stderr
    runs = [run for run in jobs_of(tmp_path) if run["status"] == "FINISHED"]
    assert sorted(run["name"] for run in runs) == ["seed=0", "seed=1", "seed=2"]  # nothing twice
    assert {*finished} < {run["id"] for run in runs}
    assert [run["status"] for run in sweeps_of(tmp_path)] == ["FINISHED"]
