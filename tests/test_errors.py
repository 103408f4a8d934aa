"""Messages made of errors of other people's code never hold a tensor's values."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qexp import tracking
from qexp.errors import first_line, one_line, without_values
from qexp.launch import job_process
from tests.helpers.cli import Run, runs

X = torch.full((2, 3, 4), 771.25) + torch.arange(24).reshape(2, 3, 4)
CPP = """Cannot insert a Tensor that requires grad as a constant. Tensor:
(1,.,.) =
  771.2500  772.2500 -773.2500
0.01 *
  771.2500  nan -7.7125e+02
Columns 1 to 8-771.2500  772.2500
[ CPUFloatType{1,2,3} ]"""


@pytest.mark.parametrize(
    "values",
    [
        X,
        X.double().requires_grad_() * 1,
        X.bool(),
        torch.nn.Parameter(X),
        torch.tensor(771),
        X[0, 0, :2].tolist(),
        X.tolist(),
        X.int().flatten().tolist(),
        X.numpy(),
        X.repeat(99, 1, 1).numpy(),
        [X.numpy()],
        {"x": [X, X]},
        (X[0, 0].half(), 1),
        (X - torch.inf)[:, :, :2].numpy(),
        CPP,
    ],
    ids=lambda values: type(values).__name__,
)
@pytest.mark.parametrize("shown", [str, repr])
def test_no_value_of_a_tensor_is_left(values: Any, shown: Callable[[Any], str]) -> None:
    whole = f"bad {shown(values)} here"
    for text in (whole, whole[: max(len(whole) // 2, 30)], whole * 2):
        left = without_values(text)
        assert not re.search(r"77\d\b|77\d\.|e\+02|\bTrue|-inf", left), left
        assert left.startswith("bad ")
        assert "\n" not in first_line(ValueError(text))
        assert "\n" not in one_line(ValueError(text))
    assert without_values(whole).endswith(" here")


@pytest.mark.parametrize(
    "text",
    [
        "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
        "size mismatch for a.weight: torch.Size([64, 3, 3, 3]) of a checkpoint, torch.Size([64]) here",
        "expected input[1, 3, 32, 32] to have 64 channels, but got 3 channels instead",
        'File "net.py", line 31, in forward\n    return torch.tensor(x) + self.tensor(2)',
        "torch 2.13.0 and 0.28.0 don't fit: version 1.2 is 0.5 too old",
        "array index 3 is out of bounds for axis 0 with size 3",
    ],
)
def test_what_is_no_tensor_is_left_as_it_is(text: str) -> None:
    assert without_values(text) == text


def test_a_long_text_costs_no_time() -> None:
    started = time.process_time()
    for text in (str([0.5] * 100_000), "1" * 300_000 + "x", "[(" * 100_000 + "1 ", "tensor(" * 50_000, "." * 300_000):
        without_values(text)
    assert time.process_time() - started < 5


def test_a_job_hands_on_no_values() -> None:
    try:
        try:
            raise ValueError(X)
        except ValueError as cause:
            raise KeyError("bad", np.asarray(X)) from cause
    except KeyError as error:
        failure, sentence = job_process.Failure.of(error), tracking.sentence(error)
    assert failure.message == sentence.removeprefix("KeyError: ") == "('bad', array(…))"
    assert failure.trace.count("…") == 2
    assert "77" not in failure.trace.replace(f"{Path(__file__)}", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("images", "more", "status"),
    [
        (1, [], None),
        (2, [], None),
        (3, [], None),
        (5, ["train.batch_size=5"], "FAILED"),
        (7, ["calib.batch_size=7"], "FAILED"),
        (11, ["evaluate.batch_size=11"], "FAILED"),
        (13, ["latency=quick", "latency.seconds=0.2", "latency.batch_sizes=[13]"], "FAILED"),
    ],
    ids=["one", "two", "three", "training", "calibration", "evaluation", "timing"],
)
def test_a_model_that_raises_with_a_tensor_shows_none_of_it(
    qexp: Run, tmp_path: Path, images: int, more: list[str], status: str | None
) -> None:
    (tmp_path / "teller.py").write_text(TELLER)
    result = qexp(
        "flow=eager", "model=custom", "model._target_=teller.Net", "+model.num_classes=10", f"+model.images={images}",
        "latency=off", "calib.batches=2", "hydra.verbose=[qexp]", *more,
    )  # fmt: skip
    assert result.returncode == 1
    assert "bad tensor(…)" in result.stderr + result.stdout
    assert [end for _, end in runs(tmp_path)] == ([status] if status else [])
    assert "771.25" not in result.stdout + result.stderr
    written = [file for file in (tmp_path / "outputs").rglob("*") if file.is_file()]
    assert not [file for file in written if b"771.25" in file.read_bytes()]


TELLER = """
import torch


class Net(torch.nn.Module):
    def __init__(self, num_classes, images):
        super().__init__()
        self.images = images
        self.conv = torch.nn.Conv2d(3, 8, 3, stride=4)
        self.fc = torch.nn.Linear(8, num_classes)

    def forward(self, x):
        if len(x) == self.images:
            raise RuntimeError(f"bad {torch.full((40, 50), 771.25)}")
        return self.fc(self.conv(x).mean((2, 3)))

    def fuse_model(self, is_qat=False):
        pass  # nothing to fuse, and nothing to trace for
"""
