"""Fixtures that all tests share: configurations of the real conf/, and the command line as a user types it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from hydra import compose, initialize_config_dir

from qexp.config import conversion, schema
from qexp.config.composition import CONF
from tests.helpers import ROOT
from tests.helpers.cli import in_torch
from tests.helpers.hosts import hosts  # noqa: F401
from tests.helpers.stores import empty, line, postgres, server  # noqa: F401

IN_WORKER = "PYTEST_XDIST_WORKER" in os.environ


# By the place in tests/; each takes seconds, by the durations of a whole run.
LONG = (
    "accuracy/", "config/test_code_digest.py", "config/test_composition.py", "config/test_validation.py",
    "export/", "latency/", "launch/test_concurrent.py", "launch/test_job_process.py", "launch/test_rerun.py",
    "launch/test_launchers.py", "launch/test_search.py", "launch/test_study.py",
    "models/test_float_model.py", "models/test_inference.py", "models/test_training.py", "pipeline/test_cache_keys.py",
    "pipeline/test_run.py", "quantize/calibration/test_ranges.py", "quantize/inspection/test_layer_equivalence.py",
    "quantize/saturation/test_emulation.py", "quantize/test_networks.py", "quantize/test_parity.py",
    "quantize/test_shipped_models.py", "quantize/torch_backend/test_ignored_quant_max.py",
    "quantize/torch_backend/test_transposed_convolutions.py", "runtimes/", "test_benchmarks.py", "test_main.py",
    "tracking/",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the long ones."""
    for item in items:
        if item.path.relative_to(ROOT / "tests").as_posix().startswith(LONG):
            item.add_marker(pytest.mark.long)


def pytest_configure() -> None:
    """One thread for each of the workers that share the processors; runs have the threads that their settings say."""
    if IN_WORKER:
        import torch

        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_tracking_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own MLflow settings must not reach a test."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def composed(tmp_path: Path) -> Iterator[Callable[..., schema.Config]]:
    """composed(*overrides) -> the typed configuration that Hydra would hand to a job."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        yield lambda *overrides: conversion.from_hydra(
            compose("config", [f"outputs={tmp_path / 'outputs'}", *in_torch(overrides), *overrides]), str(tmp_path)
        )


@pytest.fixture
def qexp(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """qexp(*arguments) -> `python -m qexp` with them, on the smallest model, in an empty folder."""

    def run(*arguments: str, small: bool = True, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        fast = ["model=tiny", "train=fast", "latency=quick", "latency.seconds=0.2"]
        defaults = [*fast, *in_torch(arguments)] if small else []
        given = {argument.partition("=")[0] for argument in arguments}
        kept = [default for default in defaults if default.partition("=")[0] not in given]
        return subprocess.run(
            [sys.executable, "-m", "qexp", *kept, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained `tiny`, so that no test trains one again, in whatever worker it runs."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if IN_WORKER else base) / "float"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        return folder / "tiny.pt" if (folder / "tiny.pt").exists() else _trained(folder)


def _trained(folder: Path) -> Path:
    import torch

    from qexp.data.loading import load_data
    from qexp.models import float_model

    overrides = ["model=tiny", "train=fast", "train.epochs=6", "train.lr=0.05", f"outputs={folder}"]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = conversion.from_hydra(compose("config", overrides), str(folder))
    data = load_data(config.dataset, folder / "cache")
    made = float_model.load_or_train(config, data)
    torch.save(made.module.state_dict(), folder / "tiny.pt")
    return folder / "tiny.pt"
