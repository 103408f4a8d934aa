"""A race, as a user starts it: what is stopped, said, resumed, and evaluated after all where racing is left out."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qexp import tracking
from qexp.config import identity
from qexp.config.schema import Config
from qexp.launch import study
from qexp.metrics import Metric
from qexp.records import RACED_FOR_TAG, RACING_TAG, RunRecord
from tests.helpers.stores import settings


def runs(folder: Path) -> tuple[list[RunRecord], dict[str, float]]:
    """The study's runs, those that have finished first, and the metrics of its sweep's own run."""
    store = tracking.connect(settings(), folder / "outputs")
    found = tracking.of_study(store, "race", ["qexp/digits"])
    (parent,) = (one for one in found if tracking.SWEEP_TAG in one.tags)
    jobs = [one for one in found if one is not parent]
    return sorted(jobs, key=lambda one: one.status), dict(parent.metrics)


Command = Callable[..., subprocess.CompletedProcess[str]]


def test_a_stop_holds_for_the_question_that_it_was_made_by(composed: Callable[..., Config]) -> None:
    now = composed("racing=true", "dataset.margin=0.01")
    tags = {RACING_TAG: "futility", RACED_FOR_TAG: identity.raced_for(now)}
    stopped, finished = RunRecord("a", "a", "KILLED", tags=tags), RunRecord("b", "b", "FINISHED")
    same = [now, composed("report.margin=0.01"), composed("dataset.margin=0.01", "report.objective=smallest")]
    others = [composed("report.margin=0.02"), composed("dataset.margin=0.01", "report.runtime=eager")]
    assert [study._asked_otherwise(stopped, config) for config in same] == [[]] * 3
    assert all(study._asked_otherwise(stopped, config) for config in others)
    assert not any(study._asked_otherwise(finished, config) for config in others)


@pytest.mark.slow
def test_jobs_of_a_launcher_race_too(qexp: Command, tmp_path: Path, checkpoint: Path) -> None:
    """In joblib's workers; those of others find each other in the same way, by a folder."""
    raced = qexp(
        "-m", f"model.checkpoint={checkpoint}", "latency=off", "study=race", "report.margin=0.03", "racing=true",
        "runtimes=[torchscript]", "qconfig.weight.bits=8,2", "compute.threads=1", "hydra/launcher=joblib",
        "calib=small", "per_layer.images=0", "saturation.exact_images=0",
    )  # fmt: skip
    assert raced.returncode == 0, raced.stderr
    (good, bad), of_sweep = runs(tmp_path)
    assert (good.status, bad.status) == ("FINISHED", "KILLED")
    assert "error" not in bad.tags  # a worker that has lost a job leaves one
    assert of_sweep == {"jobs/finished": 1, "jobs/failed": 0, "jobs/killed": 0, "jobs/stopped": 1}
    assert f"stopped by racing: after {bad.metrics[Metric.race_images]:.0f} of 899 images (futility)" in raced.stdout
    assert len(list((tmp_path / "outputs" / "racing").glob("*/*/*.npz"))) == 1  # the good one's, for others to read


@pytest.mark.slow
def test_a_planted_bad_setting_is_stopped_shown_and_not_run_again(
    qexp: Command, tmp_path: Path, checkpoint: Path
) -> None:
    given = [
        f"model.checkpoint={checkpoint}", "latency=off", "study=race", "report.margin=0.03",
        "runtimes=[torchscript]", "qconfig.weight.bits=8,2",
    ]  # fmt: skip
    alone = qexp("racing=true")
    assert alone.returncode == 1
    assert "racing=true: only the runs of a sweep can be compared" in alone.stderr
    raced = qexp("-m", *given, "racing=true")
    assert raced.returncode == 0, raced.stderr
    (good, bad), of_sweep = runs(tmp_path)
    assert (good.status, bad.status) == ("FINISHED", "KILLED")
    assert bad.tags[RACING_TAG] == "futility"
    images = bad.metrics[Metric.race_images]
    assert images < bad.metrics[Metric.race_all_images] == good.metrics[Metric.images]
    assert not [name for name in bad.metrics if not name.startswith("racing/")]
    assert of_sweep == {"jobs/finished": 1, "jobs/failed": 0, "jobs/killed": 0, "jobs/stopped": 1}
    said = f"stopped by racing: after {images:.0f} of 899 images (futility)"
    assert said in raced.stdout
    (page,) = (tmp_path / "outputs" / "reports").glob("*/report.html")
    assert said in page.read_text()
    assert "1 stopped by racing, with" in page.read_text()

    again = qexp("-m", *given, "racing=true")
    assert "2 of 2 jobs are finished already" in again.stderr + again.stdout
    assert said in page.read_text()
    assert len(runs(tmp_path)[0]) == 2

    whole = qexp("-m", *given)
    assert whole.returncode == 0, whole.stderr
    assert "1 of 2 jobs are finished already" in whole.stderr + whole.stdout
    assert [one.status for one in runs(tmp_path)[0]] == ["FINISHED", "FINISHED", "KILLED"]
    assert "stopped by racing" not in page.read_text()
    # What had been seen is what all images say of the first in the race's order.
    (file,) = (
        one for one in (tmp_path / "outputs" / "sweeps").rglob("predictions.npz")
        if json.loads((one.parent / "config.json").read_text())["qconfig"]["weight"]["bits"] == 2
    )  # fmt: skip
    kept = np.load(file)
    order = np.random.default_rng(0).permutation(len(kept["labels"]))[: int(images)]
    fp32, int8 = ((kept[name].argmax(1) == kept["labels"])[order] for name in ("fp32", "int8"))
    assert bad.metrics[Metric.race_fp32_only.of("torchscript")] == np.sum(fp32 & ~int8)
