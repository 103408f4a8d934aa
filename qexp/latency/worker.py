"""Latency in fresh processes, one after the other: `measure` starts the workers, `main` runs in them.

A worker is pinned to cores of its own, with its number of threads set before torch is imported. It reads the saved
models from the run's folder, checks that their logits agree with the run's, and times them side by side. As many
workers as there are cores start and load models at the same time; while one measures, the others wait.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from tqdm import tqdm

from qexp.config import conversion, identity
from qexp.config.schema import Config
from qexp.errors import RunError, without_values
from qexp.latency import protocol
from qexp.records import Precision, Variant
from qexp.system import machine, processes

log = logging.getLogger(__name__)

# Images on which a worker's logits are compared with the run's.
CHECKED_IMAGES = 8


@dataclass(frozen=True)
class Order:
    """A worker's input. folder: the run's; scratch: holds `inputs.npy` (float32 [n, 3, H, W]) and `<precision>.npy`
    (their logits, float32 [n, classes]), or `<variant>.npy` of a variant that rounds otherwise; result: the file for
    its timings; precisions: those to time; all_int8: True if no layer of the INT8 model is left in FP32."""

    config: dict[str, object]
    folder: str
    scratch: str
    result: str
    threads: int
    cores: list[int]
    seed: int
    precisions: list[str]
    all_int8: bool


def measure(
    config: Config,
    folder: Path,
    inputs: np.ndarray,
    logits: Mapping[Precision, np.ndarray],
    all_int8: bool,
    others: Mapping[Variant, np.ndarray] | None = None,
) -> list[protocol.Timing]:
    """Time every variant in `latency.processes` fresh processes for each number of threads, and merge their timings.

    inputs: float32 [n, 3, H, W]; logits: the model's for these, float32 [n, classes], by precision; no other
    precision is timed; all_int8: True if no layer of the INT8 model is left in FP32; others: the logits of variants
    that round otherwise. Raises RunError where a worker fails, or its models return other logits.
    """
    settings = config.latency
    with tempfile.TemporaryDirectory(prefix="qexp-timing-") as scratch, ExitStack() as closing:
        np.save(Path(scratch) / "inputs.npy", inputs)
        for one, expected in [*logits.items(), *(others or {}).items()]:
            np.save(Path(scratch) / f"{one}.npy", expected)
        orders = [
            Order(
                config=identity.exact(config),
                folder=str(folder),
                scratch=scratch,
                result=str(Path(scratch) / f"{process}_{threads}.npz"),
                threads=threads,
                cores=machine.separate_cores(threads),
                seed=config.seed + process,
                precisions=list(logits),
                all_int8=all_int8,
            )
            for process in range(settings.processes)
            for threads in settings.threads
        ]
        abreast = len(machine.separate_cores(len(orders)))
        found: list[protocol.Timing] = []
        with tqdm(total=len(orders), desc="timing", unit="process", disable=None, leave=False) as bar:
            for first in range(0, len(orders), abreast):
                for order, process in _ready(orders[first : first + abreast], closing):
                    _go(process, order, _controls(found, order.threads))
                    found += protocol.load(Path(order.result))
                    bar.update()
    place = {threads: index for index, threads in enumerate(settings.threads)}
    sizes = {size: index for index, size in enumerate(settings.batch_sizes)}
    names = list(dict.fromkeys(timing.name for timing in found))

    def key(timing: protocol.Timing) -> tuple[int, int, int]:
        return place[timing.threads], sizes[timing.batch_size], names.index(timing.name)

    return [protocol.merged(list(group)) for _, group in groupby(sorted(found, key=key), key)]


def _controls(found: Sequence[protocol.Timing], threads: int) -> dict[str, str]:
    """Return, by batch size, the runtime whose FP32 model an earlier worker timed as the control.

    All workers must use the same one, for their timings to be merged.
    """
    return {str(t.batch_size): t.variant.runtime for t in found if t.threads == threads and t.control}


def _ready(orders: Sequence[Order], closing: ExitStack) -> list[tuple[Order, subprocess.Popen[str]]]:
    """A process for each order, all of them with their models read. `closing` kills those that are left."""
    started = []
    for order in orders:
        with Path(order.result).with_suffix(".err").open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "qexp.latency.worker"],
                env=environment(order.threads),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        closing.enter_context(process)
        closing.callback(process.kill)
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it ended: `_go` says why
            # Not by a file: there may be credentials among the arguments of a model.
            process.stdin.write(json.dumps(asdict(order)) + "\n")
            process.stdin.flush()
        started.append((order, process))
    for _, process in started:
        assert process.stdout is not None
        process.stdout.readline()  # empty where it ended: `_go` says why
    return started


def _go(process: subprocess.Popen[str], order: Order, control: Mapping[str, str]) -> None:
    """Let a worker time, and wait until it has."""
    process.communicate(json.dumps(control))
    if process.returncode:
        errors = without_values(Path(order.result).with_suffix(".err").read_text())
        said = errors.strip().splitlines() or [f"it ended with status {process.returncode}"]
        log.debug("%s", errors)
        raise RunError(f"timing in a process of its own failed: {said[-1].removeprefix('qexp.errors.RunError: ')}")


def environment(threads: int) -> dict[str, str]:
    """This process's environment for a worker: threads that wait as OpenMP has it by default, and where code is."""
    env = {**os.environ, "QEXP_WORKER": "1", "PYTHONPATH": processes.python_path()}
    if "QEXP_WAIT_POLICY" in env:  # ours, not the user's
        env.pop("OMP_WAIT_POLICY", None)
    return env | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))


def main() -> None:
    """The worker: read the order, load the models, report ready, read the control's runtime, and measure."""
    order = Order(**json.loads(sys.stdin.readline()))
    processes.end_with_parent()  # nobody else's timing is disturbed by an orphan

    import torch

    from qexp import quantize
    from qexp.runtimes import RUNTIMES, saved_models
    from qexp.runtimes.base import agree
    from qexp.runtimes.eager import with_cuda

    torch.set_num_threads(order.threads)
    torch.set_num_interop_threads(1)
    torch.manual_seed(order.seed)
    config = conversion.from_plain(order.config)
    folder, scratch = Path(order.folder), Path(order.scratch)
    inputs = torch.from_numpy(np.load(scratch / "inputs.npy"))
    wanted = [variant for variant in saved_models.variants(config) if variant.precision in order.precisions]
    variants = dict(saved_models.read(config, saved_models.structures(config, folder), folder, wanted))
    print("ready", flush=True)
    control = json.loads(sys.stdin.read() or sys.exit(1))
    machine.pin(order.cores)
    timings: list[protocol.Timing] = []
    with quantize.engine(config.engine), torch.inference_mode():
        for variant, model in variants.items():
            own = scratch / f"{variant}.npy"
            expected = np.load(own if own.exists() else scratch / f"{variant.precision}.npy")[:CHECKED_IMAGES]
            tolerance = RUNTIMES[variant.runtime].tolerance(variant.precision, order.all_int8)
            agree(expected, model(inputs[:CHECKED_IMAGES]).numpy(), variant.precision, tolerance)
        timed = with_cuda(variants)
        for batch_size in config.latency.batch_sizes:
            among = control.get(str(batch_size))
            timings += protocol.time_side_by_side(
                timed,
                inputs,
                config.latency,
                batch_size=batch_size,
                seed=order.seed,
                control_among=[Variant(Precision.fp32, among)] if among else protocol.fp32_on_cpu(variants),
            )
    protocol.save(timings, Path(order.result))


if __name__ == "__main__":
    main()
    os._exit(0)  # what was measured is on disk; to take torch apart would need two seconds more
