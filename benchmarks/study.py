"""A study of many settings as one sweep, against one fresh process of a plain script (benchmarks/script.py) a setting.

    QEXP_BENCH_DATA=FOLDER QEXP_BENCH_CHECKPOINT=FILE make bench BENCH=study

FOLDER has train/<class>/ and test/<class>/ with images of one size, FILE a state_dict of torchvision's ResNet-18 that
was trained on them, normalised as ImageNet is. Without the two, they are the digits as PNG files and a model that is
trained in seconds. Both sides give activations 7 bits, as torch's reduce_range does, and time as `latency=quick` does.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.size import sized
from benchmarks.speed import TORCHS, composed, seconds
from qexp import quantize
from qexp.config import conversion
from qexp.config.schema import Config
from qexp.data.loading import load_data
from qexp.latency import protocol
from qexp.models import float_model, inference
from qexp.pipeline.run import run_experiment
from qexp.runtimes import saved_models

ROOT = Path(__file__).resolve().parent.parent
GRANULARITIES = sized(("per_tensor", "per_channel"), ("per_channel",))
SCHEMES = sized(("asymmetric", "symmetric"), ("symmetric",))
OBSERVERS = sized(("minmax", "moving_average", "percentile", "mse"), ("minmax", "mse"))
BATCHES = sized((4, 16, 56), (4,))  # the digits have images for 56
# The observers that the script has; in place of any other it runs the first, a lower bound of its cost.
SCRIPT_OBSERVERS = ("minmax", "moving_average")
# The script runs every fifth setting: each value of each occurs.
SCRIPT_STRIDE = sized(5, 1)
BARE_PASSES = 2


@dataclass(frozen=True)
class Setting:
    """One run of the study, by the values of its settings."""

    granularity: str
    scheme: str
    observer: str
    batches: int


@dataclass(frozen=True)
class Found:
    """The result of one setting. timed: True if its latency was measured, not taken from another run."""

    fp32: float
    int8: float
    timed: bool = True


SETTINGS = [Setting(*values) for values in itertools.product(GRANULARITIES, SCHEMES, OBSERVERS, BATCHES)]


def study(outputs: str) -> None:
    """Measure runs per hour of both, the cost of a run over a bare INT8 pass, and the agreement of accuracies."""
    data, checkpoint = given(Path(outputs))
    print(f"images of {data}")
    kept = Path(outputs) / "study"
    fixed = (
        "dataset=imagefolder", f"dataset.root={data}", f"model.checkpoint={checkpoint}",
        "latency=quick", "qconfig.overflow=activations", TORCHS,
    )  # fmt: skip
    # Of runs of their own, elsewhere, one for each kind of kernels, and between all else: a shared machine is not
    # equally fast at all times. (The system has read the image files by then, so both sides find them in its memory.)
    bare = bare_passes(Path(outputs) / "elsewhere", fixed)
    passes: dict[str, list[float]] = {name: [] for name in bare}

    def measure() -> None:
        for name, one in bare.items():
            one()  # after other work the first is slower
            passes[name].extend(seconds(one) for _ in range(BARE_PASSES))

    measure()
    cold = seconds(lambda: sweep(kept, fixed)) / len(SETTINGS)
    measure()
    found = read(kept)
    say(f"sweep of {len(found)} settings, cold cache", cold)
    timed = sum(one.timed for one in found.values())
    print(f"{timed} timings were made, {len(found) - timed} runs carry one", flush=True)
    again = seconds(lambda: sweep(kept, fixed)) / len(SETTINGS)
    measure()
    say("the same sweep again", again)

    sample, by_script = SETTINGS[::SCRIPT_STRIDE], {}
    for setting in tqdm(sample, desc="script", disable=None):
        by_script[setting] = script(setting, data, checkpoint)
        measure()
    each = statistics.fmean(took for took, _ in by_script.values())
    say(f"script, a fresh process for each of {len(sample)} settings", each)
    print(f"factor {each / cold:.2f}; of the same sweep again {each / again:.2f}")
    said = [one["steps"] for _, one in by_script.values()]
    by_step = {name: statistics.fmean(one[name] for one in said) for name in said[0]}
    by_step["start-up, imports"] = each - sum(by_step.values())
    print(f"the script's time: {listed(by_step)}", flush=True)

    for name, took in passes.items():
        text = f"{statistics.median(took):.2f} s [{min(took):.2f}, {max(took):.2f}], the median of {len(took)}"
        print(f"a bare INT8 pass, {name}, takes {text}")
    beside = cold - statistics.fmean(map(statistics.median, passes.values()))
    print(f"beside the mean of these, a run of the sweep takes {beside:.2f} s")
    one_run = one_more(str(kept), *fixed)
    print(f"a run's time with nothing of its own in the cache but a timing: {listed(one_run)}")
    print(f"around it, a job of the sweep: {cold - sum(one_run.values()):.2f} s")
    both = [setting for setting in sample if setting.observer in SCRIPT_OBSERVERS]
    agreement({setting: (found[setting], by_script[setting][1]) for setting in both})


def say(title: str, each: float) -> None:
    print(f"{title:58}{each:6.2f} s a run, {3600 / each:5.0f} runs an hour", flush=True)


def listed(took: Mapping[str, float]) -> str:
    """Seconds by name as text, the longest first; shares below a hundredth are left out."""
    longest = sorted(took.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {value:.2f}" for name, value in longest if value >= 0.01)


def given(outputs: Path) -> tuple[Path, Path]:
    """The folder of images and the checkpoint that the environment names, or both made from the digits."""
    data, checkpoint = os.environ.get("QEXP_BENCH_DATA"), os.environ.get("QEXP_BENCH_CHECKPOINT")
    if data and checkpoint:
        return Path(data).absolute(), Path(checkpoint).absolute()
    if data or checkpoint:
        sys.exit("QEXP_BENCH_DATA and QEXP_BENCH_CHECKPOINT go together: give both, or none.")
    folder = outputs / "digits"
    config = composed(str(outputs))
    digits = load_data(config.dataset, outputs / "cache")
    for split, images in (("train", digits.train), ("test", digits.test)):
        for index, pixels in enumerate(images.pixels(np.arange(len(images)))):
            path = folder / split / str(images.labels[index]) / f"{index:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.transpose(1, 2, 0)).save(path)
    files = composed(str(outputs), "dataset=imagefolder", f"dataset.root={folder}")
    trained = float_model.load_or_train(files, load_data(files.dataset, outputs / "cache"))
    torch.save(trained.module.state_dict(), folder / "resnet18.pt")
    return folder, folder / "resnet18.pt"


def python(*arguments: str) -> str:
    """The output of a fresh interpreter; ends the benchmark where it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def sweep(outputs: Path, fixed: tuple[str, ...]) -> None:
    """Run all settings as one sweep, as a user does."""
    varied = {
        "qconfig.weight.granularity": GRANULARITIES,
        "qconfig.activation.scheme": SCHEMES,
        "observer": OBSERVERS,
        "calib.batches": map(str, BATCHES),
    }
    python("-m", "qexp", "-m", f"outputs={outputs}", *fixed, *(f"{k}={','.join(v)}" for k, v in varied.items()))


def read(outputs: Path) -> dict[Setting, Found]:
    """The results of a sweep's jobs, read from their folders."""
    found = {}
    for file in sorted(outputs.glob("sweeps/*/*/config.json")):
        config = conversion.from_plain(json.loads(file.read_text()))
        logits = np.load(file.with_name("predictions.npz"))
        fp32, int8 = (float((logits[name].argmax(1) == logits["labels"]).mean()) for name in ("fp32", "int8"))
        qconfig, batches = config.qconfig, int(config.calib.batches or 0)
        setting = Setting(qconfig.weight.granularity, qconfig.activation.scheme, config.observer.name, batches)
        timed = "latency_from" not in json.loads(file.with_name("latency.json").read_text())
        found[setting] = Found(fp32, int8, timed)
    return found


def script(setting: Setting, data: Path, checkpoint: Path) -> tuple[float, dict[str, Any]]:
    """The seconds that a fresh process of the script takes for a setting, start-up included, and its output."""
    observer = setting.observer if setting.observer in SCRIPT_OBSERVERS else SCRIPT_OBSERVERS[0]
    started = time.perf_counter()
    said = python(
        "-m", "benchmarks.script", f"--data={data}", f"--checkpoint={checkpoint}", f"--observer={observer}",
        f"--granularity={setting.granularity}", f"--activation={setting.scheme}", f"--batches={setting.batches}",
    )  # fmt: skip
    return time.perf_counter() - started, json.loads(said.splitlines()[-1])


def one_more(outputs: str, *fixed: str) -> dict[str, float]:
    """The seconds of each step of one more run of the study, with other calibration images than any before it."""
    # As a job of the sweep. The first one in this process only warms up imports and libraries.
    jobs = [composed(outputs, *fixed, "sweep=study", f"calib.seed={seed}") for seed in (1, 2)]
    folder = Path(outputs) / "one_more"
    folder.mkdir(parents=True)
    run_experiment(jobs[0], folder)
    return steps(jobs[1], folder)


def bare_passes(outputs: Path, fixed: tuple[str, ...]) -> dict[str, Callable[[], None]]:
    """A bare pass for every granularity and scheme of the study, by name."""
    return {
        f"{granularity} {scheme}": bare_pass(
            outputs, f"{granularity}_{scheme}", *fixed, f"qconfig.weight.granularity={granularity}",
            f"qconfig.activation.scheme={scheme}",
        )
        for granularity, scheme in itertools.product(GRANULARITIES, SCHEMES)
    }  # fmt: skip


def bare_pass(outputs: Path, run: str, *settings: str) -> Callable[[], None]:
    """A forward pass over the evaluation images with the INT8 model of a run that is made for it."""
    config = composed(str(outputs), *settings, "latency=off")
    folder = outputs / run
    folder.mkdir(parents=True)
    run_experiment(config, folder)
    model, data = saved_models.load_int8(folder), load_data(config.dataset, Path(config.outputs) / "cache")

    def whole() -> None:
        with quantize.engine(config.engine), protocol.threads(config.compute.threads):
            inference.predict(model, data.test, data.mean, data.std, config.evaluate.batch_size)

    return whole


def steps(config: Config, folder: Path) -> dict[str, float]:
    """Seconds that each step of a run takes, by name. folder: for its files."""
    run_experiment(config, folder)
    noted: dict[str, float] = json.loads((folder / "steps.json").read_text())
    return noted


def agreement(pairs: Mapping[Setting, tuple[Found, Mapping[str, Any]]]) -> None:
    """Print how far the accuracies of qexp and of the script are apart."""
    for name in ("fp32", "int8"):
        furthest = max(abs(getattr(mine, name) - theirs[name]) for mine, theirs in pairs.values())
        print(f"{name.upper()} accuracies of {len(pairs)} settings differ by {100 * furthest:.3f} points at most")
