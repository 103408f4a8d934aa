"""Hydra's launcher on Ray: a cluster of two nodes, one of which disappears in the middle."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from qexp.config.composition import CONF
from qexp.errors import ConfigError, InputError
from qexp.launch import ray_jobs
from tests.helpers import ROOT
from tests.helpers.cli import SMALL
from tests.helpers.stores import jobs_of, sweeps_of

NEEDS_RAY = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="needs ray (the extra `ray`)")
SECONDS = 180


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster of Ray's with two nodes of one CPU each, and the second node."""
    for name, value in {**ray_jobs.QUIET, **ray_jobs.LOOPBACK}.items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "memory": 10**9, "object_store_memory": 10**8}
    made = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        yield made, made.add_node(**node)
    finally:
        made.shutdown()


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


@NEEDS_RAY
@pytest.mark.slow
def test_a_node_that_disappears_is_named_and_the_same_command_runs_what_is_missing(
    cluster: Any, checkpoint: Path, tmp_path: Path
) -> None:
    ray_cluster, lost = cluster
    command = [
        sys.executable, "-m", "qexp", "-m", *SMALL, f"model.checkpoint={checkpoint}", "calib=small", "study=two",
        "per_layer.images=0", "saturation.exact_images=0", "compute.threads=1", "calib.seed=0,1,2",
        "hydra/launcher=ray", f"hydra.launcher.address={ray_cluster.address}", "hydra.launcher.memory_gb=0.5",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        wait_for(lambda: first.poll() is not None or len(jobs_of(tmp_path)) == 2)
        ray_cluster.remove_node(lost, allow_graceful=False)
        said, _ = first.communicate(timeout=SECONDS)
    finally:
        first.kill()
    assert first.returncode == 1, said
    (killed,) = [run for run in jobs_of(tmp_path) if run["status"] == "KILLED"]
    where = f"process {killed['tags']['pid']} on {killed['tags']['host']}"
    assert killed["tags"]["error"] == f"{where} ended without closing the run."
    assert f"{killed['name']} was lost: {where} ended without closing the run. To run what is missing:" in said
    assert "Traceback" not in said
    assert Counter(run["status"] for run in jobs_of(tmp_path)) == {"FINISHED": 2, "KILLED": 1}
    assert [run["status"] for run in sweeps_of(tmp_path)] == ["FAILED"]

    again = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert "2 of 3 jobs are finished already" in again.stdout
    finished = [run["name"] for run in jobs_of(tmp_path) if run["status"] == "FINISHED"]
    assert sorted(finished) == ["seed=0", "seed=1", "seed=2"]  # nothing twice
    assert [run["status"] for run in sweeps_of(tmp_path)] == ["FINISHED"]
    # What jobs print comes to the terminal with their results, and what they log into their folders.
    lines = re.findall(r"^#\d+  (seed=\d)  ", said + again.stdout, re.MULTILINE)
    assert sorted(lines) == ["seed=0", "seed=1", "seed=2"]
    assert len(list((tmp_path / "outputs" / "sweeps").glob("*/*/qexp.log"))) == 4


def test_its_configuration_states_what_a_job_takes() -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        made = compose("config", ["hydra/launcher=ray", "compute.threads=3"], return_hydra_config=True).hydra.launcher
    assert dict(made) == {
        "_target_": "hydra_plugins.qexp_launcher.RayLauncher", "address": None, "num_cpus": 3, "memory_gb": 4,
    }  # fmt: skip


def test_what_cannot_be_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[object] = [object()]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found[0])
    assert ray_jobs.Cluster(None, 1, 0.5).memory == 500_000_000
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.memory_gb=0: a job takes some"):
        ray_jobs.Cluster(None, 1, 0)
    with pytest.raises(
        ConfigError, match=r"hydra\.launcher\.address=ray://head:10001: give host:port of a cluster's head"
    ):
        ray_jobs.Cluster("ray://head:10001", 1, 4)
    with pytest.raises(InputError, match=r"address=127\.0\.0\.1:1: no cluster of Ray's answers there; give host:port"):
        ray_jobs.Cluster("127.0.0.1:1", 1, 4).check()
    found[0] = None
    with pytest.raises(ConfigError, match=r"Ray is not installed; install it by pip install 'qexp\[ray\]'"):
        ray_jobs.Cluster(None, 1, 4)


def test_jobs_that_fit_on_no_node_are_said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    gone = {"Alive": False, "Resources": {"CPU": 8.0, "memory": 8e9}}
    small = {"Alive": True, "Resources": {"CPU": 2.0, "memory": 3e9}}
    cluster = ray_jobs.Cluster("auto", 2, 4)
    ray_jobs._log_nodes(cluster, [small, {"Alive": True, "Resources": {"CPU": 2.0, "memory": 5e9}}])
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    ray_jobs._log_nodes(cluster, [small, gone])
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.getMessage().startswith("no node of Ray's has 2 CPUs and 4 GB, and jobs wait until one has;")


def test_a_worker_gets_the_folder_and_the_variables_of_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "of the sweep")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    place = ray_jobs.Place.here()
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "of the node")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    place.enter()
    assert (Path.cwd(), os.environ["MLFLOW_TRACKING_TOKEN"]) == (tmp_path, "of the sweep")
    assert "OMP_NUM_THREADS" not in os.environ
