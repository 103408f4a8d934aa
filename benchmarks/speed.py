"""What qexp's own work costs beside the bare passes of the model that it can't do without."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir

from qexp import config as schema
from qexp import experiment, latency, models, quantize, saved
from qexp.compose import CONF
from qexp.config import ActivationObserver, Config, Observer
from qexp.data import load_data, normalise

ROUNDS = 5


def composed(outputs: str, *overrides: str) -> Config:
    """The configuration of one job, with a float model that trains in seconds."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return schema.from_hydra(compose("config", [f"outputs={outputs}", "train=fast", *overrides]), outputs)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ratio(title: str, numerator: Callable[[], object], denominator: Callable[[], object]) -> None:
    """Print the median ratio of the two times over ROUNDS rounds (after one as warm-up), the smallest and largest."""
    pairs = [(seconds(numerator), seconds(denominator)) for _ in range(ROUNDS + 1)][1:]
    ratios = sorted(first / second for first, second in pairs)
    base = statistics.median(second for _, second in pairs)
    median = statistics.median(ratios)
    print(f"{title:58}{median:6.2f}×  [{ratios[0]:.2f}, {ratios[-1]:.2f}]  of {base:.2f} s", flush=True)


def calibration(outputs: str) -> None:
    """A calibration pass with each of torch's observers over a bare FP32 forward pass over the same 512 images."""
    config = composed(outputs, "latency=off")
    data = load_data(config.dataset, Path(config.outputs) / "cache")
    images = normalise(data.train.pixels(np.arange(512)), data.mean, data.std)
    batches = images.split(config.calib.batch_size)
    fused = quantize.fuse(models.build(config.model, 10, 0), config.flow, True, images[:2])
    qconfig = experiment.resolved(config)

    def bare() -> None:
        with torch.inference_mode():
            for batch in batches:
                fused(batch)

    with latency.threads(config.compute.threads):
        for name, parameters in schema.OBSERVER_PARAMETERS.items():
            values = {"averaging_constant": 0.01, "bins": 2048}
            observer = Observer(ActivationObserver(name), **{key: values[key] for key in parameters})
            prepared = quantize.prepare(fused, config.flow, qconfig, observer, config.engine, images[:2])
            ratio(
                f"calibration, {name}, over a bare FP32 pass", lambda p=prepared: quantize.calibrate(p, batches), bare
            )  # type: ignore[misc]


def whole_run(outputs: str) -> None:
    """A run from a kept float model, FP32 predictions kept and no timing, over a bare INT8 pass over the images."""
    config = composed(outputs, "latency=off")
    folder = Path(config.outputs) / "run"
    folder.mkdir(parents=True)
    experiment.run_job(config, folder)
    model = saved.load_int8(folder)
    data = load_data(config.dataset, Path(config.outputs) / "cache")
    images = normalise(data.test.pixels(), data.mean, data.std)

    def bare() -> None:
        with quantize.engine(config.engine):
            for batch in images.split(config.evaluate.batch_size):
                model(batch)

    with latency.threads(config.compute.threads):
        ratio("a run without timing, over a bare INT8 pass", lambda: experiment.run_job(config, folder), bare)
