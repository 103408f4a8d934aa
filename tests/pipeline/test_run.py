"""The pipeline from end to end, on the smallest model: one contract for every flow, engine and runtime."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qexp.config.schema import Config, Engine, FlowName, RuntimeName
from qexp.errors import InputError, RunError
from qexp.latency import protocol
from qexp.metrics import Metric, described
from qexp.models import inference
from qexp.pipeline import evaluate, input_checks, run_metrics
from qexp.pipeline.prepare import Saved
from qexp.pipeline.run import run_experiment
from qexp.records import SAME_TAG, Precision, Predictions, Result, Top1, Variant, WarningCode, same_from_text
from qexp.report import sentences
from qexp.runtimes import RUNTIMES
from tests.helpers import ROOT
from tests.helpers.quantizable import BY_TORCH

Composed = Callable[..., Config]
# A p99 needs a thousand calls; jobs are counted in a sweep's own run; racing's are of runs that it stopped; torch's
# runtimes execute what was converted.
ONLY_IN_SOME = {
    *(Metric.runtime_latency_p99, Metric.jobs),
    *(Metric.race_images, Metric.race_all_images, Metric.race_fp32_only, Metric.race_int8_only),
    *(Metric.runtime_layers_int8, Metric.runtime_layers_float, Metric.runtime_compile),
}
LOST_TO_SATURATION = {
    *(Metric.saturation_loss, Metric.saturation_loss_low, Metric.saturation_loss_high),
    *(Metric.saturation_agreement, Metric.saturation_sqnr),
}
SMALL = ("model=tiny", "train=fast", "latency=quick", "latency.seconds=0.1", "latency.warmup_seconds=0")


@pytest.fixture
def run(composed: Composed, checkpoint: Path, tmp_path: Path) -> Callable[..., Result]:
    """run(*overrides) -> the Result of one job, whose folder is tmp_path/run."""

    def job(*overrides: str) -> Result:
        config = composed(*SMALL, f"model.checkpoint={checkpoint}", *overrides)
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        input_checks.check_inputs([config])
        return run_experiment(config, folder)

    return job


def codes(result: Result) -> set[WarningCode]:
    return {warning.code for warning in result.warnings}


@pytest.mark.parametrize("engine", list(Engine))
@pytest.mark.parametrize("flow", BY_TORCH)
def test_every_flow_on_every_engine_gives_a_whole_result(
    run: Callable[..., Result], tmp_path: Path, flow: FlowName, engine: Engine
) -> None:
    result = run(f"flow={flow}", f"engine={engine}")
    logged = {described(name) for name in result.metrics}
    assert None not in logged  # nothing else is logged
    expected = set(Metric) - ONLY_IN_SOME
    if result.tags["saturation"] == "impossible":  # nothing to compare
        expected -= {metric for metric in Metric if metric.startswith("saturation/")} - {Metric.saturation_layers}
    elif not result.metrics[Metric.saturation_layers]:  # the guard kept every sum within 16 bits
        expected -= LOST_TO_SATURATION
    assert expected <= logged
    assert all(np.isfinite(value) for value in result.metrics.values())
    assert result.metrics[Metric.accuracy_fp32] > 0.6
    assert result.metrics[Metric.layers_int8] == (1 if flow is FlowName.dynamic else 7)
    assert abs(result.metrics[Metric.accuracy_delta]) < 0.1
    assert {"cpu", "isa", "kernel_signature", "float_digest", "torch", "fastest.fp32", "latency_valid"} <= set(
        result.tags
    )
    warned = WarningCode.one_model_a_thread in codes(result)
    assert warned == (flow is FlowName.dynamic and engine is Engine.onednn)
    kept = np.load(tmp_path / "run" / "predictions.npz")
    accuracy = (kept["int8"].argmax(1) == kept["labels"]).mean()
    assert accuracy == pytest.approx(result.metrics[Metric.accuracy_int8])
    assert not np.array_equal(kept["int8"], kept["fp32"])
    with np.load(tmp_path / "run" / "top1.npz") as arrays:
        top1 = Top1.from_arrays(dict(arrays), same_from_text(result.tags[SAME_TAG]))
    headline = result.resolved["resolved.runtime"]
    assert np.array_equal(top1.fp32, kept["fp32"].argmax(1))
    assert np.array_equal(top1.int8[headline], kept["int8"].argmax(1))
    right = top1.fp32 == top1.labels
    for runtime, classes in top1.int8.items():
        assert result.metrics[Metric.fp32_only.of(runtime)] == (right & (classes != top1.labels)).sum()
        assert result.metrics[Metric.int8_only.of(runtime)] == (~right & (classes == top1.labels)).sum()
    assert set(top1.int8) == {"eager", "torchscript"}
    assert result.metrics[Metric.runtime_speedup.of(headline)] == result.metrics[Metric.speedup]


def test_what_was_saved_gives_the_same_logits_in_a_fresh_process(run: Callable[..., Result], tmp_path: Path) -> None:
    run("latency=off")
    code = """
import json, runpy, sys, torch
from pathlib import Path
from qexp import quantize
from qexp.config.schema import Engine
from qexp.runtimes.saved_models import load_int8
from qexp.pipeline.prepare import Saved
folder = Path(sys.argv[1])
images = torch.load(folder / "images.pt", weights_only=True)
script = runpy.run_path(str(folder / "model" / "load.py"))["model"]
with quantize.engine(Engine.x86), torch.inference_mode():
    torch.save([script(images), load_int8(folder)(images)], folder / "logits.pt")
"""
    from qexp.data.loading import load_data, normalise

    folder = tmp_path / "run"
    config = json.loads((folder / "config.json").read_text())
    data = load_data(config["dataset"], tmp_path / "cache")
    torch.save(normalise(data.test.pixels(), data.mean, data.std), folder / "images.pt")
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, cwd=ROOT)
    expected = torch.from_numpy(np.load(folder / "predictions.npz")["int8"])
    for logits in torch.load(folder / "logits.pt", weights_only=True):
        assert torch.equal(logits, expected)


THEIRS = ["onnxruntime", "openvino"]


@pytest.mark.parametrize("flow", ["eager", "fx"])
def test_other_libraries_are_measured_beside_torch(run: Callable[..., Result], flow: str) -> None:
    result = run("runtimes=[eager,onnxruntime,openvino]", f"flow={flow}", "qconfig.overflow=weights")
    reference = result.metrics[Metric.runtime_accuracy.of("eager")]
    for runtime in THEIRS:
        assert result.metrics[Metric.runtime_accuracy.of(runtime)] == pytest.approx(reference, abs=0.02)
        assert result.metrics[Metric.runtime_agreement.of(runtime)] > 0.97
        assert result.metrics[Metric.runtime_layers_int8.of(runtime)] == 7
        assert result.metrics[Metric.runtime_layers_float.of(runtime)] == 0
        for precision in Precision:
            assert result.metrics[Metric.runtime_latency.of(Variant(precision, runtime))] > 0
    assert not codes(result) & {WarningCode.runtime_parted, WarningCode.runtime_layers_in_fp32}


def test_a_runtime_that_parts_from_torch_is_not_what_a_run_is_about(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "validity", lambda timings: (True, ()))
    monkeypatch.setattr(evaluate, "MOST", -1.0)
    result = run("runtimes=[onnxruntime,torchscript,openvino]", "qconfig.overflow=weights")
    parted = [one for one in result.warnings if one.code is WarningCode.runtime_parted]
    assert [one.data["runtime"] for one in parted] == THEIRS
    assert result.resolved["resolved.runtime"] == "torchscript"
    for one in parted:
        assert one.data["layer"]
        assert sentences.warning(one).startswith(f"INT8 in {one.data['runtime']} parts from torch's by")


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ("Paddings", r"runtimes has onnxruntime, and module pad .* in place .*take onnxruntime and openvino out"),
        pytest.param("PairwiseHead", r"and .*_trilinear\.default, which has no counterpart in ONNX: take onnxr",
                     marks=pytest.mark.slow),
        pytest.param("FourierMixer", r"openvino can't compile int8\.onnx: .*: take openvino out of runtimes\.",
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_model_that_a_runtime_does_not_take_is_refused_before_the_run(
    composed: Composed, network: str, said: str
) -> None:
    config = composed(
        "model=custom", f"model._target_=tests.helpers.networks.{network}", "dataset=digits", "flow=fx",
        "runtimes=[eager,onnxruntime,openvino]", "latency=off", "dataset.image_size=16",
    )  # fmt: skip
    with pytest.raises(InputError, match=said):
        input_checks.check_inputs([config])


def test_sixteen_bits_are_simulated_and_said_to_be_in_all_that_is_recorded(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    bits = ("qconfig.weight.bits=16", "qconfig.activation.bits=16", "runtimes=auto")
    result = run(*bits)
    numbers = result.metrics
    assert abs(numbers[Metric.accuracy_int8] - numbers[Metric.accuracy_fp32]) < 2 / 899  # at most one of the images
    assert numbers[Metric.sqnr] > 45  # what images beyond the calibrated ranges leave
    assert not [name for name in numbers if "latency" in name or "speedup" in name]
    assert (result.resolved["resolved.runtime"], result.tags["simulated"]) == ("simulated", "true")
    assert (result.resolved["resolved.weight_bits"], result.resolved["resolved.activation_highest_code"]) == (
        "16", "65535"
    )  # fmt: skip
    assert WarningCode.simulated in codes(result)
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (kept["runtimes"], kept["latency"]["enabled"]) == (["simulated"], False)


def test_torchscript_predicts_where_it_gives_the_same_bit_for_bit() -> None:
    def quickest(precision: Precision, runtimes: list[RuntimeName], all_int8: bool) -> str:
        variants = dict.fromkeys(Variant(one, runtime) for one in Precision for runtime in runtimes)
        saved = Saved([], variants, {}, {}, all_int8, 0, "")  # type: ignore[arg-type]
        return str(saved.quickest(saved.reference_variant(precision)))

    both = [RuntimeName.eager, RuntimeName.torchscript]
    assert quickest(Precision.int8, both, True) == "int8_torchscript"
    assert quickest(Precision.int8, both, False) == "int8_eager"
    assert quickest(Precision.fp32, both, True) == "fp32_eager"
    assert quickest(Precision.int8, [RuntimeName.eager], True) == "int8_eager"


@pytest.mark.parametrize("trusted", [True, False])
def test_the_headline_is_all_of_one_variant(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    monkeypatch.setattr(protocol, "validity", lambda timings: (trusted, () if trusted else ("noise",)))
    monkeypatch.setattr(run_metrics, "fastest", slowest_int8)
    result = run("runtimes=[torchscript,eager]", "latency.batch_sizes=[1,4]")
    kept = json.loads((tmp_path / "run" / "latency.json").read_text())["validity"]
    assert [one["batch_size"] for one in kept] == [1, 4]
    assert [one["reasons"] for one in kept] == [[] if trusted else ["noise"]] * 2
    runtime = "eager" if trusted else "torchscript"
    assert result.resolved["resolved.runtime"] == runtime
    numbers, variant = result.metrics, Variant(Precision.int8, runtime)
    assert numbers[Metric.latency_int8] == numbers[Metric.runtime_latency.of(variant)]
    assert numbers[Metric.size_int8] == (tmp_path / "run" / "model" / f"{variant}.pt").stat().st_size / 1e6
    assert numbers[Metric.accuracy_int8] == numbers[Metric.runtime_accuracy.of(runtime)]


def slowest_int8(timings: list[protocol.Timing], precision: Precision) -> protocol.Timing:
    """In the place of the fastest: eager, whatever the machine does meanwhile."""
    return next(timing for timing in timings if timing.variant == Variant(precision, RuntimeName.eager))


@pytest.mark.parametrize(("flow", "evaluations"), [(FlowName.eager, 2), (FlowName.dynamic, 3)])
def test_runtimes_predict_all_images_where_they_may_differ(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, flow: FlowName, evaluations: int
) -> None:
    evaluated: list[int] = []
    original = inference.predict

    def predict(*args: Any, **kwargs: Any) -> Predictions:
        found = original(*args, **kwargs)
        evaluated.append(len(found.labels))
        return found

    monkeypatch.setattr(inference, "predict", predict)
    result = run(f"flow={flow}", "latency=off", "saturation.exact_images=0", "cache.enabled=false")
    assert evaluated.count(899) == evaluations
    for family in (Metric.runtime_accuracy, Metric.runtime_agreement):
        assert set(family.within(result.metrics)) == {"eager", "torchscript"}


def test_a_runtime_has_its_own_accuracy_and_its_agreement_with_the_reference() -> None:
    def predictions(*classes: int) -> Predictions:
        return Predictions(np.eye(3, dtype=np.float32)[list(classes)], np.array([0, 1, 2, 0]), ("a", "b", "c", "d"))

    found = {"eager": predictions(0, 1, 2, 1), "other": predictions(0, 1, 1, 0), "twin": predictions(0, 1, 2, 1)}
    assert run_metrics.runtime_metrics(predictions(0, 2, 2, 0), found, "eager") == {
        "discordant/images": 4.0,
        "runtime_accuracy/eager": 0.75, "runtime_agreement/eager": 1.0,
        "discordant/eager_fp32_only": 1.0, "discordant/eager_int8_only": 1.0,
        "runtime_accuracy/other": 0.75, "runtime_agreement/other": 0.5,
        "discordant/other_fp32_only": 1.0, "discordant/other_int8_only": 1.0,
        "runtime_accuracy/twin": 0.75, "runtime_agreement/twin": 1.0,
        "discordant/twin_fp32_only": 1.0, "discordant/twin_int8_only": 1.0,
    }  # fmt: skip
    assert run_metrics.same_runtimes(found) == (("eager", "twin"), ("other",))


def test_a_runtime_that_cannot_be_used_is_refused_before_any_work(
    composed: Composed, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = RUNTIMES[RuntimeName.eager]
    monkeypatch.setattr(eager, "unavailable", lambda: "it is not installed: install it")
    refused = r"runtimes has eager, and it is not installed: install it, or take eager out\."
    with pytest.raises(InputError, match=refused):
        input_checks.check_runtimes(composed())
    input_checks.check_runtimes(composed("runtimes=[torchscript]"))
    monkeypatch.undo()
    monkeypatch.setattr(eager, "executes", lambda flow, precision: flow is FlowName.fx)
    with pytest.raises(InputError, match=r"runtimes=\[eager\]: none of these executes what flow=eager makes in INT8"):
        input_checks.check_runtimes(composed("runtimes=[eager]", "flow=eager"))
    input_checks.check_runtimes(composed("runtimes=[eager]"))


def test_an_inductor_without_a_compiler_is_refused(composed: Composed, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def missing() -> str:
        raise exc.InvalidCxxCompiler

    config = composed("runtimes=[eager,inductor]", "latency=off")
    input_checks.check_runtimes(config)
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with pytest.raises(InputError, match=r"runtimes has inductor, and .*no C\+\+ compiler for it.*, or take inductor"):
        input_checks.check_runtimes(config)


def test_a_job_leaks_no_global(run: Callable[..., Result]) -> None:
    threads, engine, state = torch.get_num_threads(), torch.backends.quantized.engine, torch.get_rng_state()
    run("engine=qnnpack", "compute.threads=1", "latency=off")
    assert (torch.get_num_threads(), torch.backends.quantized.engine) == (threads, engine)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_same_job_gives_the_same_logits(run: Callable[..., Result], tmp_path: Path) -> None:
    logits = []
    for _ in range(2):
        run("latency=off", "cache.enabled=false")
        logits.append(np.load(tmp_path / "run" / "predictions.npz")["int8"])
    assert np.array_equal(*logits)


def test_what_overflow_became_is_recorded_beside_what_was_asked(run: Callable[..., Result]) -> None:
    assert run("qconfig.overflow=weights", "latency=off").resolved == {
        "resolved.runtime": "eager",
        "resolved.overflow": "weights", "resolved.weight_bits": "7", "resolved.activation_bits": "8",
        "resolved.activation_highest_code": "255", "resolved.narrowed_weights": "0",
        "resolved.narrowed_activations": "0", "resolved.placement": "every_op",
    }  # fmt: skip
    assert run("target=vnni", "latency=off").resolved["resolved.overflow"] == "none"
    guarded = run("target=avx2", "latency=off")
    assert guarded.resolved["resolved.overflow"] == "layers"
    narrowed = [int(guarded.resolved[f"resolved.narrowed_{side}"]) for side in ("weights", "activations")]
    assert sum(narrowed) == guarded.metrics[Metric.layers_narrowed] > 0


def test_there_is_a_warning_of_an_unguarded_engine_that_can_saturate(run: Callable[..., Result]) -> None:
    from qexp.quantize.saturation import kernels

    result = run("qconfig.overflow=none", "engine=fbgemm", "latency=off")
    warned = WarningCode.saturation_unguarded in codes(result)
    assert warned == kernels.probe().dense_saturates(Engine.fbgemm)
    assert WarningCode.saturation_unguarded not in codes(run("engine=fbgemm", "latency=off"))


def test_a_relu_used_twice_is_refused_with_its_name_before_training_and_fails_the_run(
    composed: Composed, tmp_path: Path
) -> None:
    sys.modules["twice"] = type(sys)("twice")
    exec(TWICE, sys.modules["twice"].__dict__)
    config = composed(
        *("model=custom", "model._target_=twice.Net", "flow=eager", "train=fast", "latency=off"),
        f"outputs={tmp_path}/outputs",
    )
    (tmp_path / "run").mkdir()
    sentence = r"the fused model differs from the float model .* the module relu is called 2 times"
    with pytest.raises(InputError, match=rf"{sentence}.* works with fusion=false or with flow=fx"):
        input_checks.check_inputs([config])
    with pytest.raises(RunError, match=sentence):
        run_experiment(config, tmp_path / "run")


def test_an_eager_model_with_a_bare_plus_is_refused_before_any_work(composed: Composed, tmp_path: Path) -> None:
    sys.modules["plus"] = type(sys)("plus")
    exec(PLUS, sys.modules["plus"].__dict__)
    overrides = ("model=custom", "model._target_=plus.Net", "train=fast", "latency=off")
    with pytest.raises(InputError, match="flow=fx"):
        input_checks.check_inputs([composed(*overrides, "flow=eager")])
    input_checks.check_inputs([composed(*overrides, "flow=fx")])


TWICE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))

    def fuse_model(self, is_qat=False):
        names = [["conv1", "bn1", "relu"], ["conv2", "bn2"]]
        torch.ao.quantization.fuse_modules(self, names, inplace=True)
"""

PLUS = """
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        return self.fc((self.conv1(x) + self.conv2(x)).mean((2, 3)))
"""


def test_inputs_of_jobs_that_share_them_are_looked_at_once(
    composed: Composed, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    for owner, name in (
        (input_checks, "load_data"),
        (input_checks.float_model, "check_model"),
        (input_checks.quantize, "dry_run"),
    ):
        step = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, step=step, name=name: (looked.append(name), step(*args))[1])
    tiny = ("model=tiny", f"model.checkpoint={checkpoint}", "latency=off")
    sizes = [composed(*tiny, f"calib.batches={size}", f"calib.seed={size}") for size in (1, 2, 3)]
    input_checks.check_inputs(sizes)
    assert looked == ["load_data", "check_model", "dry_run"]
    looked.clear()
    input_checks.check_inputs(
        [sizes[0], composed(*tiny, "flow=eager"), composed("model=tiny", "latency=off"), sizes[1]]
    )
    assert looked == ["load_data", "check_model", "dry_run", "dry_run", "check_model", "dry_run"]
    with pytest.raises(InputError, match=r"calib\.batches=400"):
        input_checks.check_inputs([*sizes, composed(*tiny, "calib.batches=400")])


def test_a_last_batch_that_is_not_full_is_taken_and_said(
    composed: Composed, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    results = []
    for batches in ("2", "null"):
        calibration = (f"calib.batches={batches}", "calib.batch_size=500")
        config = composed(
            "model=tiny", f"model.checkpoint={checkpoint}", "latency=off", "per_layer.images=0", *calibration
        )
        results.append(run_experiment(config, tmp_path))
    assert [result.metrics[Metric.calibration_images] for result in results] == [898, 898]
    assert results[0].metrics[Metric.accuracy_int8] == results[1].metrics[Metric.accuracy_int8]
    said = "calibrated on 898 images, all that digits has: the last of the 2 batches is not full."
    assert [record.getMessage() for record in caplog.records].count(said) == 1
