"""A repeated run: it has the settings that it had, and is compared with what it was."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qexp import tracking
from qexp.config import identity
from qexp.config.schema import Config
from qexp.errors import ConfigError, InputError
from qexp.launch import rerun
from qexp.metrics import Metric
from qexp.records import RunRecord
from tests.helpers.stores import begin, jobs_of, settings, sweeps_of, table

Composed = Callable[..., Config]
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def store(empty: Path, tmp_path: Path) -> tracking.Store:
    (tmp_path / "outputs").mkdir()
    shutil.copy(empty, tmp_path / "outputs")
    return tracking.connect(settings(), tmp_path / "outputs")


def job(config: Config, alone: bool = True, **overrides: str) -> Any:
    return SimpleNamespace(config=config, alone=alone, overrides=overrides)


def test_rerun_stands_alone(composed: Composed) -> None:
    config = composed("rerun=abc")
    rerun.check(job(config, rerun="abc", outputs="x", study="s", **{"tracking.uri": "u"}))
    rerun.check(job(composed(), alone=False, seed="1"))
    with pytest.raises(ConfigError, match="rerun=abc repeats one run by itself, not in a sweep; leave out -m"):
        rerun.check(job(config, alone=False))
    with pytest.raises(ConfigError, match=r"rerun=abc repeats a run as it was, and latency=off would make it another"):
        rerun.check(job(config, rerun="abc", latency="off"))


def test_the_params_of_a_repeated_run_are_those_that_it_had(composed: Composed) -> None:
    chosen = {group: f"{group}_choice" for group in identity.GROUPS}
    for overrides in (
        {"qconfig": "per_channel", "qconfig.weight.bits": "7", "evaluate.batch_size": "16"},
        {"flow": "dynamic", "calib.batches": "3"},
    ):
        config = composed(*(f"{key}={value}" for key, value in overrides.items()))
        params = identity.params(config, chosen, overrides)
        again = rerun._as_asked({**params, "resolved.overflow": "none"})
        assert identity.params(config, *again) == params


def recorded(store: tracking.Store, config: Config, values: dict[str, Any] | None) -> str:
    """The id of a run with these values as its recorded configuration."""
    with begin(store, "first") as run:
        if values is not None:
            run.log_artifacts({"config.json": values})
    return run.id


def test_a_run_is_repeated_with_its_own_settings_and_recorded_where_it_is_said(
    store: tracking.Store, composed: Composed, tmp_path: Path
) -> None:
    then = composed("calib.batches=7", "study=old", "tracking.name=given", "outputs=elsewhere", "observer.bins=9")
    values = identity.plain(then)
    del values["per_layer"], values["calib"]["seed"]  # as of a version that had neither
    run_id = recorded(store, then, values)
    now = composed(f"rerun={run_id}", "study=new")
    found = rerun.find_earlier(store, _Job(now, {"rerun": run_id, "study": "new"}, tmp_path))
    assert found is not None
    again = found.job.config
    assert identity.config_hash(again) == identity.config_hash(then)
    assert (again.rerun, again.study, again.outputs) == (run_id, "new", now.outputs)
    assert (again.tracking.experiment, again.tracking.name) == ("qexp/digits", "first")
    assert found.added == {"calib.seed": 0, "per_layer.images": now.per_layer.images}
    assert rerun.find_earlier(store, _Job(composed(), {}, tmp_path)) is None


@dataclasses.dataclass(frozen=True)
class _Job:
    config: Config
    overrides: dict[str, str]
    folder: Path
    choices: dict[str, str] = dataclasses.field(default_factory=dict)
    alone: bool = True


def test_what_cannot_be_repeated_is_refused_in_a_sentence(
    store: tracking.Store, composed: Composed, tmp_path: Path
) -> None:
    plain = identity.plain(composed())
    sweep = tracking.open_parent(store, experiment="qexp/digits", name="the sweep", tags={})
    cases = {
        "0" * 32: r"there is no run 0+ in MLflow at sqlite:.*",
        "no/id at all": "there is no run no/id at all in MLflow",
        sweep.id: r"is a whole sweep \('the sweep'\); give the id of one of the runs under it",
        recorded(store, composed(), None): "the run 'first' has no artifact config.json",
        recorded(store, composed(), {**plain, "gone": 1}): "can't take the configuration that the run has: .*gone",
        recorded(store, composed(), {**plain, "flow": "x"}): "can't take the configuration that the run has: .*x",
        recorded(store, composed(), {"calib": 3}): "can't take the configuration that the run has",
    }
    for run_id, message in cases.items():
        given = dataclasses.replace(composed(), rerun=run_id)
        with pytest.raises(InputError, match=message) as refused:
            rerun.find_earlier(store, _Job(given, {"rerun": run_id}, tmp_path))
        assert "\n" not in str(refused.value)


LABELS = np.array([0, 1, 1, 0])


def images(int8: list[list[float]], ids: str = "abcd", fp32: list[list[float]] | None = None) -> dict[str, np.ndarray]:
    return {
        "labels": LABELS, "image_ids": np.array(list(ids)), "int8": np.array(int8), "fp32": np.array(fp32 or int8),
    }  # fmt: skip


ANSWERS = [[2.0, 1.0], [1.0, 2.0], [2.0, 1.0], [2.0, 1.0]]  # right, right, wrong, right


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (images(ANSWERS), "equal, the logits bit for bit"),
        (images([[3.0, 1.0], *ANSWERS[1:]]), "equal on every image, the logits not"),
        (images([*ANSWERS[:2], [1.0, 2.0], ANSWERS[3]]), "1 of 4 images answered otherwise, +1 right"),
        (images([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0], ANSWERS[3]]), "3 of 4 images answered otherwise, -1 right"),
        (images(ANSWERS, ids="abce"), "other images"),
        (images([[*row, 0.0] for row in ANSWERS]), "other images"),
    ],
)
def test_predictions_differ_by_so_many_images(now: dict[str, np.ndarray], said: str) -> None:
    assert rerun.images_told(images(ANSWERS), now, "int8") == said


def test_a_run_of_old_whose_logits_were_no_numbers_is_not_compared_by_class() -> None:
    then = images([[np.nan, 1.0], *ANSWERS[1:]])
    assert rerun.images_told(then, images(ANSWERS), "int8") == "1 of 4 images had NaN or infinity as logits then"


def test_two_runs_are_compared_by_what_they_depend_on_and_by_their_figures() -> None:
    def row(code: str, speedup: float, **tags: str) -> RunRecord:
        metrics = {
            Metric.accuracy_fp32: 0.75,
            Metric.accuracy_int8: 0.5,
            Metric.latency_fp32: 2.0,
            Metric.latency_int8: 2 / speedup,
        }
        metrics |= {Metric.speedup: speedup, Metric.speedup_low: 0.9 * speedup}
        metrics |= {Metric.speedup_high: 1.1 * speedup}
        return RunRecord("id", "name", "FINISHED", metrics=metrics, tags={"code_hash": code, "torch": "2.13", **tags})

    text = rerun.comparison(row("aaa", 2.0), row("bbb", 2.2, cpu="EPYC"), images(ANSWERS), images(ANSWERS))
    cells = {line.split("  ")[0]: line for line in text.splitlines()}
    assert cells["code"].split() == ["code", "aaa", "bbb", "changed"]
    assert cells["torch"].split() == ["torch", "2.13", "2.13"]
    assert cells["CPU"].split() == ["CPU", "?", "EPYC", "unknown"]
    assert cells["accuracy INT8"].split()[2:4] == ["0.5000", "0.5000"]
    assert cells["accuracy INT8"].endswith("equal, the logits bit for bit")
    assert cells["latency INT8, ms"].split()[-3:] == ["1.000", "0.909", "-9.1%"]
    assert "2.00× [1.80, 2.20]" in cells["speedup [95%]"]
    assert cells["speedup [95%]"].endswith("the intervals overlap")
    apart = rerun.comparison(row("aaa", 2.0), row("aaa", 4.0), None, None)
    assert "the intervals are apart" in apart
    nothing = rerun.comparison(RunRecord("id", "n", "FAILED"), row("bbb", 2.0), None, images(ANSWERS))
    assert "speedup" not in nothing
    assert "0.5000" in nothing


@pytest.mark.slow
def test_a_run_is_repeated_and_compared_with_what_it_was(qexp: Command, tmp_path: Path, checkpoint: Path) -> None:
    first = qexp(f"model.checkpoint={checkpoint}", "qconfig=per_tensor,per_channel", "calib.batches=2", "-m")
    assert first.returncode == 0, first.stderr
    (parent,), jobs = sweeps_of(tmp_path), jobs_of(tmp_path)
    again = qexp(f"rerun={jobs[1]['id']}", small=False)
    assert again.returncode == 0, again.stderr
    assert again.stderr == ""
    repeated = jobs_of(tmp_path)[-1]
    assert (repeated["name"], repeated["status"]) == (jobs[1]["name"], "FINISHED")
    assert repeated["tags"]["rerun_of"] == jobs[1]["id"]
    assert "mlflow.parentRunId" not in repeated["tags"]
    assert repeated["tags"]["config_hash"] == jobs[1]["tags"]["config_hash"]
    assert again.stdout.count("equal, the logits bit for bit") == 2
    assert not [line for line in again.stdout.splitlines() if line.endswith(("changed", "unknown"))]
    assert "the intervals" in again.stdout

    before = len(table(tmp_path))
    for arguments, message in (
        ([f"rerun={'0' * 32}"], "there is no run 0000"),
        ([f"rerun={parent['id']}"], "is a whole sweep"),
        ([f"rerun={repeated['id']}", "seed=1"], "seed=1 would make it another"),
        ([f"rerun={repeated['id']}", "-m"], "not in a sweep; leave out -m"),
    ):
        refused = qexp(*arguments, small=False)
        assert refused.returncode == 1
        assert message in refused.stderr
        assert "Traceback" not in refused.stderr + refused.stdout
        assert len(refused.stderr.strip().splitlines()) == 1
    assert len(table(tmp_path)) == before
