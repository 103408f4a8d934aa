"""A sweep's jobs are composed as Hydra composes them, and what Hydra can't say in a sentence is refused before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode

from qexp import sweep
from qexp.compose import CONF, Composer, Composition, check_choices
from qexp.errors import ConfigError


@pytest.fixture
def loader() -> Iterator[Any]:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        yield GlobalHydra.instance().config_loader()


def master(loader: Any, *overrides: str) -> Any:
    return loader.load_configuration("config", list(overrides), run_mode=RunMode.MULTIRUN)


JOBS = (
    ["calib.batches=4"],
    ["calib.batches=16", "seed=${calib.batches}"],
    ["calib.batches=4", "calib=large"],
    ["calib=large", "calib.batches=4"],
    ["calib.batches=2", "calib.batches=3"],
    ["calib={batches: 5}", "calib.seed=1"],
    ["calib.seed=1", "calib={batches: 5, seed: 2}"],
    ["qconfig=per_tensor", "qconfig.weight.bits=7"],
    ["qconfig=per_tensor", "engine=onednn"],
    ["engine=onednn"],
    ["experiment=granularity"],
    ["model=resnet20", "+model.num_blocks=3", "tracking.name='a b, c'"],
    ["model=custom", "model._target_=tests.quantizable.Block", "~dataset.margin"],
    ["latency.threads=[1,2]", "study=null"],
    ["flow=fx", "target=avx2", "fusion=false", "latency.reuse=true", "qconfig.weight.scheme=asymmetric"],
)


def test_jobs_are_what_hydra_composes_whichever_came_before(loader: Any) -> None:
    given = master(loader, "outputs=here")
    composer = Composer(given, loader)
    for overrides in (*JOBS, *reversed(JOBS)):
        ours = sweep.job_from(composer(["outputs=here", *overrides]))
        hydras = sweep.job_from(Composition.of(loader.load_sweep_config(given, ["outputs=here", *overrides])))
        assert ours == hydras, overrides
        assert repr(ours.config) == repr(hydras.config)  # an enum equals its text
        assert ours.params == hydras.params


def test_a_run_is_named_for_what_tells_it_from_another(loader: Any) -> None:
    composer = Composer(master(loader, "outputs=here"), loader)
    names = [sweep.job_from(composer(["outputs=here", f"calib={calib}"])).name for calib in ("small", "all")]
    assert names == ["resnet18 digits per_channel minmax 8", "resnet18 digits per_channel minmax all"]


@pytest.mark.parametrize("overrides", [["calib.bathces=4"], ["calib=none_such"], ["calib.batches=many"], ["~nothing"]])
def test_what_hydra_refuses_is_refused_in_its_words(loader: Any, overrides: list[str]) -> None:
    given = master(loader)
    composer = Composer(given, loader)
    composer(["calib.batches=4"])
    with pytest.raises(HydraException) as hydras:
        loader.load_sweep_config(given, overrides)
    with pytest.raises(HydraException) as ours:
        composer(overrides)
    assert str(ours.value) == str(hydras.value)


@pytest.mark.parametrize("argument", ["calib=32", "calib=null", "model=1.5", "observer=mse,true", "calib=range(3)"])
def test_a_value_in_place_of_a_choice_is_refused(argument: str) -> None:
    with pytest.raises(ConfigError, match=f"chosen by name, of .*a single one .* {argument.partition('=')[0]}.NAME"):
        check_choices(["-m", argument])


def test_what_may_be_a_choice_is_left_to_hydra() -> None:
    check_choices(["-m", "calib=small,large", "calib=glob(*)", "calib.batches=3", "model={a: 1}", "calib=", "calib='a"])
