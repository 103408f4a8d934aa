"""The flow pt2e where torch has no torch.ao, which the other flows are made of.

torch, inductor and torchao import torch.ao themselves, so it can't be hidden: what fails is each import from qexp.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import ROOT

pytest.importorskip("torchao", reason="pip install 'qexp[pt2e]'")
pytestmark = pytest.mark.slow

# Every process of Python imports a module of this name first.
HOOK = """
import builtins

import_module = builtins.__import__


def without_torch_ao(name, globals=None, locals=None, fromlist=(), level=0):
    asking = str((globals or {}).get("__name__", ""))
    asked = {name, *(f"{name}.{part}" for part in fromlist or ())}
    if asking.split(".")[0] == "qexp" and any(f"{one}.".startswith("torch.ao.") for one in asked):
        raise ModuleNotFoundError("No module named 'torch.ao'")
    return import_module(name, globals, locals, fromlist, level)


builtins.__import__ = without_torch_ao
"""
REFUSED = """
from qexp.errors import InputError
from qexp.quantize import FLOWS
from qexp.quantize.flows import usable_flows

for name in ("eager", "fx", "dynamic"):
    try:
        FLOWS[name]
    except InputError as error:
        print(error)
print([str(flow.name) for flow in usable_flows()])
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "hook"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HOOK)
    return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def test_a_run_in_pt2e_does_without(
    qexp: Callable[..., subprocess.CompletedProcess[str]], environment: dict[str, str], checkpoint: Path
) -> None:
    done = qexp(
        "flow=pt2e", "runtimes=[onnxruntime]", "latency=off", f"model.checkpoint={checkpoint}", env=environment
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "7 of 7 in INT8" in done.stdout


def test_the_others_are_refused_with_the_reason(
    qexp: Callable[..., subprocess.CompletedProcess[str]], environment: dict[str, str], checkpoint: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", REFUSED], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    *said, usable = done.stdout.splitlines()
    for name, sentence in zip(("eager", "fx", "dynamic"), said, strict=True):
        assert sentence.startswith(f"flow={name} is made of torch.ao.quantization, which can't be imported from torch")
        assert sentence.endswith("(No module named 'torch.ao'): use flow=pt2e, which does without it.")
    assert usable == "['pt2e']"
    refused = qexp("flow=eager", "latency=off", f"model.checkpoint={checkpoint}", env=environment)
    assert refused.returncode != 0
    assert refused.stderr == f"{said[0]}\n"
