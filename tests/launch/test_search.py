"""A search: refused in a sentence, and the same whether it was stopped or not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from qexp.errors import ConfigError, InputError
from qexp.launch import search, trials
from qexp.launch.goal import Goal, Outcome
from qexp.launch.search_space import SearchSpace, space_of
from qexp.launch.trials import Trials
from qexp.system import credentials
from tests.helpers import ROOT
from tests.helpers.jobs import wait_until
from tests.helpers.planted import question
from tests.helpers.stores import jobs_of, sweeps_of

Command = Callable[..., subprocess.CompletedProcess[str]]

TRIALS = 40  # of the search that is killed
SEARCH = ("hydra/sweeper=qexp_optuna", "latency=off", "-m")


def test_a_value_that_can_t_run_is_refused_before_any_run(qexp: Command, tmp_path: Path) -> None:
    refused = qexp(*SEARCH, "runtimes=auto", "qconfig.weight.bits=range(15,19)")
    assert refused.returncode == 1
    assert refused.stderr == (
        "qconfig.weight.bits=17: must be in 2..16; INT8 kernels hold no more than 8, and more are simulated in float.\n"
    )
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_trials": 0}, r"hydra.sweeper.n_trials=0: must be a whole number, 1 or more\."),
        ({"n_jobs": 1.5}, r"hydra.sweeper.n_jobs=1.5: must be a whole number, 1 or more\."),
        ({"sampler": "grid"}, r"hydra.sweeper.sampler=grid: must be one of tpe, nsgaii, random\."),
    ],
)
def test_settings_that_can_t_work_are_refused(wrong: dict[str, Any], message: str) -> None:
    given = {"n_trials": 4, "n_jobs": 2, "sampler": "tpe", "seed": 0, "storage": "sqlite://"}
    assert search.settings_from(given, trials.SAMPLERS) == search.Settings(**given)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        search.settings_from({**given, **wrong}, trials.SAMPLERS)


def space(*texts: str) -> SearchSpace:
    return space_of(OverridesParser.create().parse_overrides(list(texts)))


def test_a_storage_that_can_t_be_used_is_refused_without_its_password() -> None:
    credentials.learn(["hydra.sweeper.storage=nothing://me:secret@host/db"])
    with pytest.raises(InputError, match=r"hydra.sweeper.storage=nothing://.*: Optuna can't use it") as refused:
        Trials("nothing://me:secret@host/db", "s", space("seed=1,2"), Goal(question(), False), "tpe", 0)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("sampler", list(trials.SAMPLERS))
def test_a_search_finds_the_best_within_the_bound(sampler: str) -> None:
    """Values whose best is known: (x - 7)² + group, where x over 6 breaks the bound."""
    found = Trials("sqlite:///:memory:", "s", space("x=range(10)", "g=0,1"), Goal(question(), True), sampler, 1)
    results = []
    for _ in range(40):
        asked = found.ask()
        x, g = asked.values["x"], int(asked.values["g"])
        found.begin(asked, f"{x} {g}")
        results.append(((x - 7) ** 2 + g, float(x - 6)))
        found.tell(asked, Outcome(*results[-1]))
    assert min(value for value, _ in results) == 0  # beyond the bound
    assert min(value for value, excess in results if excess <= 0) == 1
    assert found._study.best_value == 1


@pytest.mark.parametrize("sampler", list(trials.SAMPLERS))
def test_a_sampler_that_proposes_the_same_again_and_again_goes_on_to_new_ones(sampler: str) -> None:
    """40 of 48 combinations; by itself TPE finds no new one after 21."""
    texts = ("x=range(6)", "g=0,1", "h=range(4)")
    found = Trials("sqlite:///:memory:", "s", space(*texts), Goal(question(), False), sampler, 5)
    seen: set[tuple[Any, ...]] = set()
    proposals = 0
    while len(seen) < 40 and proposals < search.PATIENCE:
        asked = found.ask()
        x, g, h = asked.values["x"], int(asked.values["g"]), asked.values["h"]
        values = (x, g, h)
        if values in seen:
            found.repeat(asked)
            proposals += 1
            continue
        seen.add(values)
        proposals = 0
        found.begin(asked, str(values))
        found.tell(asked, Outcome(x + 0.3 * g, None))
    assert len(seen) == 40


def test_without_optuna_the_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(search.importlib.util, "find_spec", lambda name: None)
    nothing: Any = None
    with pytest.raises(SystemExit):
        search.run_search(nothing, [], [], nothing, nothing, {})
    assert capsys.readouterr().err == (
        "hydra/sweeper=qexp_optuna: Optuna is not installed; install it by pip install 'qexp[optuna]', or leave out "
        "hydra/sweeper to run all combinations.\n"
    )


def kept_trials(folder: Path) -> list[tuple[str, dict[str, Any], float | None]]:
    """The state, values and result of each trial in a folder's storage, which has one search."""
    (found,) = optuna.get_all_study_summaries(f"sqlite:///{folder}/outputs/optuna.db")
    study = optuna.load_study(study_name=found.study_name, storage=f"sqlite:///{folder}/outputs/optuna.db")
    return [(trial.state.name, trial.params, trial.value) for trial in study.get_trials()]


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_as_if_it_had_not_been(checkpoint: Path, tmp_path: Path) -> None:
    """The same trials with the same results, each run once, under one parent run; then on to the end."""
    given = [
        "model=tiny", f"model.checkpoint={checkpoint}", "per_layer.images=0", "saturation.exact_images=0", "study=s",
        "calib.batch_size=4", "observer=minmax,mse", "calib.batches=range(1,5)", "qconfig.weight.bits=range(3,9)",
        *SEARCH, "hydra.sweeper.seed=5", "runtimes=[torchscript]", "compute.threads=1", "dataset.resize=16",
        "dataset.image_size=16",
    ]  # fmt: skip

    def start(folder: Path, count: int) -> subprocess.Popen[str]:
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "qexp", *given, f"hydra.sweeper.n_trials={count}"]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=folder, env=env, **output)  # type: ignore[call-overload]

    def finished(folder: Path) -> list[str]:
        return [run["tags"]["config_hash"] for run in jobs_of(folder, "s") if run["status"] == "FINISHED"]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    first = start(killed, TRIALS)
    wait_until(lambda: len(finished(killed)) >= 3 or first.poll() is not None, seconds=300)
    first.kill()
    first.communicate()
    assert 3 <= len(finished(killed)) < 6
    for folder, count in ((whole, 6), (killed, TRIALS)):
        process = start(folder, count)
        said, _ = process.communicate(timeout=900)
        assert process.returncode == 0, said
        assert Counter(finished(folder)) == dict.fromkeys(finished(folder), 1), said
        assert len(finished(folder)) == count
        assert [run["status"] for run in sweeps_of(folder)] == ["FINISHED"]
        assert f"{count} candidates" in said
    assert kept_trials(killed)[: len(kept_trials(whole))] == kept_trials(whole)
    assert set(finished(killed)) > set(finished(whole))
