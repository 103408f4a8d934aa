"""A search: refused in a sentence, and the same whether it was stopped or not."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from qexp.errors import ConfigError, InputError
from qexp.launch import search, trials
from qexp.launch.goal import Goal, Outcome
from qexp.launch.search_space import SearchSpace, space_of
from qexp.launch.trials import Trials
from qexp.system import credentials
from tests.helpers.planted import question

Command = Callable[..., subprocess.CompletedProcess[str]]

SEARCH = ("hydra/sweeper=qexp_optuna", "latency=off", "-m")


def test_a_value_that_can_t_run_is_refused_before_any_run(qexp: Command, tmp_path: Path) -> None:
    refused = qexp(*SEARCH, "qconfig.weight.bits=range(4,12)")
    assert refused.returncode == 1
    assert refused.stderr == "qconfig.weight.bits=9: must be in 2..8; INT8 kernels hold no more than 8 bits.\n"
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
