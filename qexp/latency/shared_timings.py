"""Timings that another run has measured already: their key, and the choice whether to measure again."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor, nn

from qexp import quantize
from qexp.config import code_digest, identity
from qexp.config.schema import Config, cache_folder
from qexp.data.loading import Data
from qexp.latency import protocol as latency
from qexp.quantize.saturation import kernels
from qexp.system import cache, machine, machine_lock

log = logging.getLogger(__name__)


# How often a sweep times what executes the same until it takes a timing that can't be trusted for what it is.
TIMING_ATTEMPTS = 3


def reuses_timings(config: Config) -> bool:
    """What `latency.reuse` means for this run: auto is true for the jobs of a sweep."""
    reuse = config.latency.reuse
    return config.sweep is not None if reuse == "auto" else bool(reuse)


def timing_key(config: Config, data: Data, float_digest: str, int8: nn.Module, image: Tensor) -> str:
    """Everything that the latencies of a run depend on. Observers and calibration change scales, not what is executed.

    int8: converted; image: float32 [1, 3, H, W]. Beside what the INT8 model executes: the FP32 model, the images, the
    protocol, the code, and the machine with what the environment sets in it.
    """
    operators = cache.hash_of(quantize.executed(int8, config.engine, image))
    models = [float_digest, config.runtimes, config.flow, config.fusion, config.engine, operators]
    protocol = {name: value for name, value in identity.plain(config)["latency"].items() if name != "reuse"}
    here = {name: value for name, value in asdict(machine.describe()).items() if name != "load"}
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    where = [here, cuda, kernels.probe().id, torch.__version__, machine.library_environment()]
    code = code_digest.of("latency")
    return json.dumps(["timings", models, data.test.digest, protocol, where, code], sort_keys=True)


def timings(
    config: Config, key: str, name: str, measure: Callable[[], list[latency.Timing]]
) -> tuple[list[latency.Timing], str]:
    """The timings kept under `key` and the name of the run that made them; or those that `measure` makes now, and "".

    name: of this run. The machine is its own while it times. Timings that `latency.validity` doubts
    are kept for the jobs of the same sweep alone, which make `TIMING_ATTEMPTS` of them and then share the last: on a
    machine that is never quiet more of them would not be better, only different.
    """
    carried = _kept_timings(config, key)
    if carried is None:
        with machine_lock.timing():
            carried = _kept_timings(config, key)  # another process may have timed it while this one waited
            if carried is None:
                made = measure()
                places = [key] if trusted(made) else _attempts(config, key)
                # The first that is free; of the attempts one is, or the last of them would have been carried.
                place = next((one for one in places if cache.find(cache_folder(config), one) is None), None)
                if place is not None:
                    by = np.array(name)
                    cache.arrays(cache_folder(config), place, lambda: {"made_by": by, **latency.to_arrays(made)})
                return made, ""
    log.info("latency is that of %s, whose INT8 model executes the same (latency.reuse=false times again)", carried[1])
    return carried


def _kept_timings(config: Config, key: str) -> tuple[list[latency.Timing], str] | None:
    """Those under `key`, else the last of the attempts if all were made; and who made them."""
    for place in (key, *_attempts(config, key)[-1:]):
        if (kept := cache.find_arrays(cache_folder(config), place)) is not None:
            return latency.from_arrays(kept), str(kept["made_by"])
    return None


def _attempts(config: Config, key: str) -> list[str]:
    """What the timings of a sweep that can't be trusted are kept under, in the order in which they are made; a run by
    itself keeps none."""
    sweep = config.sweep
    return [] if sweep is None else [json.dumps([key, sweep, attempt]) for attempt in range(TIMING_ATTEMPTS)]


def trusted(timings: Sequence[latency.Timing]) -> bool:
    """Whether the measurement at each batch size and number of threads is valid."""
    measured: dict[tuple[int, int], list[latency.Timing]] = {}
    for timing in timings:
        measured.setdefault((timing.batch_size, timing.threads), []).append(timing)
    return all(latency.validity(side_by_side)[0] for side_by_side in measured.values())
