"""Timings that runs share where their INT8 models execute the same operators."""

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
from qexp.latency import protocol
from qexp.quantize.saturation import kernels
from qexp.runtimes import RUNTIMES
from qexp.system import cache, machine, machine_lock

log = logging.getLogger(__name__)


# If timings keep failing the validity check, a sweep retries this many times and then shares the last one.
TIMING_ATTEMPTS = 3


def reuses_timings(config: Config) -> bool:
    """True if this run shares timings; `latency.reuse=auto` means the jobs of a sweep do."""
    reuse = config.latency.reuse
    return config.sweep is not None if reuse == "auto" else bool(reuse)


def timing_key(config: Config, data: Data, float_digest: str, int8: nn.Module, image: Tensor) -> str:
    """The key of a run's timings: the operators that its INT8 model executes, the FP32 model, the images, the protocol,
    the code, and the machine with its environment variables.

    Observers and calibration change scales only, not the operators. int8: converted; image: float32 [1, 3, H, W].
    """
    operators = cache.hash_of(quantize.executed(int8, config.engine, image))
    runtimes = [[name, RUNTIMES[name].version()] for name in config.runtimes]
    models = [float_digest, runtimes, config.flow, config.fusion, config.engine, operators]
    settings = {name: value for name, value in identity.plain(config)["latency"].items() if name != "reuse"}
    here = {name: value for name, value in asdict(machine.describe()).items() if name != "load"}
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    where = [here, cuda, kernels.probe().id, torch.__version__, machine.numerics_environment()]
    code = code_digest.of("latency")
    return json.dumps(["timings", models, data.test.digest, settings, where, code], sort_keys=True)


def timings(
    config: Config, key: str, name: str, measure: Callable[[], list[protocol.Timing]]
) -> tuple[list[protocol.Timing], str]:
    """The timings cached under `key` and the name of the run that measured them; or those that `measure` returns, and
    "".

    name: of this run. No other job computes while it measures. Timings that fail `protocol.validity` are cached only
    for jobs of the same sweep, which measure `TIMING_ATTEMPTS` times and then share the last: on a machine that is
    never quiet, more attempts would not be better, only different.
    """
    shared = known(config, key)
    if shared is None:
        with machine_lock.timing():
            shared = known(config, key)  # another process may have timed it while this one waited
            if shared is None:
                made = measure()
                places = [key] if trusted(made) else _attempts(config, key)
                # The first free key. One attempt's is free, or the last attempt would have been shared.
                place = next((one for one in places if cache.find(cache_folder(config), one) is None), None)
                if place is not None:
                    by = np.array(name)
                    cache.arrays(cache_folder(config), place, lambda: {"made_by": by, **protocol.to_arrays(made)})
                return made, ""
    log.info("latency is that of %s, whose INT8 model executes the same (latency.reuse=false times again)", shared[1])
    return shared


def known(config: Config, key: str) -> tuple[list[protocol.Timing], str] | None:
    """The timings cached under `key`, else the last attempt if all were made, and the run that measured them."""
    for place in (key, *_attempts(config, key)[-1:]):
        if (found := cache.find_arrays(cache_folder(config), place)) is not None:
            return protocol.from_arrays(found), str(found["made_by"])
    return None


def _attempts(config: Config, key: str) -> list[str]:
    """The keys of a sweep's timings that failed the validity check, in the order of the attempts; a single run has
    none."""
    sweep = config.sweep
    return [] if sweep is None else [json.dumps([key, sweep, attempt]) for attempt in range(TIMING_ATTEMPTS)]


def trusted(timings: Sequence[protocol.Timing]) -> bool:
    """True if the measurement at each batch size and number of threads is valid."""
    measured: dict[tuple[int, int], list[protocol.Timing]] = {}
    for timing in timings:
        measured.setdefault((timing.batch_size, timing.threads), []).append(timing)
    return all(protocol.validity(side_by_side)[0] for side_by_side in measured.values())
