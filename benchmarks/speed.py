"""The cost of qexp's own work over the bare forward passes that it needs."""

from __future__ import annotations

import itertools
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir

from benchmarks.size import sized
from qexp import quantize
from qexp.config import conversion
from qexp.config.composition import CONF
from qexp.config.schema import ActivationObserver, Config, Observer
from qexp.data.loading import load_data, normalise
from qexp.latency import protocol
from qexp.models import float_model
from qexp.pipeline import prepare, run
from qexp.quantize.torch_backend import layers as torch_layers
from qexp.runtimes import saved_models
from qexp.system.machine_lock import MachineLock

ROUNDS = sized(5, 1)
MODELS = sized(("resnet18", "mobilenet_v2"), ("tiny",))
IMAGES = sized(512, 16)
SLICES, SLICERS, WAITS = sized((200, 4, 50), (5, 2, 3))
FEW, MANY = 8, sized(2048, 16)  # images, whose passes' memory is compared
_PARAMETERS = {"averaging_constant": 0.01, "bins": 2048, "percentile": 99.99}
OBSERVERS = {
    str(name): Observer(name, **{key: _PARAMETERS[key] for key in name.parameters})  # type: ignore[arg-type]
    for name in ActivationObserver
}


TORCHS = "runtimes=[eager,eager_channels_last,torchscript]"  # what the steps that are compared with torch's need


def composed(outputs: str, *overrides: str) -> Config:
    """The configuration of one job, with a float model that trains in seconds."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return conversion.from_hydra(
            compose("config", [f"outputs={outputs}", "train=fast", TORCHS, *overrides]), outputs
        )


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
    """Time a calibration pass for all observers, and one of torch's histogram, over a bare FP32 pass of IMAGES.

    Then the time in which each observer finds its ranges, and the peak memory of a pass over FEW and over MANY images.
    """
    for model in MODELS:
        config = composed(outputs, "latency=off", f"model={model}")
        data = load_data(config.dataset, Path(config.outputs) / "cache")
        images = normalise(data.train.pixels(np.arange(IMAGES)), data.mean, data.std)
        batches = images.split(config.calib.batch_size)
        flow, spec = quantize.FLOWS[config.flow], prepare.quantization_spec(config)
        fused = flow.fuse(float_model.build(config.model, 10, 0), spec, images[:2])

        def prepared(observer: Observer) -> quantize.Prepared:
            return flow.prepare(fused, replace(spec, observer=observer), images[:2])  # noqa: B023

        def bare() -> None:
            with torch.inference_mode():
                for batch in batches:  # noqa: B023
                    fused(batch)  # noqa: B023

        with protocol.threads(config.compute.threads):
            for title, name in (("all observers", "minmax"), ("histogram", "histogram")):
                model_of = prepared(OBSERVERS[name])
                ratio(
                    f"{model}, calibration, {title}, over a bare FP32 pass",
                    partial(quantize.calibrate, model_of, batches),
                    bare,
                )
            for name, observer in OBSERVERS.items():
                if name != "histogram":
                    fed = prepared(observer)
                    quantize.calibrate(fed, batches)
                    took = seconds(partial(torch_layers.read_qparams, fed.module))
                    print(f"{model}, ranges by {name}: {took:.2f} s", flush=True)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        for model in MODELS:
            few, many = (fresh.apply(peak_memory, (outputs, model, count)) for count in (FEW, MANY))
            print(f"{model}, peak memory of a pass over {FEW} images {few} MB, over {MANY:,} {many} MB", flush=True)


def peak_memory(outputs: str, model: str, count: int) -> int:
    """This process's peak memory, in MB of 10^6 bytes, after a calibration pass over `count` images."""
    config = composed(outputs, "latency=off", f"model={model}")
    data = load_data(config.dataset, Path(config.outputs) / "cache")
    indices = np.arange(count) % len(data.train)
    few = normalise(data.train.pixels(indices[:2]), data.mean, data.std)
    flow, spec = quantize.FLOWS[config.flow], replace(prepare.quantization_spec(config), observer=OBSERVERS["minmax"])
    prepared = flow.prepare(flow.fuse(float_model.build(config.model, 10, 0), spec, few), spec, few)
    size = config.calib.batch_size
    parts = np.split(indices, range(size, count, size))
    with protocol.threads(config.compute.threads):
        quantize.calibrate(
            prepared, parts, as_input=lambda part: normalise(data.train.pixels(part), data.mean, data.std)
        )
    return high_water() // 10**6


def high_water() -> int:
    """This process's peak memory so far, in bytes."""
    # Not ru_maxrss, which a process inherits from the one that started it.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def lock(outputs: str) -> None:
    """Time a slice of the machine's lock over a batch of the smallest model, and the wait of a process that times.

    The wait is beside SLICERS threads that compute in slices of 10 ms without a pause.
    """
    machine = MachineLock(Path(outputs))
    config = composed(outputs, "latency=off", "model=tiny")
    model = float_model.build(config.model, 10, 0).eval()
    images = torch.zeros(config.evaluate.batch_size, 3, 32, 32)

    def slices() -> None:
        with machine.computing():
            for _ in range(SLICES):
                with machine.computing():
                    pass

    def batches() -> None:
        with torch.inference_mode():
            for _ in range(SLICES):
                model(images)

    with protocol.threads(1):
        slice_, batch = (statistics.median(seconds(call) for _ in range(ROUNDS)) / SLICES for call in (slices, batches))
    share = f"{slice_ / batch:.4%} of a batch of the smallest model, {1e3 * batch:.1f} ms"
    print(f"a slice of the lock takes {1e6 * slice_:.0f} µs, {share}", flush=True)
    ended = threading.Event()

    def compute() -> None:
        while not ended.is_set():
            with machine.computing():
                time.sleep(0.01)

    with ThreadPoolExecutor(SLICERS) as pool:
        for _ in range(SLICERS):
            pool.submit(compute)
        waits = []
        for _ in range(WAITS):
            asked = time.perf_counter()
            with machine.timing():
                waits.append(time.perf_counter() - asked)
            time.sleep(0.05)
        ended.set()
    print(
        f"a timing waits {statistics.median(waits):.3f} s, at most {max(waits):.3f} s, for slices of 0.01 s", flush=True
    )


def whole_run(outputs: str) -> None:
    """Time runs with a cached float model and FP32 predictions, without timing, over a bare INT8 pass over the images.

    Each run is calibrated with other images.
    """
    jobs = (composed(outputs, "latency=off", f"model={MODELS[0]}", f"calib.seed={seed}") for seed in itertools.count())
    config = next(jobs)
    folder = Path(config.outputs) / "run"
    folder.mkdir(parents=True)
    run.run_experiment(config, folder)
    model = saved_models.load_int8(folder)
    data = load_data(config.dataset, Path(config.outputs) / "cache")
    images = normalise(data.test.pixels(), data.mean, data.std)

    def bare() -> None:
        with quantize.engine(config.engine):
            for batch in images.split(config.evaluate.batch_size):
                model(batch)

    with protocol.threads(config.compute.threads):
        ratio("a run without timing, over a bare INT8 pass", lambda: run.run_experiment(next(jobs), folder), bare)
