"""`python -m qexp` as a user types it: what runs, what is refused, what is left behind."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qexp.config.command_line import options_first
from tests.helpers import ROOT
from tests.helpers.cli import TORCHS, Run, runs


def test_one_run_and_then_a_sweep_with_the_same_float_model(qexp: Run, tmp_path: Path) -> None:
    first = qexp()
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""  # nothing that its reader can't act on
    assert "float model: trained 1 epochs on digits" in first.stdout
    assert "mlflow ui" in first.stdout
    assert runs(tmp_path) == [("tiny digits per_channel minmax 32", "FINISHED")]

    sweep = qexp("qconfig=per_tensor,per_channel", "seed=0", "latency=off", "-m")
    assert sweep.returncode == 0, sweep.stderr
    assert sweep.stderr == ""
    assert "trained before" in sweep.stdout  # the float model is kept
    assert sweep.stdout.count("float model:") == 1
    assert "What mattered:" in sweep.stdout
    assert "Report: outputs/reports/" in sweep.stdout
    assert [status for _, status in runs(tmp_path)] == ["FINISHED"] * 4
    assert {"per_tensor", "per_channel"} < {name for name, _ in runs(tmp_path)}


@pytest.mark.parametrize(
    ("typed", "sorted_"),
    [
        ("-m a=1,2 b=3", "-m a=1,2 b=3"),
        ("a=1,2 -m b=3", "-m a=1,2 b=3"),
        ("a=1,2 b=3 --multi", "--multi a=1,2 b=3"),
        ("a=1,2 --multirun b=3 ~c +d=4", "--multirun a=1,2 b=3 ~c +d=4"),
        ("a=1 --config-dir conf b=2 -m c=3", "--config-dir conf -m a=1 b=2 c=3"),
        ("a=1 -cd=conf b=2", "-cd=conf a=1 b=2"),
        ("a=1 --cfg job a=1 --resolve", "--cfg job --resolve a=1 a=1"),
        ("", ""),
    ],
)
def test_options_may_stand_anywhere(typed: str, sorted_: str) -> None:
    assert options_first(typed.split()) == sorted_.split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["calib.batches=0"], "calib.batches=0: must be a positive number"),
        (["qconfig=per_chanel"], "per_chanel"),
        (["foo=1"], "foo"),
        (["outputs=/dev/null/x"], "/dev/null/x"),
        (["hydra.run.dir=${oc.env:QEXP_NOPE}"], "hydra.run.dir: the environment variable QEXP_NOPE is not set"),
        (["-m", "seed=${oc.env:QEXP_NOPE},1"], "seed: the environment variable QEXP_NOPE is not set"),
        (["-m", "experiment=granularity,observers"], "start them one after the other"),
        (["report.export=true"], "exports what a sweep recommends, and this is a single run; add -m"),
        (["-m", "engine=x86,onednn", "qconfig.weight.scheme=asymmetric"], "engine=onednn takes symmetric weights only"),
    ],
)
def test_a_bad_configuration_is_one_sentence_and_nothing_is_left_behind(
    qexp: Run, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = qexp(*arguments)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    assert runs(tmp_path) == []
    assert not list(tmp_path.glob("outputs/runs/*"))


def test_full_error_gives_the_traceback(qexp: Run) -> None:
    result = qexp("calib.batches=0", env={"HYDRA_FULL_ERROR": "1"})
    assert result.returncode != 0
    assert "Traceback" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("sweep", [False, True])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["qconfig.weight.granularity=row"], "per_channel"),
        (["calib.batches=abc"], "abc"),
        (["calib.batches=100000"], "digits has 898"),
        (["model.checkpoint=missing.pt"], "missing.pt"),
        (["model.checkpoint=truncated.pt"], "truncated.pt"),
        (["model.checkpoint=other.pt"], "other.pt"),
        (["model.checkpoint=code.pt"], "code.pt"),
        (["model.checkpoint=whole.pt"], "whole.pt"),
        (["dataset=imagefolder", "dataset.root=nowhere"], "nowhere"),
        (["dataset=imagefolder", "dataset.root=empty"], "empty"),
        (["dataset=imagefolder", "dataset.root=one"], "one"),
        (["dataset=imagefolder", "dataset.root=broken", "calib.batches=1", "calib.batch_size=2"], "bad.png"),
        (["latency.threads=[0]"], "latency.threads=[0]"),
        (["latency.threads=[4096]"], "latency.threads=[4096]"),
        (["model.stemm=x"], "stemm"),
        (["+model.stemm=x"], "stemm"),
        (["qconfig.weight.bits=1"], "qconfig.weight.bits=1"),
        (["tracking.uri=http://127.0.0.1:9", "tracking.timeout=2"], "http://127.0.0.1:9"),
        (["observer.bins=5"], "observer.bins=5"),
    ],
)
def test_bad_input_is_one_sentence_without_a_run(
    qexp: Run, tmp_path: Path, arguments: list[str], message: str, sweep: bool
) -> None:
    bring(tmp_path)
    result = qexp(*arguments, *(["seed=0,1", "-m"] if sweep else []))
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    assert runs(tmp_path) == []


def bring(folder: Path) -> None:
    """Checkpoints and image folders that nothing can be done with."""
    import pickle

    import numpy as np
    import torch
    from PIL import Image

    good = {"weight": torch.zeros(10, 10)}
    torch.save(good, folder / "other.pt")
    (folder / "truncated.pt").write_bytes((folder / "other.pt").read_bytes()[:200])
    (folder / "code.pt").write_bytes(pickle.dumps(print))
    torch.save(torch.nn.Linear(2, 2), folder / "whole.pt")
    (folder / "empty").mkdir()
    for root, classes in (("one", ["a"]), ("broken", ["a", "b"])):
        for index, place in enumerate(f"{root}/{split}/{label}" for split in ("train", "val") for label in classes):
            (folder / place).mkdir(parents=True)
            for number in range(3):
                pixels = np.full((32, 32, 3), 10 * index + number, np.uint8)
                Image.fromarray(pixels).save(folder / place / f"{number}.png")
    (folder / "broken/val/a/bad.png").write_bytes(b"no image")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.slow
def test_a_stopped_sweep_leaves_no_run_open_and_says_how_to_go_on(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    arguments = ["model=tiny", "train=fast", "latency=off", TORCHS, "calib.seed=range(40)", "-m"]
    process = subprocess.Popen(
        [sys.executable, "-m", "qexp", *arguments],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while sum(status == "FINISHED" for _, status in runs(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(number)
    out, err = process.communicate(timeout=180)
    assert process.returncode == code, err
    statuses = [status for _, status in runs(tmp_path)]
    assert "RUNNING" not in statuses
    assert statuses.count("KILLED") >= 1  # the parent, and the run that was under way
    assert "Report: outputs/reports/" in out  # of what is done
    assert "calib.seed=range(40)" in err  # the command that goes on
    assert "Traceback" not in out + err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.slow
def test_a_stopped_single_run_ends_as_killed_and_says_how_to_repeat_it(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "qexp", "model=tiny", "train=fast", "latency=quick", "latency.seconds=60", TORCHS],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while "RUNNING" not in [status for _, status in runs(tmp_path)] and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert [status for _, status in runs(tmp_path)] == ["KILLED"]
    assert f"Stopped by {number.name}. To run it again:" in err
    assert "Traceback" not in out + err


@pytest.mark.slow
def test_a_failed_job_is_named_and_its_siblings_go_on(qexp: Run, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(FLAKY)
    result = qexp(
        "flow=eager", "model=custom", "model._target_=nets.Flaky", "+model.num_classes=10", "latency=off",
        "calib.batch_size=16,7,8", "calib.batches=2", "-m",
    )  # fmt: skip
    assert result.returncode == 1
    assert "FAILED  batch_size=7: " in result.stdout
    assert "seven images are too many" in result.stdout
    statuses = dict(runs(tmp_path))
    assert [statuses[name] for name in ("batch_size=16", "batch_size=7", "batch_size=8")] == [
        "FINISHED",
        "FAILED",
        "FINISHED",
    ]


FLAKY = """
import torch


class Flaky(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, stride=4)
        self.fc = torch.nn.Linear(8, num_classes)

    def forward(self, x):
        if len(x) == 7:
            raise RuntimeError("seven images are too many")
        return self.fc(self.conv(x).mean((2, 3)))

    def fuse_model(self, is_qat=False):
        pass  # nothing to fuse, and nothing to trace for
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("black", "given", "said"),
    [
        ("test", False, "evaluating FP32: the model gives NaN or infinity as logits of 1 of 300 images, the first of"),
        ("train", False, "before training, in which the loss became NaN or infinite: the model gives NaN or infinity"),
        (
            "train",
            True,
            "calibration: the output of getitem holds NaN or infinity for image 17 of dataset make",
        ),
    ],
)
def test_an_image_that_spoils_a_model_is_named_in_one_line(
    qexp: Run, tmp_path: Path, black: str, given: bool, said: str
) -> None:
    import torch

    (tmp_path / "spoiled.py").write_text(SPOILED)
    torch.save(runpy.run_path(str(tmp_path / "spoiled.py"))["Net"](4).state_dict(), tmp_path / "net.pt")
    result = qexp(
        "model=custom", "model._target_=spoiled.Net", "+model.num_classes=4", "flow=fx", "latency=off",
        "dataset=custom", "dataset._target_=spoiled.make", f"+dataset.black={black}", "dataset.mean=[0]",
        "dataset.std=[1]", "calib.batches=2", "calib.sampling=first", *(["model.checkpoint=net.pt"] if given else []),
    )  # fmt: skip
    assert result.returncode == 1
    assert said in result.stderr
    assert f"image {290 if black == 'test' else 17} of dataset make ({black})" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert [status for _, status in runs(tmp_path)] == ["FAILED"]


SPOILED = """
import numpy as np
import torch

from qexp.data.builtin import ArrayDataset


def make(split, black):
    rng = np.random.default_rng(split == "test")
    images = rng.integers(1, 256, (300 if split == "test" else 64, 8, 8), dtype=np.uint8)
    if split == black:
        images[290 if split == "test" else 17] = 0
    return ArrayDataset(images, np.arange(len(images)) % 4, "abcd", f"{split} {black}")


class Net(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3)
        self.fc = torch.nn.Linear(8, num_classes)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3))) + x.sum((1, 2, 3)).reciprocal()[:, None]
"""
