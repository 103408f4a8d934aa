"""The timing protocol's errors where the true ratio is known."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.size import sized
from benchmarks.speed import composed
from qexp.config.schema import Config
from qexp.data.loading import load_data, normalise
from qexp.latency import protocol, worker
from qexp.pipeline import measure, run
from qexp.records import Precision
from qexp.system import machine_lock

REPEATS = sized(40, 1)
PROTOCOL = sized((), ("model=tiny", "latency=quick", "latency.processes=1", "latency.seconds=0.05"))
RUNTIMES = ("eager", "torchscript")


def made(outputs: str, name: str, *overrides: str) -> tuple[Config, Path, np.ndarray, dict[Precision, np.ndarray]]:
    """A run's folder with its saved models, the images to time with, and the models' outputs for them."""
    config = composed(outputs, "saturation.exact_images=0", *overrides)
    folder = Path(outputs) / name
    folder.mkdir(parents=True)
    run.run_experiment(composed(outputs, "latency.enabled=false", "saturation.exact_images=0", *overrides), folder)
    data = load_data(config.dataset, Path(config.outputs) / "cache")
    inputs = normalise(data.test.pixels(np.arange(measure.LATENCY_IMAGES)), data.mean, data.std).numpy()
    kept = np.load(folder / "predictions.npz")
    return config, folder, inputs, {precision: kept[precision] for precision in Precision}


def against_itself(outputs: str) -> None:
    """Time FP32 against itself by the protocol `publish`, as a run's control does.

    Prints how many of the 95% intervals contain 1, and their widths.
    """
    runs = {name: made(outputs, f"aa_{name}", "latency=publish", f"runtimes=[{name}]", *PROTOCOL) for name in RUNTIMES}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in RUNTIMES}
    valid = 0
    for repeat in tqdm(range(REPEATS), desc="A/A", disable=None):
        for name, (config, folder, inputs, logits) in runs.items():
            config.seed = 1000 * repeat
            with machine_lock.timing():
                itself, control = worker.measure(
                    config, folder, inputs, {Precision.fp32: logits[Precision.fp32]}, all_int8=True
                )
            valid += protocol.validity([itself, control])[0]
            interval = protocol.speedup(itself, control)
            found[name].append((interval.low, interval.high))
            tqdm.write(f"{repeat + 1:3} {name:12} [{interval.low:.3f}, {interval.high:.3f}]")
    print(f"{valid} of {REPEATS * len(RUNTIMES)} measurements were on a machine quiet enough to be trusted")
    for name, intervals in found.items():
        holding = sum(low <= 1 <= high for low, high in intervals)
        half = statistics.median((high - low) / 2 for low, high in intervals)
        print(f"{name:12} {holding} of {REPEATS} intervals contain 1.00; half the median width {half:.2%}", flush=True)


def order(outputs: str) -> None:
    """Time FP32 over INT8 by the protocol `standard`, with the variants in one order and in the other."""
    for number, runtimes in enumerate(("[eager,torchscript]", "[torchscript,eager]")):
        with_order = f"runtimes={runtimes}"
        config, folder, inputs, logits = made(outputs, f"order{number}", "latency=standard", with_order, *PROTOCOL)
        with machine_lock.timing():
            timings = worker.measure(config, folder, inputs, logits, all_int8=True)
        by = {timing.name: timing for timing in timings}
        valid, reasons = protocol.validity(timings)
        for runtime in ("eager", "torchscript"):
            ratio = protocol.speedup(by[f"fp32_{runtime}"], by[f"int8_{runtime}"])
            trust = "" if valid else f"  not to be trusted: {'; '.join(reasons)}"
            print(
                f"{runtimes:22} {runtime:12} {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]{trust}", flush=True
            )
