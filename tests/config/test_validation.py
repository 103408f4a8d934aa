"""The schema, the groups, and what is refused from the configuration alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from qexp.config import conversion, error_messages, identity, schema, validation
from qexp.config.composition import CONF
from qexp.config.schema import Config, RuntimeName
from qexp.errors import ConfigError

Composed = Callable[..., Config]
CHOICES = dict.fromkeys(identity.GROUPS, "chosen")


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("group", ["model", "dataset", "train", "qconfig", "observer", "calib", "latency"])
def test_every_choice_of_every_group_composes_and_is_legal(composed: Composed, group: str) -> None:
    assert choices(group)
    for choice in choices(group):
        needed = [f"{group}._target_=os.path.join"] if choice == "custom" else []
        needed += ["dataset.root=here"] if choice == "imagefolder" else []
        config = composed(f"{group}={choice}", *needed)
        if choice != "custom":
            validation.check(config)


def test_every_experiment_composes_and_starts_with_its_own_command(composed: Composed) -> None:
    for choice in choices("experiment"):
        composed(f"experiment={choice}")
        lines = (CONF / "experiment" / f"{choice}.yaml").read_text().splitlines()
        assert lines[1] == f"# python -m qexp experiment={choice}"


def test_neither_torch_nor_mlflow_is_imported_for_the_configuration() -> None:
    imports = "import sys, qexp.config.composition, qexp.launch.sweep, hydra_plugins.qexp_sweeper"
    code = f"{imports}; print({{'torch', 'mlflow'}} & set(sys.modules))"
    root = str(CONF.parent)
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_parameters_of_observers_are_fields_of_the_observer() -> None:
    known = {field.name for field in fields(schema.Observer)} - {"name"}
    assert {name for observer in schema.ActivationObserver for name in observer.parameters} == known


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["calib.batches=0"], r"calib\.batches=0: must be a positive number, or null for all"),
        (["job.timeout=0"], r"job\.timeout=0\.0: must be a positive number of seconds, or null for no limit"),
        (["calib.batch_size=-1"], r"calib\.batch_size=-1: must be positive"),
        (["qconfig.weight.bits=1"], r"qconfig\.weight\.bits=1: must be in 2\.\.16"),
        (["qconfig.activation.bits=17"], r"qconfig\.activation\.bits=17: must be in 2\.\.16; .* are simulated in"),
        (
            ["qconfig.activation.bits=9", "runtimes=[torchscript]"],
            r"activation\.bits=9: torchscript of runtimes=\[torchscript\] holds no more than 8 bits; use runtimes=auto",
        ),
        (["runtimes=[simulated]"], r"runtimes=\[simulated\]: simulated is for more bits .* 9 to 16 in"),
        (
            ["qconfig.weight.bits=16", "runtimes=auto", "flow=dynamic"],
            r"weight\.bits=16: .* flow=dynamic computes them as the model runs; use another flow, or at most 8",
        ),
        (["report.runtime=simulated"], r"report\.runtime=simulated: is a simulation in float"),
        (["latency.threads=[0]"], r"latency\.threads=\[0\]: must be a list of positive numbers"),
        (["latency.batch_sizes=[]"], r"latency\.batch_sizes=\[\]: must be a list of positive numbers"),
        (["runtimes=[tvm]"], r"runtimes=\[tvm\]: must be auto, or a list of eager, .*openvino"),
        (["runtimes=eager"], r"runtimes=eager: must be auto, or a list of"),
        (["runtimes=[]"], r"runtimes=\[\]: must be one or more of eager"),
        (["runtimes=[eager,eager]"], r"runtimes=\[eager,eager\]: must be .*, each once"),
        (
            ["runtimes=[eager_channels_last]"],
            r"runtimes=\[eager_channels_last\]: INT8 runs in none of these; add eager or torchscript or inductor",
        ),
        (
            ["runtimes=[eager,inductor]", "qconfig.weight.scheme=asymmetric"],
            r"runtimes=\[eager,inductor\]: inductor takes symmetric weights only.*take it out, or",
        ),
        (
            ["runtimes=[eager]", "tracking.log_model=flavor"],
            r"log_model=flavor .* ONNX file, which runtimes=\[eager\] .* add onnxruntime",
        ),
        (
            ["runtimes=[torchscript,onnxruntime]", "flow=dynamic", "tracking.log_model=flavor"],
            r"log_model=flavor .* flow=dynamic can't make; use another",
        ),
        (["tracking.registered_model=net"], r"registered_model=net: .* add tracking\.log_model=flavor"),
        (
            ["runtimes=[onnxruntime]", "tracking.log_model=flavor", "tracking.registered_model=a/b"],
            r"registered_model=a/b: must be a name without / and :",
        ),
        (["latency.reuse=maybe"], r"latency\.reuse=maybe: must be auto \(true in a sweep\), true or false\."),
        (["cache.max_gb=0"], r"cache\.max_gb=0\.0: must be positive\."),
        (
            ["engine=onednn", "qconfig.weight.scheme=asymmetric"],
            r"engine=onednn takes symmetric weights only.*use engine=",
        ),
        (["observer.bins=100"], r"observer\.bins=100: observer=minmax has no such.*histogram and .*entropy do"),
        (["observer=histogram", "observer.bins=null"], r"observer\.bins=null: observer=histogram needs a value"),
        (["observer=moving_average", "observer.averaging_constant=2"], r"averaging_constant=2\.0: must be in \(0, 1\]"),
        (["observer=percentile", "observer.percentile=50"], r"observer\.percentile=50\.0: must be over 50 and"),
        (["observer=percentile", "observer.percentile=101"], r"observer\.percentile=101\.0: must be over 50 and"),
        (["observer=percentile", "observer.percentile=null"], r"observer=percentile needs a value"),
        (["observer=mse", "observer.percentile=99"], r"observer=mse has no such parameter, observer=percentile does"),
        (["observer=entropy", "observer.bins=128"], r"observer\.bins=128: observer=entropy needs.* 256 with"),
        (["model.checkpoint=a.pt", "model.weights=DEFAULT"], r"model\.checkpoint=.*model\.weights=.*give one"),
        (["dataset.margin=0"], r"dataset\.margin=0: must be an accuracy loss"),
        (["objective=accuracy"], r"objective=accuracy: must be one of accuracy/int8"),
        (["seed=-1"], r"seed=-1: must be in 0"),
        (["report.export=true", "report.auto=false"], r"report\.export=true: exports .*report\.auto=false makes none"),
        (["racing=true", "report.objective=smallest"], r"racing=true with report\.objective=smallest: .* leave one"),
        (
            ["racing=true", "evaluate.select_share=0.3"],
            r"racing=true with evaluate\.select_share=0\.3: images set aside",
        ),
        (["racing=true", "target=avx2"], r"racing=true with target=avx2: settings are stopped by .* this CPU"),
        (["racing=true", "flow=dynamic"], r"racing=true with flow=dynamic: its ranges are those of a whole batch"),
        (["train.epochs=0"], r"train\.epochs=0: must be positive"),
    ],
)
def test_what_cannot_work_is_refused_and_its_neighbour_is_not(
    composed: Composed, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        validation.check(composed(*overrides))
    validation.check(composed())


@pytest.mark.parametrize(
    "override", ["qconfig=per_chanel", "qconfig.weight.granularity=row", "calib.batches=abc", "foo=1", "model.stemm=x"]
)
def test_what_hydra_finds_is_refused_by_hydra(composed: Composed, override: str) -> None:
    with pytest.raises((HydraException, OmegaConfBaseException), match=r"per_chanel|row|abc|foo|stemm"):
        composed(override)


FORMER = "latency.runtimes is now runtimes: use runtimes=... in its place."


@pytest.mark.parametrize("override", ["latency.runtimes=[eager]", "+latency.runtimes=[eager]"])
def test_a_former_name_is_refused_with_the_one_of_today(composed: Composed, override: str) -> None:
    with pytest.raises((ConfigError, HydraException)) as refused:
        composed(override)
    assert error_messages.message_for(refused.value) == FORMER


def test_a_former_name_in_a_file_is_refused_with_the_one_of_today(tmp_path: Path) -> None:
    (tmp_path / "latency").mkdir()
    (tmp_path / "latency" / "mine.yaml").write_text("defaults: [standard, _self_]\nruntimes: [eager]\n")
    command = [sys.executable, "-m", "qexp", "--config-dir", str(tmp_path), "latency=mine", "seed=0,1", "-m"]
    refused = subprocess.run(command, cwd=CONF.parent, capture_output=True, text=True)
    assert (refused.returncode, refused.stderr) == (1, FORMER + "\n")


def test_what_an_older_version_wrote_is_refused_with_the_name_of_today(composed: Composed) -> None:
    values = identity.exact(composed())
    assert conversion.from_plain(values) == composed()
    values["latency"]["runtimes"] = values.pop("runtimes")
    with pytest.raises(ConfigError, match=r"latency\.runtimes is now runtimes"):
        conversion.from_plain(values)


def test_a_missing_value_is_named(composed: Composed) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.root has no value"):
        composed("dataset=imagefolder")


def test_a_parameter_of_another_observer_is_ignored_where_observers_are_swept(composed: Composed) -> None:
    validation.check(composed("observer=minmax", "observer.bins=100"), swept=["observer"])


def test_params_hold_what_was_asked_and_na_where_it_has_no_effect(composed: Composed) -> None:
    config = composed("flow=dynamic", "qconfig.activation.bits=7")
    params = identity.params(config, CHOICES, {"qconfig.activation.bits": "7", "flow": "dynamic"})
    assert params["qconfig"] == "chosen*"
    assert params["qconfig.weight.granularity"] == "per_channel"
    assert {params[name] for name in ("observer", "calib", "calib.batches", "qconfig.activation.bits", "fusion")} == {
        "n/a"
    }
    assert identity.params(composed(), CHOICES, {})["qconfig.overflow"] == "auto"
    assert "job.timeout" not in identity.params(composed("job.timeout=9"), CHOICES, {"job.timeout": "9"})


def test_more_bits_than_kernels_hold_are_simulated_and_not_timed(composed: Composed) -> None:
    config = composed("qconfig.weight.bits=16", "runtimes=auto", "latency=standard")
    validation.check(config)
    assert config.runtimes == [RuntimeName.simulated]
    assert not config.latency.enabled
    params = identity.params(config, CHOICES, {})
    idle = ("latency", "qconfig.overflow", "saturation.exact_images", "per_layer.images")
    assert {params[name] for name in idle} == {"n/a"}
    assert RuntimeName.simulated not in composed("qconfig.weight.bits=8", "runtimes=auto").runtimes
    assert conversion.from_plain(identity.exact(config)) == config


def test_racing_is_no_part_of_a_result_and_judges_no_seed_alone(composed: Composed) -> None:
    raced = composed("racing=true")
    validation.check(raced, ["observer"])
    with pytest.raises(ConfigError, match=r"racing=true with calib\.seed swept over: seeds are judged by their mean"):
        validation.check(raced, ["calib.seed"])
    assert identity.config_hash(raced) == identity.config_hash(composed())
    assert "racing" not in identity.params(raced, {}, {})


def test_what_would_compute_the_same_has_the_same_hash(composed: Composed) -> None:
    assert identity.config_hash(composed("flow=fx", "fusion=true")) == identity.config_hash(
        composed("flow=fx", "fusion=false")
    )
    eager = ("flow=eager", "fusion=true"), ("flow=eager", "fusion=false")
    assert len({identity.config_hash(composed(*one)) for one in eager}) == 2
    alike = composed("study=a", "tracking.name=b", "job.timeout=9")
    assert identity.config_hash(alike) == identity.config_hash(composed())
    for observer in ("minmax", "percentile", "mse", "entropy"):
        every = ("calib.batches=null", f"observer={observer}")
        first, second = (identity.config_hash(composed(*every, f"calib.seed={seed}")) for seed in (1, 2))
        assert first == second
    moving = ("calib.batches=null", "observer=moving_average")
    assert identity.config_hash(composed(*moving, "calib.seed=1")) != identity.config_hash(
        composed(*moving, "calib.seed=2")
    )


def test_relative_paths_are_taken_against_the_folder_where_the_user_typed(composed: Composed, tmp_path: Path) -> None:
    config = composed("dataset=imagefolder", "dataset.root=pictures", "model.checkpoint='~/net.pt'")
    assert config.dataset["root"] == str(tmp_path / "pictures")
    assert config.model["checkpoint"] == str(Path("~/net.pt").expanduser())
