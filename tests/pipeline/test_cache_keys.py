"""Runs find what they share by all that it depends on: nothing is computed twice, and nothing else is shared."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qexp import quantize, statistics
from qexp.config.schema import Config, FlowName
from qexp.data.loading import Data, load_data
from qexp.errors import RunError
from qexp.latency import protocol as latency
from qexp.latency import shared_timings
from qexp.metrics import Metric
from qexp.models import architectures, inference
from qexp.pipeline import measure, prepare
from qexp.pipeline.run import run_experiment
from qexp.quantize import FLOWS
from qexp.records import Precision, Result, Variant
from qexp.runtimes import saved_models
from qexp.system import cache
from tests.helpers.jobs import TIMED
from tests.helpers.quantizable import images, spec, trained

Composed = Callable[..., Config]
Run = Callable[..., Result]
TWO = images(2)
SMALL = ("model=tiny", "calib.batches=2", "per_layer.images=0", "latency=off", "saturation.exact_images=50")
JOB = ("sweep=one", "tracking.name=job")


@pytest.fixture
def run(composed: Composed, checkpoint: Path, tmp_path: Path) -> Run:
    """run(folder, *overrides) -> the Result of one job, whose folder is tmp_path/outputs/<folder>."""

    def job(folder: str, *overrides: str) -> Result:
        config = composed(f"model.checkpoint={checkpoint}", *overrides)
        (tmp_path / "outputs" / folder).mkdir(parents=True)
        return run_experiment(config, tmp_path / "outputs" / folder)

    return job


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, of: Callable[..., Any]) -> list[Any]:
    """A list of what `of` returns for the arguments of each call of owner.name, which goes on as it would."""
    seen: list[Any] = []
    original = getattr(owner, name)

    def watched(*args: Any, **named: Any) -> Any:
        seen.append(of(*args))
        return original(*args, **named)

    monkeypatch.setattr(owner, name, watched)
    return seen


# ------------------------------------------------------------------------------------------------ predictions


@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.fx])
def test_a_run_that_quantizes_as_another_did_evaluates_nothing_but_the_checks(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flow: FlowName
) -> None:
    def how_many(
        model: object, split: Any, mean: object, std: object, size: int, title: str, chosen: Any = None, *copies: object
    ) -> int:
        return len(split) if chosen is None else len(chosen)

    counts = counted(monkeypatch, inference, "predict", how_many)
    asked = (*SMALL, f"flow={flow}", "engine=fbgemm", "qconfig.overflow=none")
    first = run("one", *asked)
    assert counts.count(899) == 2  # FP32 and INT8
    # Of either precision the model in memory and TorchScript, and FP32 in channels-last.
    assert counts.count(prepare.AGREEMENT_IMAGES) == 5
    counts.clear()
    second = run("two", *asked, "dataset.margin=0.2")
    # In INT8 the model in memory and both runtimes; in FP32 the first runtime, which the first run evaluated itself.
    assert counts == [prepare.AGREEMENT_IMAGES] * 4
    kept_logits = [np.load(tmp_path / "outputs" / name / "predictions.npz")["int8"] for name in ("one", "two")]
    assert np.array_equal(*kept_logits)
    of_accuracy = [{k: v for k, v in found.metrics.items() if k[:3] in ("acc", "sat")} for found in (first, second)]
    assert {**of_accuracy[1], Metric.non_inferiority_p: 0} == {**of_accuracy[0], Metric.non_inferiority_p: 0}
    counts.clear()
    run("three", *asked, "qconfig=per_tensor")
    assert counts.count(899) == 1


@pytest.mark.parametrize("observer", ["mse", "histogram"])
def test_without_the_cache_all_is_computed_and_nothing_is_read_or_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, observer: str
) -> None:
    evaluated = counted(monkeypatch, inference, "predict", lambda model, split, *rest: len(split))
    asked = (*SMALL, f"observer={observer}", "target=avx2", "saturation.emulated_images=8")
    results = [run("off", *asked, "cache.enabled=false")]
    folder, alone = tmp_path / "outputs" / "cache", len(evaluated)
    assert not folder.exists()
    results.append(run("on", *asked))
    entries = {path: path.stat() for path in folder.iterdir()}
    evaluated.clear()
    for entry in folder.iterdir():
        entry.chmod(0)
    for name in ("_open", "_entry", "_link"):
        monkeypatch.setattr(cache, name, None)
    results.append(run("off_again", *asked, "cache.enabled=false"))
    assert len(evaluated) == alone
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == {
        path: status.st_mtime_ns for path, status in entries.items()
    }
    logits = [np.load(tmp_path / "outputs" / name / "predictions.npz") for name in ("off", "on", "off_again")]
    for other, result in zip(logits[1:], results[1:], strict=True):
        assert all(np.array_equal(logits[0][name], other[name]) for name in logits[0].files)
        first, this = (
            {
                name: value
                for name, value in one.metrics.items()
                if "seconds" not in name and name != Metric.lock_wait_share
            }
            for one in (results[0], result)
        )
        assert this == first


def test_the_same_run_saves_the_same_bytes(run: Run, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        run(folder, *SMALL, "runtimes=[eager]", "cache.enabled=false")
    for name in ("fp32_eager.pt", "int8_eager.pt"):
        one, two = (
            hashlib.sha256((tmp_path / "outputs" / folder / "model" / name).read_bytes()) for folder in ("one", "two")
        )
        assert one.hexdigest() == two.hexdigest()


def test_logits_of_another_model_are_refused_even_if_they_were_found(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_models, "content", lambda config, digest, artifact, loaded: artifact.variant.precision)
    run("one", *SMALL)
    with pytest.raises(RunError, match="two runtimes of the same INT8 model differ by"):
        run("two", *SMALL, "qconfig=per_tensor")


# ------------------------------------------------------------------------------------------------ what is executed


@pytest.fixture
def data(composed: Composed, tmp_path: Path) -> Data:
    return load_data(composed().dataset, tmp_path / "outputs" / "cache")


def converted(config: Config, net: nn.Module) -> nn.Module:
    """The INT8 model that a run with these settings would make of `net`, calibrated on noise."""
    qconfig = replace(config.qconfig, overflow=prepare.resolved(config).overflow)
    fused = FLOWS[config.flow].fuse(net, spec(fusion=config.fusion), TWO)
    prepared = FLOWS[config.flow].prepare(fused, spec(qconfig, config.observer, config.engine), TWO)
    with quantize.engine(config.engine):
        quantize.calibrate(prepared, images(4 * (config.calib.batches or 1), seed=config.calib.seed).split(4))
    return FLOWS[config.flow].convert(prepared).module


@pytest.fixture
def key(composed: Composed, data: Data) -> Callable[..., str]:
    """key(*overrides) -> the key of the timing of a run with them."""
    net = trained(architectures.tiny())

    def of(*overrides: str) -> str:
        config = composed("calib.batches=2", "qconfig.overflow=none", *overrides)
        return shared_timings.timing_key(config, data, "net", converted(config, net), TWO[:1])

    return of


@pytest.mark.parametrize("flow", ["eager", "fx"])
def test_models_that_differ_in_scales_alone_share_a_timing(key: Callable[..., str], flow: str) -> None:
    same = [
        (),
        ("calib.batches=8",),
        ("calib.seed=3",),
        ("observer=moving_average",),
        ("observer=histogram", "calib.batches=4"),
        ("qconfig.overflow=weights",),
        ("qconfig.overflow=activations",),
        ("qconfig.weight.bits=4",),
        ("seed=5", "tracking.name=other", "per_layer.images=3", "latency.reuse=true"),
    ]
    assert len({key(f"flow={flow}", *overrides) for overrides in same}) == 1


def test_models_that_differ_in_what_is_executed_never_share_a_timing(key: Callable[..., str]) -> None:
    different = [
        (),
        ("flow=eager",),
        ("flow=eager", "fusion=false"),
        ("flow=dynamic",),
        ("engine=fbgemm",),
        ("engine=onednn",),
        ("engine=qnnpack",),
        ("qconfig=per_tensor", "qconfig.overflow=none"),
        ("qconfig.weight.scheme=asymmetric",),
        ("qconfig.activation.scheme=symmetric",),
        ("qconfig.activation.bits=6",),
        ("latency=quick",),
        ("latency.batch_sizes=[1,4]",),
        ("latency.threads=[2]",),
        ("runtimes=[eager]",),
        ("latency.seconds=9",),
    ]
    assert len({key(*overrides) for overrides in different}) == len(different)


@pytest.mark.parametrize("flow", [FlowName.eager, FlowName.fx])
def test_the_operators_alone_tell_models_apart(composed: Composed, flow: FlowName) -> None:
    net = trained(architectures.tiny())

    def operators(net: nn.Module, *overrides: str, image: torch.Tensor = TWO[:1]) -> tuple[str, ...]:
        config = composed(f"flow={flow}", "engine=fbgemm", "calib.batches=1", "qconfig.overflow=none", *overrides)
        return quantize.executed(converted(config, net), config.engine, image)

    found = [
        operators(net),
        operators(net, "qconfig=per_tensor", "qconfig.overflow=none"),
        operators(net, "qconfig.weight.scheme=asymmetric"),
        operators(net, "qconfig.activation.scheme=symmetric"),
        operators(trained(architectures.tiny(width=16))),
        operators(net, image=TWO),
        operators(net, image=images(1, size=24)),
    ]
    assert len(set(found)) == len(found)
    convolutions = [call for call in found[0] if call.startswith("quantized.conv2d")]
    assert len(convolutions) == 6
    assert sum(call.startswith("quantized.conv2d_relu") for call in convolutions) == 3
    assert sum(call.startswith("quantized.add_relu") for call in found[0]) == 2
    assert sum(call.startswith("quantized.linear") for call in found[0]) == 1


def test_the_environment_of_the_kernels_is_in_the_key(key: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = key()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/where/torch/puts/what/it/compiles")
    assert key() == before
    monkeypatch.setenv("OMP_PROC_BIND", "spread")
    assert key() != before


# ------------------------------------------------------------------------------------------------ timings


def test_of_three_observers_one_is_timed_and_two_carry_its_timing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shared_timings, "trusted", lambda timings: True)  # whatever else this machine does meanwhile
    caplog.set_level("INFO", logger="qexp.latency.shared_timings")
    timed = counted(monkeypatch, measure, "side_by_side", lambda *args: args[-1].name)
    names = ("minmax", "moving_average", "histogram")
    results = [run(name, *TIMED, *JOB, f"observer={name}", f"tracking.name={name}") for name in names]
    assert timed == ["minmax"]
    assert [result.tags.get("latency_from") for result in results] == [None, "minmax (minmax)", "minmax (minmax)"]
    first, *others = ({k: v for k, v in r.metrics.items() if k.startswith("latency/")} for r in results)
    assert others == [first, first]
    assert len({result.metrics[Metric.sqnr] for result in results}) == 3
    assert caplog.text.count("latency is that of minmax (minmax)") == 2
    kept_files = [json.loads((tmp_path / "outputs" / name / "latency.json").read_text()) for name in names]
    assert [file.get("latency_from") for file in kept_files] == [None, "minmax (minmax)", "minmax (minmax)"]
    assert kept_files[1]["rows"] == kept_files[0]["rows"]
    run("per_tensor", *TIMED, *JOB, "qconfig=per_tensor")
    run("alone", *TIMED)  # a run by itself times for itself, and so does one that is told to
    run("told", *TIMED, *JOB, "latency.reuse=false")
    assert timed == ["minmax", "per_tensor", "alone", "told"]
    assert "latency_from" in run("asked", *TIMED, "latency.reuse=true").tags


def timing(protocol: Any, batch_size: int = 1) -> list[latency.Timing]:
    calls = {Variant(precision, "eager"): lambda batch: None for precision in Precision}
    short = replace(protocol, seconds=0, min_blocks=1, warmup_calls=0, warmup_seconds=0, block_ms=1)
    return latency.time_blocks(calls, [0], short, batch_size=batch_size, threads=1)


def test_a_timing_that_is_not_valid_is_not_kept(
    composed: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, made = composed(), list[int]()

    def measure() -> list[latency.Timing]:
        made.append(1)
        return timing(config.latency)

    for valid in (False, False, True, True):
        monkeypatch.setattr(latency, "validity", lambda timings, valid=valid: (valid, ()))
        found, by = shared_timings.timings(config, "key", "mine", measure)
        assert [t.name for t in found] == ["fp32_eager", "int8_eager"]
    assert (len(made), by) == (3, "mine")
    (entry,) = (tmp_path / "outputs" / "cache").glob("*.npy")
    content = bytearray(entry.read_bytes())
    content[-50] ^= 1
    entry.write_bytes(content)
    assert shared_timings.timings(config, "key", "again", measure)[1] == ""
    assert len(made) == 4


def test_a_sweep_on_a_machine_that_is_never_quiet_times_the_same_thrice(
    composed: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_timings, "trusted", lambda timings: False)
    made: list[int] = []

    def measure() -> list[latency.Timing]:
        made.append(1)
        return timing(composed().latency)

    def timed_by(name: str, *overrides: str) -> str:
        config = composed(*overrides)
        return shared_timings.timings(config, "key", name, measure)[1]

    noisy = [timed_by(name, "sweep=noisy") for name in "abcde"]
    assert noisy == ["", "", "", "c", "c"]
    assert timed_by("f", "sweep=later") == ""  # another day it may be quiet
    assert timed_by("g") == ""
    monkeypatch.setattr(shared_timings, "trusted", lambda timings: True)
    assert timed_by("h", "sweep=later") == ""
    assert timed_by("i", "sweep=noisy") == "h"
    assert len(made) == 6


def test_each_batch_size_must_be_valid(composed: Composed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "validity", lambda timings: ({t.batch_size for t in timings} == {1}, ()))
    protocol = composed().latency
    assert shared_timings.trusted(timing(protocol))
    assert not shared_timings.trusted([*timing(protocol), *timing(protocol, batch_size=4)])


def _timed(config: Config, name: str, made: Path, queue: multiprocessing.Queue[str]) -> None:
    def measure() -> list[latency.Timing]:
        with made.open("a") as file:
            file.write("x")
        time.sleep(0.5)
        return timing(config.latency)

    queue.put(shared_timings.timings(config, "key", name, measure)[1])


def test_of_two_processes_that_want_one_timing_the_second_waits_for_the_first(
    composed: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_timings, "trusted", lambda timings: True)
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[str] = context.Queue()
    made, config = tmp_path / "made", composed()
    workers = [context.Process(target=_timed, args=(config, name, made, queue)) for name in ("a", "b")]
    for worker in workers:
        worker.start()
    by = sorted(queue.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    assert made.read_text() == "x"
    assert by in (["", "a"], ["", "b"])


@pytest.mark.slow
def test_models_that_share_a_timing_have_the_same_speedup(composed: Composed) -> None:
    """Timed side by side, so that what the machine does meanwhile hits both, and made anew in each round: the intervals
    of one round don't hold what a model's place in memory does."""
    net = trained(architectures.resnet18("cifar", 10))
    overrides = [("observer=minmax", "calib.batches=1"), ("observer=histogram", "calib.batches=8")]
    configs = [composed("qconfig.overflow=none", *some) for some in overrides]
    image, engine = images(1, size=32), configs[0].engine
    fp32, *int8 = Variant(Precision.fp32, "eager"), Variant(Precision.int8, "one"), Variant(Precision.int8, "other")
    speedups: dict[Variant, list[float]] = {variant: [] for variant in int8}
    for _ in range(5):
        models = dict(zip(speedups, (converted(config, net) for config in configs), strict=True))
        assert len({quantize.executed(model, engine, image) for model in models.values()}) == 1
        with quantize.engine(engine), latency.threads(1):
            reference, *timings = latency.time_side_by_side(
                {fp32: FLOWS[FlowName.eager].fuse(net, spec(), image), **models},
                images(8, size=32),
                replace(configs[0].latency, seconds=3),
            )
        for name, timing in zip(speedups, timings, strict=True):
            speedups[name].append(latency.speedup(reference, timing).value)
    a, b = map(statistics.mean_interval, speedups.values())
    assert max(a.low, b.low) <= min(a.high, b.high), (a, b)
