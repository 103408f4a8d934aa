"""`make bench`: what qexp's own work costs, as ratios measured side by side in one run.

Every figure is the median over rounds of one time over another of the same round, with the smallest and largest ratio.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir

from qexp import config as schema
from qexp import experiment, latency, machine, models, quantize
from qexp.compose import CONF
from qexp.config import ActivationObserver, Config, Observer
from qexp.data import load_data, normalise

ROUNDS = 5


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ratio(title: str, numerator: Callable[[], object], denominator: Callable[[], object]) -> None:
    """Print the ratio of the two times over ROUNDS rounds, the first of which, a warm-up, is left out."""
    pairs = [(seconds(numerator), seconds(denominator)) for _ in range(ROUNDS + 1)][1:]
    ratios = sorted(first / second for first, second in pairs)
    base = statistics.median(second for _, second in pairs)
    median = statistics.median(ratios)
    print(f"{title:58}{median:6.2f}×  [{ratios[0]:.2f}, {ratios[-1]:.2f}]  of {base:.2f} s", flush=True)


def composed(outputs: str, *overrides: str) -> Config:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return schema.from_hydra(compose("config", [f"outputs={outputs}", *overrides]), outputs)


def calibration(config: Config) -> None:
    """A calibration pass with each of torch's observers over a bare FP32 forward pass over the same 512 images."""
    data = load_data(config.dataset, Path(config.outputs) / "cache")
    images = normalise(data.train.pixels(np.arange(512)), data.mean, data.std)
    batches = images.split(config.calib.batch_size)
    fused = quantize.fuse(models.build(config.model, 10, 0), config.flow, True, images[:2])
    qconfig = experiment.resolved(config)

    def bare() -> None:
        with torch.inference_mode():
            for batch in batches:
                fused(batch)

    for name, parameters in schema.OBSERVER_PARAMETERS.items():
        values = {"averaging_constant": 0.01, "bins": 2048}
        observer = Observer(ActivationObserver(name), **{key: values[key] for key in parameters})
        prepared = quantize.prepare(fused, config.flow, qconfig, observer, config.engine, images[:2])
        ratio(f"calibration, {name}, over a bare FP32 pass", lambda p=prepared: quantize.calibrate(p, batches), bare)  # type: ignore[misc]


def whole_run(config: Config) -> None:
    """A run from a kept float model, FP32 predictions kept and no timing, over a bare INT8 pass over the images."""
    folder = Path(config.outputs) / "run"
    folder.mkdir()
    experiment.run_job(config, folder)
    model = experiment.load_int8(folder)
    data = load_data(config.dataset, Path(config.outputs) / "cache")
    images = normalise(data.test.pixels(), data.mean, data.std)

    def bare() -> None:
        with quantize.engine(config.engine):
            for batch in images.split(config.evaluate.batch_size):
                model(batch)

    ratio("a run without timing, over a bare INT8 pass", lambda: experiment.run_job(config, folder), bare)


def main() -> None:
    here = machine.describe()
    print(f"{here.cpu} ({here.isa}), torch {torch.__version__}, ResNet-18 on digits, 2 threads, {ROUNDS} rounds")
    with tempfile.TemporaryDirectory() as outputs:
        config = composed(outputs, "train=fast", "latency=off")
        with latency.threads(config.compute.threads):
            calibration(config)
            whole_run(config)


if __name__ == "__main__":
    main()
