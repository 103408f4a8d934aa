"""Which answer counts for the CPU that a model ships on, and what the verdict says of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from qexp.accuracy import target_cpu
from qexp.config.schema import Config, Engine, FlowName, Scheme, Target
from qexp.metrics import Metric
from qexp.pipeline import run_metrics
from qexp.pipeline.run import run_experiment
from qexp.quantize.saturation import kernels
from qexp.quantize.saturation.kernels import KernelSignature, Probe
from qexp.quantize.torch_backend import layer_equivalence
from qexp.records import AccuracySource, Predictions, Result, SaturationStatus, Verdict, WarningCode
from qexp.report import sentences
from qexp.runtimes import int8_kernels

Composed = Callable[..., Config]
SMALL = ("model=tiny", "latency=off")
KINDS = ("conv", "pointwise", "depthwise", "linear")


def signature(answer: int) -> KernelSignature:
    """A machine whose kernels all answer this where 200 is exact."""
    probes = [
        Probe(e, s, kind, 200 if e is Engine.qnnpack else answer) for e in Engine for s in Scheme for kind in KINDS
    ]
    return KernelSignature("made up", tuple(probes))


def pretend(monkeypatch: pytest.MonkeyPatch, made_up: KernelSignature) -> None:
    """Let this CPU pass for one of these kernels, but with the check of layers, which sees what it computes."""
    really = kernels.probe()
    check = SimpleNamespace(probe=lambda: really, saturating_here=kernels.saturating_here)
    monkeypatch.setattr(layer_equivalence, "kernels", check)
    monkeypatch.setattr(kernels, "probe", lambda: made_up)


exact_here = pytest.mark.skipif(
    kernels.probe().dense_saturates(Engine.fbgemm),
    reason="this CPU saturates: its own sums are compared with emulated ones in quantize/saturation/test_programs.py",
)


@pytest.fixture
def run(composed: Composed, checkpoint: Path, tmp_path: Path) -> Callable[..., Result]:
    def job(*overrides: str) -> Result:
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        return run_experiment(composed(*SMALL, f"model.checkpoint={checkpoint}", *overrides), folder)

    return job


def test_a_cpu_with_vnni_is_answered_for_by_exact_sums_on_all_images(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    result = run("target=vnni", "engine=fbgemm")
    assert result.resolved["resolved.overflow"] == "none"
    saturates = kernels.probe().dense_saturates(Engine.fbgemm)
    assert result.tags["accuracy_source"] == ("exact" if saturates else "executed")
    assert result.metrics[Metric.target_images] == 899
    exact = run("target=vnni", "engine=qnnpack")
    assert exact.tags["accuracy_source"] == "executed"
    assert exact.tags["saturation"] == "impossible"
    # Where it is executed, FBGEMM has rounded.
    allowed = 0 if saturates else 3 / 899
    assert abs(result.metrics[Metric.target_accuracy] - exact.metrics[Metric.accuracy_int8]) <= allowed
    assert exact.metrics[Metric.target_accuracy] == exact.metrics[Metric.accuracy_int8]


def test_a_guard_makes_saturation_impossible_or_says_that_it_looked(run: Callable[..., Result], tmp_path: Path) -> None:
    guarded = run("qconfig.overflow=weights", "target=avx2")
    assert guarded.tags["saturation"] == "impossible"
    assert guarded.tags["accuracy_source"] == "executed"
    assert Metric.saturation_loss not in guarded.metrics
    assert guarded.metrics[Metric.saturation_layers] == 0
    with (tmp_path / "run" / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(row["int8"] == "True" for row in rows) == guarded.metrics[Metric.layers_int8]
    assert all(float(row["clipped"]) <= 1 for row in rows if row["clipped"])


def test_where_this_cpu_is_exact_the_other_one_is_emulated(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = kernels.probe()
    pretend(monkeypatch, signature(200))
    overrides = ("target=avx2", "qconfig.overflow=none", "engine=fbgemm", "saturation.emulated_images=50")
    result = run(*overrides)
    assert result.tags["accuracy_source"] == "emulated"
    assert result.metrics[Metric.target_images] == 50
    kept = np.load(tmp_path / "run" / "predictions.npz")
    chosen = target_cpu.spread(899, 50)
    executed = float((kept["int8"][chosen].argmax(1) == kept["labels"][chosen]).mean())
    if really.dense_saturates(Engine.fbgemm):
        # What was taken for exact is what saturates: the emulator gives the same.
        assert result.metrics[Metric.target_accuracy] == executed
        assert result.metrics[Metric.saturation_layers] == 0
    assert result.metrics[Metric.exact_accuracy] == executed


@exact_here
@pytest.mark.slow
def test_another_librarys_sums_are_emulated_in_its_order_with_torchs_rounding(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, signature(200))
    exact = dict.fromkeys(kernels.probed_layers(), 200)
    monkeypatch.setattr(int8_kernels, "probe", lambda name: exact)
    asked = ("qconfig.overflow=none", "engine=fbgemm", "saturation.emulated_images=50", "target=avx2")
    theirs = run("runtimes=[onnxruntime]", *asked)
    assert theirs.resolved["resolved.runtime"] == "onnxruntime"
    assert theirs.tags["saturates.onnxruntime"] == "none"
    torchs = run("runtimes=[eager]", *asked)
    assert theirs.tags["accuracy_source"] == torchs.tags["accuracy_source"] == "emulated"
    # The network has dense layers alone, which FBGEMM's kernels add up in the same order.
    of_sums = Metric.saturation_agreement, Metric.saturation_layers, Metric.exact_accuracy
    for metric in (Metric.target_accuracy, *of_sums):
        assert theirs.metrics[metric] == torchs.metrics[metric], metric
    # And here, were it a CPU on which they saturate.
    monkeypatch.setattr(int8_kernels, "probe", lambda name: exact | {"conv": 101, "linear": 101})
    here = run("runtimes=[onnxruntime]", "qconfig.overflow=auto", "engine=qnnpack")
    assert here.resolved["resolved.overflow"] == "layers"
    assert here.metrics[Metric.layers_narrowed] > 0
    assert here.tags["saturates.onnxruntime"] == "conv linear"
    assert here.tags["accuracy_source"] == "executed"


@exact_here
@pytest.mark.slow
def test_16_bit_sums_of_a_program_are_emulated_as_torchs_are(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao", reason="pip install 'qexp[pt2e]'")
    pretend(monkeypatch, signature(200))
    monkeypatch.setattr(int8_kernels, "probe", lambda name: dict.fromkeys(kernels.probed_layers(), 200))
    asked = "runtimes=[onnxruntime]", "engine=fbgemm", "saturation.emulated_images=50", "target=avx2"
    by_torch, by_program = (run(f"flow={flow}", "qconfig.overflow=none", *asked) for flow in ("fx", "pt2e"))
    assert by_program.tags["accuracy_source"] == "emulated"
    saturating = by_program.metrics[Metric.saturation_layers]
    assert saturating == by_torch.metrics[Metric.saturation_layers] > 0
    for lost in (one.metrics[Metric.saturation_loss] for one in (by_torch, by_program)):
        assert lost > 0.2
    guarded = run("flow=pt2e", "qconfig.overflow=auto", *asked)
    assert guarded.resolved["resolved.overflow"] == "layers"
    assert guarded.metrics[Metric.layers_narrowed] == saturating
    assert guarded.metrics[Metric.saturation_layers] == 0


def test_layers_whose_sums_cannot_be_emulated_are_named(
    composed: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend(monkeypatch, signature(200))
    model = ("model=custom", "model._target_=tests.helpers.quantizable.Upsampling", "+model.num_classes=10")
    asked = (
        "target=avx2",
        "qconfig.overflow=none",
        "engine=onednn",
        "saturation.emulated_images=9",
        "latency=off",
        "train=fast",
    )
    result = run_experiment(composed(*model, *asked), tmp_path)
    assert result.tags["accuracy_source"] == "emulated"
    assert "1 layers add up as they do on this CPU, since their 16-bit sums can't be emulated: up." in caplog.text


def test_a_cpu_with_vnni_has_depthwise_kernels_that_saturate_and_no_others(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    probes = tuple(replace(one, output=112) if one.kind == "depthwise" else one for one in signature(200).probes)
    pretend(monkeypatch, KernelSignature("made up", probes))
    result = run("engine=fbgemm")  # which has dense layers alone
    assert result.resolved["resolved.overflow"] == "layers"
    assert result.metrics[Metric.layers_narrowed] == 0
    assert result.tags["saturation"] == "impossible"
    assert "depthwise" not in caplog.text  # of which there are none
    unguarded = run("engine=fbgemm", "qconfig.overflow=none")
    assert WarningCode.saturation_unguarded not in {warning.code for warning in unguarded.warnings}


def test_without_images_to_compare_saturation_stays_possible(run: Callable[..., Result]) -> None:
    result = run("qconfig.overflow=none", "saturation.exact_images=0", "engine=fbgemm")
    expected = "possible" if kernels.probe().dense_saturates(Engine.fbgemm) else "impossible"
    assert result.tags["saturation"] == expected


@pytest.mark.parametrize(("here", "asked", "reason"), [
    (101, Target.vnni, "without VNNI, and target=vnni"),
    (200, Target.avx2, "with VNNI, and target=avx2"),
    (101, Target.avx2, ""),
    (200, Target.vnni, ""),
    (200, Target.native, ""),
])  # fmt: skip
def test_a_timing_of_another_cpu_is_not_valid_for_the_target(
    composed: Composed, monkeypatch: pytest.MonkeyPatch, here: int, asked: Target, reason: str
) -> None:
    monkeypatch.setattr(kernels, "probe", lambda: signature(here))
    said = target_cpu.other_kernels(composed(f"target={asked}"))
    assert reason in said
    assert bool(said) == bool(reason)
    assert target_cpu.other_kernels(composed(f"target={asked}", f"flow={FlowName.dynamic}")) == ""


def test_images_are_spread_over_the_whole_set() -> None:
    assert target_cpu.spread(10, 4).tolist() == [0, 2, 5, 7]
    assert target_cpu.spread(3, 10).tolist() == [0, 1, 2]
    assert target_cpu.spread(10, 0).tolist() == []
    assert len(set(target_cpu.spread(899, 500).tolist())) == 500


# ---- The verdict


def predictions(correct: np.ndarray) -> Predictions:
    labels = np.zeros(len(correct), np.int64)
    logits = np.stack([correct, ~correct], 1).astype(np.float32)
    return Predictions(logits, labels, tuple(map(str, range(len(correct)))))


def judged(fp32: np.ndarray, saturating: np.ndarray, exact: np.ndarray | None, source: str = "executed") -> str:
    """The verdict on 10,000 images of which so many are right."""
    everything = np.arange(len(fp32))
    found = predictions(saturating if source == "executed" or exact is None else exact)
    answer = target_cpu.TargetAccuracy(
        AccuracySource(source), everything, found,
        SaturationStatus.impossible if exact is None else SaturationStatus.observed,
        everything, None if exact is None else predictions(exact), predictions(saturating),
    )  # fmt: skip
    found = run_metrics.verdict(predictions(fp32), answer, 0.005)
    assert Verdict.from_tags(found.tags()) == found
    return sentences.verdict(found)


def right(count: int, images: int = 10_000) -> np.ndarray:
    return np.arange(images) < count


def test_the_verdict_names_saturation_where_it_is_the_cause() -> None:
    advice = "16-bit sums that saturate; qconfig.overflow=auto avoids it"
    assert judged(right(8507), right(8152), right(8507)) == f"loss; 3.5 points lost, all of it to {advice}"
    assert judged(right(8507), right(8152), right(8300)) == f"loss; 3.5 points lost, 1.5 of them to {advice}"
    assert judged(right(8507), right(8152), None) == "loss"
    assert judged(right(8507), right(8500), right(8500)) == "no loss beyond 0.5 points"
    assert judged(right(8507), right(8152), right(8507), source="exact") == "no loss beyond 0.5 points"


def test_what_answers_for_the_target_is_in_the_files(run: Callable[..., Result], tmp_path: Path) -> None:
    result = run("qconfig.overflow=none")
    assert set(result.files) >= {"layers.csv", "layers.png", "config.json", "tensors.csv"}
    with (tmp_path / "run" / "tensors.csv").open() as file:
        rows = list(csv.DictReader(file))
    grids = json.loads((tmp_path / "run" / "qparams.json").read_text())
    assert [row["name"] for row in rows] == list(grids)
    assert {(row["kind"], row["range_taken"]) for row in rows} == {
        ("weight", "weights"), ("activation", "output"), ("activation", "after relu"),
    }  # fmt: skip
    for row in rows:
        grid = grids[row["name"]]
        pairs = list(zip(grid["scale"], grid["zero_point"], strict=True))
        assert float(row["lowest"]) == pytest.approx(min(s * (grid["qmin"] - z) for s, z in pairs), rel=1e-6)
        assert float(row["highest"]) == pytest.approx(max(s * (grid["qmax"] - z) for s, z in pairs), rel=1e-6)
        assert int(row["channels"]) == len(pairs)
    assert (tmp_path / "run" / "layers.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "run" / "config.json").read_text())["saturation"]["exact_images"] == 1000
    assert result.verdict.margin == 0.02
