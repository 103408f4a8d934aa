"""The stage *measure*: the latency of every variant, side by side, or timings shared by another run."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from qexp import quantize
from qexp.config.schema import Config
from qexp.data.loading import Data
from qexp.latency import protocol, shared_timings, worker
from qexp.pipeline.prepare import Saved, images_of
from qexp.records import Precision, Predictions, Variant
from qexp.runtimes.eager import with_cuda
from qexp.system import machine_lock
from qexp.system.steps import step

LATENCY_IMAGES = 64


@step("time")
def measure_latency(
    config: Config, data: Data, saved: Saved, predictions: Mapping[Variant, Predictions], folder: Path
) -> tuple[list[protocol.Timing], str]:
    """The timings of every variant, and "", measured by one job at a time on the whole machine; with `latency.reuse`
    the timings of another run whose INT8 model executes the same operators (see
    `shared_timings.timing_key`), and that run's name."""
    if not config.latency.enabled:
        return [], ""
    measure = partial(side_by_side, config, data, saved, predictions, folder)
    if not saved.timing_key:
        with machine_lock.timing():
            return measure(), ""
    where = str(folder.relative_to(config.outputs) if folder.is_relative_to(config.outputs) else folder)
    name = f"{config.tracking.name} ({where})" if config.tracking.name else where
    return shared_timings.timings(config, saved.timing_key, name, measure)


def side_by_side(
    config: Config, data: Data, saved: Saved, predictions: Mapping[Variant, Predictions], folder: Path
) -> list[protocol.Timing]:
    """Time every variant side by side, at every batch size and number of threads asked for."""
    images = min(len(data.test), LATENCY_IMAGES)
    inputs = images_of(data, data.test.pixels(np.arange(images)))
    with quantize.engine(config.engine):
        if config.latency.processes:
            logits = {one: predictions[saved.reference_variant(one)].logits[:images] for one in Precision}
            others = {one: predictions[one].logits[:images] for one in saved.of(Precision.int8) if one in predictions}
            return worker.measure(config, folder, inputs.numpy(), logits, saved.all_int8, others)
        timed = with_cuda(saved.variants)
        timings: list[protocol.Timing] = []
        for threads in config.latency.threads:
            for batch_size in config.latency.batch_sizes:
                with protocol.threads(threads):
                    timings += protocol.time_side_by_side(
                        timed,
                        inputs,
                        config.latency,
                        batch_size=batch_size,
                        seed=config.seed,
                        control_among=protocol.fp32_on_cpu(timed),
                    )
        return timings
