"""Timing in fresh processes: what is timed is what was saved, with the threads and cores asked for, one at a time."""

from __future__ import annotations

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from qexp.config import schema
from qexp.errors import RunError
from qexp.latency import worker
from qexp.metrics import Metric
from qexp.pipeline.run import run_experiment
from qexp.records import PARTED_TAG, Result
from qexp.system import machine
from tests.helpers import ROOT
from tests.helpers.cli import TORCHS

Composed = Callable[..., schema.Config]
Job = Callable[..., tuple[schema.Config, Result]]
FAST = ("model=tiny", "latency=standard", "latency.seconds=0.1", "latency.block_ms=2")


@pytest.fixture
def job(composed: Composed, checkpoint: Path, tmp_path: Path) -> Job:
    """job(*overrides) -> the configuration of one job and its Result; its folder is tmp_path/run."""

    def run(*overrides: str) -> tuple[schema.Config, Result]:
        model = f"model.checkpoint={checkpoint}"
        config = composed(*FAST, model, "latency.warmup_seconds=0.01", "latency.min_blocks=4", *overrides)
        (tmp_path / "run").mkdir()
        return config, run_experiment(config, tmp_path / "run")

    return run


@pytest.mark.slow
def test_two_processes_time_what_was_saved(job: Job, tmp_path: Path) -> None:
    sizes = ("latency.batch_sizes=[1,4]", "saturation.exact_images=0")
    config, result = job(*sizes)
    kept = json.loads((tmp_path / "run" / "latency.json").read_text())
    rows = [row for row in kept["rows"] if row["variant"] != "fp32_cuda"]  # where there is a GPU
    variants = ["fp32_eager", "fp32_eager_channels_last", "fp32_torchscript", "int8_eager", "int8_torchscript"]
    assert [(row["variant"], row["batch_size"]) for row in rows] == [
        (name, size) for size in (1, 4) for name in [*variants, "control"]
    ]
    assert {row["processes"] for row in rows} == {2}
    with (tmp_path / "run" / "latency.csv").open() as file:
        assert [row["variant"] for row in csv.DictReader(file)] == [row["variant"] for row in kept["rows"]]
    pairs = {(pair["fp32"], pair["int8"], pair["batch_size"]): pair["value"] for pair in kept["speedups"]}
    assert len([fp32 for fp32, *_ in pairs if fp32 != "fp32_cuda"]) == 3 * 2 * 2
    headline = [f"fp32_{result.tags['fastest.fp32']}", f"int8_{result.resolved['resolved.runtime']}"]
    assert pairs[headline[0], headline[1], 1] == result.metrics[Metric.speedup]
    assert result.metrics[Metric.runtime_latency.of("int8_torchscript")] == rows[4]["p50"]

    # The same models again, but with other logits than they give.
    images = np.load(tmp_path / "run" / "predictions.npz")
    inputs = np.zeros((8, 3, 32, 32), np.float32)
    logits = {precision: images[precision][:8] for precision in ("fp32", "int8")}
    with pytest.raises(RunError, match=r"two runtimes of the same FP32 model differ by .* of the largest logit"):
        worker.measure(config, tmp_path / "run", inputs, logits, all_int8=True)


def test_a_worker_has_its_cores_and_its_own_way_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("QEXP_WAIT_POLICY", "PASSIVE")
    env = worker.environment(2)
    assert "OMP_WAIT_POLICY" not in env
    assert env["OMP_NUM_THREADS"] == "2"
    monkeypatch.delenv("QEXP_WAIT_POLICY")  # set by the user then
    assert worker.environment(2)["OMP_WAIT_POLICY"] == "PASSIVE"
    code = "import os, qexp; print(os.environ.get('OMP_WAIT_POLICY'))"
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "None"


def test_cores_are_physical_ones_as_long_as_there_are_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu, core in ((0, 0), (1, 1), (2, 0), (3, 1)):
        topology = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "core_id").write_text(str(core))
        (topology / "physical_package_id").write_text("0")
    monkeypatch.setattr(machine, "allowed_cpus", lambda: (0, 1, 2, 3))
    assert [machine.separate_cores(count, tmp_path) for count in (1, 2, 3)] == [[1], [0, 1], [0, 1, 3]]
    monkeypatch.setattr(machine, "allowed_cpus", lambda: (0, 2, 3))
    assert machine.separate_cores(2, tmp_path) == [0, 3]
    assert machine.separate_cores(2, tmp_path / "nothing") == [2, 3]


@pytest.mark.slow
def test_inductor_is_compiled_once_and_loaded_where_it_is_timed(job: Job, tmp_path: Path) -> None:
    """Processes that time find the packages, since a second run of the same settings finds them too, in no time."""
    asked = ("runtimes=[torchscript,inductor]", "latency.processes=1", "qconfig.overflow=weights")
    _, result = job(*asked)
    rows = {r["variant"]: r for r in json.loads((tmp_path / "run" / "latency.json").read_text())["rows"]}
    metrics = result.metrics
    for variant in ("fp32_inductor", "int8_inductor"):
        assert metrics[Metric.runtime_latency.of(variant)] == rows[variant]["p50"]
        assert 1000 * metrics[Metric.runtime_compile.of(variant)] > 10 * rows[variant]["first_ms"]
    assert metrics[Metric.runtime_layers_int8.of("inductor")] == metrics[Metric.layers_int8] > 0
    assert metrics[Metric.runtime_accuracy.of("inductor")] == pytest.approx(metrics[Metric.accuracy_int8], abs=0.02)
    assert PARTED_TAG not in result.tags

    (tmp_path / "run").rename(tmp_path / "first")
    _, again = job(*asked, "latency.enabled=false")
    compiled = (Metric.runtime_compile.of("fp32_inductor"), Metric.runtime_compile.of("int8_inductor"))
    assert [again.metrics[name] for name in compiled] == [metrics[name] for name in compiled]


@pytest.mark.slow
def test_a_worker_ends_with_its_parent() -> None:
    code = (
        "import subprocess, sys; "
        "child = subprocess.Popen([sys.executable, '-c', 'import sys, time; from qexp.system import processes; "
        "processes.end_with_parent(); print(flush=True); time.sleep(600)'], stdout=subprocess.PIPE); "
        "child.stdout.readline(); print(child.pid, flush=True); child.wait()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_two_sweeps_at_once_time_one_after_the_other_and_survive_a_killed_holder(
    checkpoint: Path, tmp_path: Path
) -> None:
    """A third process holds the lock, and is killed, before the two sweeps can time anything."""
    held = "import time; from qexp.system.machine_lock import timing\nwith timing(): print(flush=True); time.sleep(600)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [
        "model=tiny", f"model.checkpoint={checkpoint}", "latency=standard", "latency.seconds=0.3",
        "latency.warmup_seconds=0.05", "latency.reuse=false", "calib.seed=0,1", "saturation.exact_images=0",
        "per_layer.images=0", TORCHS, "-m",
    ]  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", held], stdout=subprocess.PIPE, env=env) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        sweeps = [
            subprocess.Popen(
                [sys.executable, "-m", "qexp", *arguments, f"outputs={tmp_path / name}"],
                cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
            for name in ("one", "two")
        ]  # fmt: skip
        time.sleep(15)
        holder.kill()
    said = [sweep.communicate(timeout=300)[0] for sweep in sweeps]
    assert [sweep.returncode for sweep in sweeps] == [0, 0], said
    assert any("waiting for" in text for text in said)
    files = [path for name in ("one", "two") for path in (tmp_path / name).glob("sweeps/*/*/latency.json")]
    assert len(files) == 4
    windows = sorted({(row["started"], row["ended"]) for path in files for row in json.loads(path.read_text())["rows"]})
    assert len(windows) == 4
    for (_, ended), (started, _) in itertools.pairwise(windows):
        assert ended <= started
