"""A sweep's jobs are composed as Hydra composes them, and what Hydra can't say in a sentence is refused before it."""

from __future__ import annotations

import itertools
import random
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from qexp.config import conversion, identity
from qexp.config.composition import (
    CONF,
    Composer,
    Composition,
    check_choices,
    check_quotes,
    combinations,
    defaults,
    quoted,
)  # fmt: skip
from qexp.config.error_messages import message_for
from qexp.config.schema import Config, FlowName, RuntimeName, cache_folder
from qexp.errors import ConfigError
from qexp.launch import planning
from qexp.launch.job import job_from


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
    ["model=custom", "model._target_=tests.helpers.quantizable.Block", "~dataset.margin"],
    ["latency.threads=[1,2]", "study=null"],
    ["flow=fx", "target=avx2", "fusion=false", "latency.reuse=true", "qconfig.weight.scheme=asymmetric"],
)


def test_jobs_are_what_hydra_composes_whichever_came_before(loader: Any) -> None:
    given = master(loader, "outputs=here")
    composer = Composer(given, loader)
    for overrides in (*JOBS, *reversed(JOBS)):
        ours = job_from(composer(["outputs=here", *overrides]))
        hydras = job_from(Composition.of(loader.load_sweep_config(given, ["outputs=here", *overrides])))
        assert ours == hydras, overrides
        assert repr(ours.config) == repr(hydras.config)  # an enum equals its text
        assert ours.params == hydras.params


def test_a_run_is_named_for_what_tells_it_from_another(loader: Any) -> None:
    composer = Composer(master(loader, "outputs=here"), loader)
    names = [job_from(composer(["outputs=here", f"calib={calib}"])).name for calib in ("small", "all")]
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


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("seed=${oc.env:QEXP_NOPE}", "seed: the environment variable QEXP_NOPE is not set; set it, or say what holds "
         "without it: ${oc.env:QEXP_NOPE,VALUE}."),
        ("dataset.root=a/${oc.env:QEXP_NOPE}", "dataset.root: the environment variable QEXP_NOPE is not set; "),
        ("study=${nope}", "study: ${nope} is no setting; "),
        ("tracking.uri=${nope:1}", "tracking.uri: ${nope:…} is unknown; "),
        ("seed=${oc.env:QEXP_TEXT}", "seed can't be resolved: "),
    ],
)  # fmt: skip
def test_what_an_interpolation_lacks_is_said_in_a_sentence(
    loader: Any, monkeypatch: pytest.MonkeyPatch, override: str, sentence: str
) -> None:
    monkeypatch.delenv("QEXP_NOPE", raising=False)
    monkeypatch.setenv("QEXP_TEXT", "text")
    with pytest.raises(ConfigError) as refused:
        conversion.from_hydra(compose("config", [override]), ".")
    assert str(refused.value).startswith(sentence)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("item", "said"),
    [("override /latency: off", "override /latency: False"), ("override /calib: 1", "override /calib: 1"), ("7", "7")],
)
def test_a_choice_that_yaml_reads_as_a_value_is_named_with_its_file(
    loader: Any, tmp_path: Path, item: str, said: str
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\ndefaults:\n  - {item}\n")
    with pytest.raises(ValueError, match="Unsupported") as hydras:
        compose("config", [f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"])
    sentence = message_for(hydras.value)
    assert sentence is not None
    assert sentence.startswith(f"experiment/mine: `{said}` in its defaults list is no choice, ")
    assert sentence.endswith('write it in quotes, as "off".')
    assert message_for(ValueError("of something else")) is None


# ------------------------------------------------------------------- a sweep composes what its single runs compose

# What may be typed, and what stands in its place in each single run; one value: it lists none.
TYPED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("engine=x86,fbgemm", ("engine=x86", "engine=fbgemm")),
    ("engine=onednn", ("engine=onednn",)),
    ("qconfig=per_tensor,per_channel", ("qconfig=per_tensor", "qconfig=per_channel")),
    ("qconfig=per_tensor_symmetric", ("qconfig=per_tensor_symmetric",)),
    ("qconfig={range_after_clamp: false}", ("qconfig={range_after_clamp: false}",)),
    ("qconfig={weight: {bits: 7}}", ("qconfig={weight: {bits: 7}}",)),
    ("calib={batches: 4}", ("calib={batches: 4}",)),
    ("calib={seed: 7}", ("calib={seed: 7}",)),
    ("calib={seed: 1},{batches: 3}", ("calib={seed: 1}", "calib={batches: 3}")),
    ("calib=small", ("calib=small",)),
    ("calib=glob([s*,m*])", ("calib=medium", "calib=small")),
    ("calib=glob(*,exclude=[a*,l*,m*])", ("calib=small",)),
    ("calib.batches=2", ("calib.batches=2",)),
    ("calib.batches=1,null", ("calib.batches=1", "calib.batches=null")),
    ("calib.batches=choice('3','4')", ("calib.batches='3'", "calib.batches='4'")),
    ("calib.seed=range(2)", ("calib.seed=0", "calib.seed=1")),
    ("calib.seed=sort(3,1)", ("calib.seed=1", "calib.seed=3")),
    ("calib.seed=tag(a,b,choice(5,6))", ("calib.seed=5", "calib.seed=6")),
    ("calib.seed=int(1.0)", ("calib.seed=1",)),
    ("seed=${calib.seed},3", ("seed=${calib.seed}", "seed=3")),
    ("++seed=1,2", ("++seed=1", "++seed=2")),
    ("train.lr=range(0.1,0.3,0.1)", ("train.lr=0.1", "train.lr=0.2")),
    ("train.lr=1e-3,0.5", ("train.lr=1e-3", "train.lr=0.5")),
    ("latency.threads=[1,2],[1]", ("latency.threads=[1,2]", "latency.threads=[1]")),
    ("latency={threads: [2], reuse: 'true'}", ("latency={threads: [2], reuse: 'true'}",)),
    ("latency.reuse=choice('true',true)", ("latency.reuse='true'", "latency.reuse=true")),
    ("study='a,b'", ("study='a,b'",)),
    ("study='it\\'s','x=1, [2] {3: 4}'", ("study='it\\'s'", "study='x=1, [2] {3: 4}'")),
    ("study=choice(\"it's\",'null','${engine}','')", (
        "study='it\\'s'", "study='null'", "study=${engine}", "study=''",
    )),
    ("study=a\\,b,c\\ \\=d", ("study=a\\,b", "study=c\\ \\=d")),
    ("study='s-${engine}-${qexp.by_engine:${engine},{x86:1},2}'", (
        "study='s-${engine}-${qexp.by_engine:${engine},{x86:1},2}'",
    )),
    ("study=/a/b c.pt,\\\\d", ("study=/a/b c.pt", "study=\\\\d")),
    ("study=", ("study=",)),
    ("+model.width=4,8", ("+model.width=4", "+model.width=8")),
    ("++model.width=16", ("++model.width=16",)),
    ("model.width=2", ("model.width=2",)),
    ("+model.sizes=[1,2],[a,'b,c']", ("+model.sizes=[1,2]", "+model.sizes=[a,'b,c']")),
    ("+model={a: 1, b: {c: 'null'}}", ("+model={a: 1, b: {c: 'null'}}",)),
    ("~dataset.margin", ("~dataset.margin",)),
    ("~dataset.margin=0.02", ("~dataset.margin=0.02",)),
    ("~train", ("~train",)),
    ("observer=mse,entropy", ("observer=mse", "observer=entropy")),
    ("+observer@model.observer=mse,minmax", ("+observer@model.observer=mse", "+observer@model.observer=minmax")),
    ("observer@model.observer=entropy", ("observer@model.observer=entropy",)),
    ("hydra={job: {name: other}}", ("hydra={job: {name: other}}",)),
)  # fmt: skip


def outcome(make: Any) -> Any:
    """The settings as they stand, unresolved; where they are refused, Hydra's words, without the override that was
    refused, which may be written in two ways."""
    try:
        return OmegaConf.to_container(make())
    except HydraException as error:
        return type(error).__name__


def check_law(loader: Any, given: Sequence[tuple[str, tuple[str, ...]]]) -> int:
    """In a sweep of what is typed, each job is what Hydra's own `compose` makes of the overrides, with one value for
    each; the number of jobs that aren't refused."""
    composer = Composer(master(loader), loader)
    jobs = combinations(composer.parse([typed for typed, _ in given]))
    single = list(itertools.product(*(values for _, values in given)))
    assert len(jobs) == len(single)
    taken = 0
    for ours, theirs in zip(jobs, single, strict=True):
        composed = outcome(lambda ours=ours: composer(ours).task)
        assert composed == outcome(lambda theirs=theirs: compose("config", list(theirs))), (ours, theirs)
        taken += isinstance(composed, dict)
    return taken


@pytest.mark.parametrize("given", TYPED, ids=[typed for typed, _ in TYPED])
def test_each_way_to_list_values_composes_what_single_runs_compose(
    loader: Any, given: tuple[str, tuple[str, ...]]
) -> None:
    # There must be something to override.
    needs = {"model.width=2": "+model.width=1", "observer@model.observer=entropy": "+observer@model.observer=mse"}
    before = [(one, (one,)) for one in [needs.get(given[0])] if one]
    assert check_law(loader, [*before, given]) == len(given[1])


REPEATED = (
    ["engine=x86,fbgemm", "calib={batches: 4}", "calib={seed: 7}"],
    ["engine=x86,fbgemm", "qconfig=per_tensor_symmetric", "qconfig={range_after_clamp: false}"],
    ["qconfig={range_after_clamp: false}", "qconfig=per_tensor,per_channel", "qconfig={weight: {bits: 7}}"],
    ["calib.batches=2", "calib={seed: 1},{batches: 3}", "calib=small"],
    ["engine=x86,fbgemm", "engine=onednn"],
    ["+model.width=4,8", "model.width=2"],
)


@pytest.mark.parametrize("typed", REPEATED)
def test_a_key_that_is_typed_twice_counts_twice(loader: Any, typed: list[str]) -> None:
    values = dict(TYPED)
    given = [(one, values[one]) for one in typed]
    assert check_law(loader, given) > 0


@pytest.mark.slow
def test_any_overrides_in_any_order_compose_what_single_runs_compose(loader: Any) -> None:
    chance, taken = random.Random(24), 0
    for _ in range(30):
        given = chance.choices(TYPED, k=chance.randint(2, 5))
        while len(list(itertools.product(*(values for _, values in given)))) > 8:
            given.pop()
        taken += check_law(loader, given)
    assert taken > 30


def test_shuffled_values_are_the_same_ones(loader: Any) -> None:
    composer = Composer(master(loader), loader)
    for typed in ("calib.seed=shuffle(range(5))", "calib.seed=shuffle(0,1,2,3,4)"):
        assert sorted(map(tuple, combinations(composer.parse([typed])))) == [(f"calib.seed={n}",) for n in range(5)]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("calib.seed=interval(0,1)", r"calib.seed=interval\(0,1\): an interval can't be gone through .*=range\("),
        ("calib=glob(x*)", r"calib=glob\(x\*\) lists no value; "),
        ("calib.seed=range(3,1)", r"calib.seed=range\(3,1\) lists no value; "),
        ("calib.seed=range(1,2,0)", r"calib.seed=range\(1,2,0\) can't be gone through: "),
        ("calib.seed=range(1.0,2.0,0)", r"calib.seed=range\(1.0,2.0,0\) can't be gone through: "),
    ],
)
def test_what_lists_nothing_is_refused(loader: Any, typed: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        combinations(Composer(master(loader), loader).parse(["engine=x86,fbgemm", typed]))


def test_the_command_line_stands_in_place_of_a_studys_own_overrides_of_the_same(loader: Any) -> None:
    """As with Hydra's own sweeper; settings that are merged stand beside the choice that the study makes."""
    composer = Composer(master(loader, "experiment=granularity"), loader)

    def planned(*typed: str) -> list[tuple[str, int, bool]]:
        params = ["qconfig=per_tensor,per_channel", "calib.seed=0,1,2"]
        configs = [item.job.config for item in planning.plan(composer, params, ["experiment=granularity", *typed])]
        return [(str(c.qconfig.weight.granularity), c.calib.seed, c.qconfig.range_after_clamp) for c in configs]

    both, three = ("per_tensor", "per_channel"), range(3)
    assert planned() == [(one, seed, True) for one in both for seed in three]
    assert planned("calib.seed=5") == [(one, 5, True) for one in both]
    assert planned("qconfig=per_channel", "calib.seed=5,6") == [("per_channel", seed, True) for seed in (5, 6)]
    assert planned("qconfig={range_after_clamp: false}") == [(one, seed, False) for one in both for seed in three]


@pytest.mark.parametrize("model", sorted(path.stem for path in (CONF / "model").glob("*.yaml")))
def test_what_to_ship_is_found_with_few_jobs_which_are_legal_for_every_model(loader: Any, model: str) -> None:
    """With every runtime at hand here, in the flow that takes any traceable model, and with the folder at its end."""
    target = ["model._target_=tests.helpers.quantizable.Block"] if model == "custom" else []
    given = ["experiment=ship", f"model={model}", *target]
    whole = master(loader, *given)
    params = {str(name): str(values) for name, values in whole.hydra.sweeper.params.items()}
    planned = planning.plan(Composer(whole, loader), [f"{name}={one}" for name, one in params.items()], given)
    combined = list(itertools.product(*(values.split(",") for values in params.values())))
    assert 2 <= len(planned) == len(combined) <= 24
    for config in (item.job.config for item in planned):
        assert (config.flow, config.runtimes) == (FlowName.fx, RuntimeName.auto())
        assert config.report.export
        assert config.report.auto


def test_jobs_are_named_by_what_counts_and_no_two_alike(loader: Any) -> None:
    composer = Composer(master(loader), loader)

    def named(*typed: str) -> list[str]:
        return [item.name for item in planning.plan(composer, [], typed)]

    assert named("engine=x86,fbgemm", "calib={batches: 4}") == ["x86", "fbgemm"]
    assert named("engine=x86,fbgemm", "engine=onednn,qnnpack") == ["onednn", "qnnpack"]
    assert named("calib={batches: 4},{batches: 8}") == ["{batches:4}", "{batches:8}"]
    twins = [f"+model.path=/{folder}/net" for folder in "ab"]
    assert named("+model.path=/a/net,/b/net") == twins


def test_what_is_merged_into_a_group_is_among_the_params(loader: Any) -> None:
    composer = Composer(master(loader), loader)
    params = job_from(composer(["calib={batches: 4}", "latency={seconds: 2}"])).params
    assert (params["calib"], params["calib.batches"]) == ("medium*", "4")
    assert (params["latency"], params["latency.seconds"]) == ("standard*", "2.0")


def test_a_setting_may_refer_to_what_hydra_knows(loader: Any) -> None:
    job = job_from(Composer(master(loader), loader)(["study=of-${hydra:job.name}", "outputs=${hydra:runtime.cwd}"]))
    assert (job.config.study, job.config.outputs) == ("of-qexp", str(Path.cwd()))


def test_groups_of_a_folder_that_the_search_path_adds_are_choices(loader: Any, tmp_path: Path) -> None:
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra" / "one.yaml").write_text("# @package _global_\nseed: 5\n")
    searchpath = f"hydra.searchpath=[file://{tmp_path}]"
    composer = Composer(master(loader, searchpath), loader)
    assert composer(["+extra=one"]).task == compose("config", [searchpath, "+extra=one"])
    assert composer(["+extra=one"]).task.seed == 5


@pytest.mark.parametrize("text", ["per_channel 32", "it's", "x=1, [2] {3: 4}", "é {oc}", "a\\", "null", "'"])
def test_a_quoted_text_is_read_back_by_hydra_as_it_was(text: str) -> None:
    (override,) = OverridesParser.create().parse_overrides([f"tracking.name={quoted(text)}"])
    assert override.value() == text


def typed(shell: str) -> list[str]:
    """The arguments that the shell makes of a line."""
    return shlex.split(shell)


@pytest.mark.parametrize(
    "path",
    ["lr=0.1/net.pt", "a(1).pt", "a[1].pt", "ä.pt", "日本/net.pt", "it's.pt", 'a"b.pt', "~/a#b=\\.pt", "a=b,c.pt"],
)
def test_a_value_that_hydra_takes_for_grammar_is_refused_in_quotes_that_work(loader: Any, path: str) -> None:
    with pytest.raises(ConfigError, match="put the value into quotes") as refused:
        check_quotes(["seed=1", f"model.checkpoint={path}"])
    said = str(refused.value)
    assert "\n" not in said
    (argument,) = typed(said.split("into the shell's: ")[1])
    check_quotes([argument])
    assert loader.load_configuration("config", [argument], run_mode=RunMode.RUN).model.checkpoint == path


def test_of_a_sweeps_values_each_has_its_quotes(loader: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        check_quotes(["-m", "model.checkpoint=net.pt,runs/lr=0.1/net.pt"])
    (argument,) = typed(str(refused.value).split("into the shell's: ")[1])
    assert [values[0] for values in combinations(OverridesParser.create().parse_overrides([argument]))] == [
        "model.checkpoint=net.pt", 'model.checkpoint="runs/lr=0.1/net.pt"',
    ]  # fmt: skip


def test_what_hydra_reads_or_refuses_by_itself_is_left_to_it_and_no_password_is_shown() -> None:
    check_quotes(
        ["-m", "--config-dir", "a=b", "model.checkpoint='a=b'", "seed=1,2", "calib=", "x=[1,2", "x=range(1,", "x"],
    )
    with pytest.raises(ConfigError) as refused:
        check_quotes(["tracking.uri=postgresql://me:secret@host/db?sslmode=require"])
    assert "secret" not in str(refused.value)


def test_the_defaults_are_the_params_of_a_run_without_overrides(composed: Callable[..., Config]) -> None:
    params, found = identity.params(composed("runtimes=auto"), defaults(), {}), defaults()
    assert {*identity.GROUPS, "qconfig.overflow", "calib.batches", "engine"} <= found.keys()
    for name in found.keys() & params.keys():
        # A number is written as 3 and has the type that says 3.0.
        same = {params[name], params[name].removesuffix(".0")}
        assert found[name] in same or params[name] == identity.NOT_APPLICABLE, name


def test_the_cache_is_in_outputs_or_where_it_is_put(composed: Callable[..., Config], tmp_path: Path) -> None:
    assert cache_folder(composed()) == tmp_path / "outputs" / "cache"
    assert cache_folder(composed("cache.folder=mine")) == tmp_path / "mine"
    assert cache_folder(composed("cache.folder=/var/tmp/mine", "cache.enabled=false")) is None
