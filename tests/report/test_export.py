"""What a report hands over: the model that the recommendation means, and nothing where it can't be told."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qexp.config import schema
from qexp.report import export
from qexp.report.decision import Answer
from qexp.report.findings import Files, Findings, of_study
from qexp.report.next_commands import NextCommands, exportable
from qexp.report.study import Study
from tests.helpers.studies import right, run, study

Run = Callable[..., subprocess.CompletedProcess[str]]

QUESTION = schema.Report(True, schema.ReportObjective.fastest, 0.02, None, None, None, None)
STORE: Any = SimpleNamespace(uri="sqlite:///somewhere.db")


def findings(lost: int = 0, speedup: float | None = 3.0, runtime: str = "openvino", valid: bool = True) -> Findings:
    """Of a study of one setting. lost: images of 1,000; valid: its timing can be trusted."""
    record, top1 = run("mine", {runtime: right(*range(lost))}, None if speedup is None else {runtime: speedup})
    if not valid:
        record = replace(
            record, tags={**record.tags, "latency_valid": "false", "latency_reason": "the machine is busy"}
        )
    made: Study = study([(record, top1)])
    return of_study(made, QUESTION, Files(None))


class Exporter:
    """In place of `subprocess.run`: keeps what it is asked for, and answers as told."""

    def __init__(self, code: int = 0, stderr: str = "") -> None:
        self.code, self.stderr = code, stderr
        self.commands: list[list[str]] = []
        self.environments: list[Mapping[str, str]] = []

    def __call__(self, command: list[str], env: Mapping[str, str], **how: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        self.environments.append(env)
        return subprocess.CompletedProcess(command, self.code, "FOLDER: the model\n", self.stderr)


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Exporter:
    monkeypatch.chdir(tmp_path)
    made = Exporter()
    monkeypatch.setattr(export.subprocess, "run", made)
    return made


def said(found: Findings, folder: Path) -> str:
    return export.export([found], NextCommands(folder / "outputs" / "reports" / "x", "sweep=abc"), STORE)


def test_what_is_recommended_is_exported_for_its_runtime(exporter: Exporter, tmp_path: Path) -> None:
    found = findings()
    assert found.headline.kind is Answer.ship
    assert said(found, tmp_path) == "FOLDER: the model"
    (command,) = exporter.commands
    assert command[:6] == [sys.executable, "-m", "qexp.export", "run_id=mine", "format=openvino", "batch_size=1"]
    assert "folder='outputs/exports/mine-openvino'" in command
    assert exporter.environments[0]["MLFLOW_TRACKING_URI"] == STORE.uri


@pytest.mark.parametrize(
    ("fp32", "form", "told"),
    [
        ({"openvino": 2.0, "onnxruntime": 1.5}, "onnx", "FP32 is fastest in onnxruntime."),
        (
            {"eager_channels_last": 1.0, "openvino": 2.0},
            "torchscript",
            "FP32 is fastest in eager_channels_last, and ships as TorchScript.",
        ),
        ({}, "torchscript", "FOLDER"),
    ],
)
def test_to_stay_on_fp32_exports_the_float_model_for_its_fastest_runtime(
    exporter: Exporter, tmp_path: Path, fp32: dict[str, float], form: str, told: str
) -> None:
    rows = [{"variant": f"fp32_{name}", "batch_size": 1, "threads": 1, "p50": ms} for name, ms in fp32.items()]
    others = [
        {"variant": "fp32_torchscript", "batch_size": 8, "threads": 1, "p50": 0.1},
        {"variant": "int8_openvino", "batch_size": 1, "threads": 1, "p50": 0.1},
        {"variant": "fp32_cuda", "batch_size": 1, "threads": 1, "p50": 0.1},
    ]
    found = replace(findings(speedup=0.5), timing={"rows": rows + others} if rows else {})
    assert found.headline.kind is Answer.stay_on_fp32
    assert said(found, tmp_path).startswith(told)
    assert exporter.commands[0][3:6] == ["run_id=mine", f"format={form}", "precision=fp32"]


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (findings(speedup=None), Answer.speed_unknown),
        (findings(valid=False), Answer.speed_unknown),
        (findings(lost=12), Answer.cant_tell),
    ],
)
def test_where_it_is_open_nothing_is_exported_and_the_provisional_command_is_said(
    exporter: Exporter, tmp_path: Path, found: Findings, kind: Answer
) -> None:
    assert found.headline.kind is kind
    first, second = said(found, tmp_path).splitlines()
    assert first == "Nothing is exported, since what to ship is open; the provisional one:"
    assert second == "  python -m qexp.export run_id=mine format=openvino batch_size=1"
    assert exporter.commands == []


def test_without_a_finished_run_there_is_nothing_to_export(exporter: Exporter, tmp_path: Path) -> None:
    ended = replace(findings().study.records[0], status="FAILED", metrics={})
    none = replace(findings().study, records=(ended,), latencies={}, top1={})
    assert said(of_study(none, QUESTION, Files(None)), tmp_path).startswith("Nothing is exported, since there is")


def test_an_export_that_fails_is_its_sentence_and_the_command_to_try_again(exporter: Exporter, tmp_path: Path) -> None:
    exporter.code, exporter.stderr = 1, "a warning\nrun_id=mine: its settings make another model now.\n"
    assert said(findings(), tmp_path).splitlines() == [
        "The export failed: run_id=mine: its settings make another model now.",
        "To try it again:",
        "  python -m qexp.export run_id=mine format=openvino batch_size=1",
    ]


def test_what_was_exported_before_is_left_alone(exporter: Exporter, tmp_path: Path) -> None:
    folder = tmp_path / "outputs" / "exports" / "mine-openvino"
    folder.mkdir(parents=True)
    np.savez(folder / "check.npz", images=np.zeros(1))
    assert "was written before" in said(findings(), tmp_path)
    assert exporter.commands == []


def test_each_study_of_a_report_has_its_own(exporter: Exporter, tmp_path: Path) -> None:
    commands = NextCommands(tmp_path / "outputs" / "reports" / "x", "")
    text = export.export([findings(), findings(valid=False)], commands, STORE)
    assert len(exporter.commands) == 1
    assert len(re.findall(r"^FOLDER|^Nothing is exported", text, re.MULTILINE)) == 2


def test_the_batch_size_is_that_of_the_timing() -> None:
    found = findings()
    shown = replace(found, headline=replace(found.headline, conditions=(32, 1)))
    model = exportable(shown)
    assert model is not None
    assert "batch_size=32" in model.overrides


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "precision"),
    [
        # Neither needs a timing, which a busy machine wouldn't give.
        (["report.objective=smallest", "report.margin=0.2"], "INT8"),
        (["qconfig.weight.bits=2", "qconfig.activation.bits=2", "report.margin=0.01"], "FP32"),
    ],
)
def test_one_command_leads_from_a_float_model_to_a_folder_that_serves(
    qexp: Run, checkpoint: Path, tmp_path: Path, asked: list[str], precision: str
) -> None:
    few = ["qconfig=per_channel", "observer=minmax,mse", "engine=x86", "latency=off", "per_layer.images=0"]
    done = qexp("experiment=ship", f"model.checkpoint={checkpoint}", *few, *asked)
    assert done.returncode == 0, done.stderr
    folder = re.findall(rf"^(\S+): the {precision} model as \w+, ", done.stdout, re.MULTILINE)[0]
    assert f"Serve it: python -i {folder}/serve.py" in done.stdout
    checked = subprocess.run([sys.executable, f"{folder}/check.py"], cwd=tmp_path, capture_output=True, text=True)
    assert checked.stdout.endswith("ok\n"), checked.stderr
