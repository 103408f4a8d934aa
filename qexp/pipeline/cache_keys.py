"""What another run has found already: the keys of calibration, predictions and timings, which name all that these
depend on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qexp import quantize
from qexp.config import code_digest, identity
from qexp.config.schema import Config
from qexp.data.splits import Data
from qexp.latency import protocol as latency
from qexp.quantize.saturation import kernels
from qexp.records import Artifact
from qexp.runtimes.base import Loaded
from qexp.system import cache, machine

log = logging.getLogger(__name__)

# How often a sweep times what executes the same until it takes a timing that can't be trusted for what it is.
TIMING_ATTEMPTS = 3

# Environment variables that change how libraries compute or wait, by how they begin.
_ENVIRONMENT = ("OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "FBGEMM_", "ATEN_", "TORCHINDUCTOR_", "LD_PRELOAD")


def content(config: Config, float_digest: str, artifact: Artifact, int8: Loaded | None) -> str:
    """The identity of a saved model as it is executed: the file, the structure that it was read into, the engine.

    int8: the model, if it is one; the structure of others follows from the float model's.
    """
    structure = [repr(int8.module), str(getattr(int8.module, "code", ""))] if int8 is not None else []
    made_of = [float_digest, config.flow, config.fusion]
    return _hash([artifact.precision, artifact.runtime, artifact.sha256, artifact.engine, made_of, structure])


def activations_key(config: Config, data: Data, float_digest: str) -> str:
    """Everything that FP32 activations depend on, in their last bit too, but the images."""
    executed = [float_digest, config.flow, config.fusion, data.mean, data.std]
    return json.dumps(["activations", executed, _where(config), code_digest.code_hash()])


def float_file_key(config: Config, float_digest: str, name: str, shape: Sequence[int]) -> str:
    """Everything that a file of the fused float model depends on. name: of the file; shape: of an image."""
    made_of = [float_digest, config.flow, config.fusion, list(shape)]
    return json.dumps(["file", name, made_of, _where(config), code_digest.code_hash()])


def float_size_key(float_digest: str) -> str:
    """Everything that the size of a float model depends on."""
    return json.dumps(["size", float_digest, torch.__version__, code_digest.code_hash()])


def fusion_key(config: Config, data: Data, float_digest: str) -> str:
    """Everything that the difference of the fused from the float model depends on."""
    return json.dumps(["fusion", activations_key(config, data, float_digest), data.test.digest])


def predictions_key(config: Config, data: Data, model: Sequence[str], images: np.ndarray | None = None) -> str:
    """Everything that a model's answers on evaluation images depend on, in their last bit too.

    model: `content`, and in words what was done with it; images: int64 indices, None for all of them.
    """
    chosen = None if images is None else hashlib.sha256(np.ascontiguousarray(images, np.int64).tobytes()).hexdigest()
    shown = [data.test.digest, data.mean, data.std, config.evaluate.batch_size, chosen]
    return json.dumps(["predictions", model, shown, _where(config), code_digest.code_hash()])


def reuses_timings(config: Config) -> bool:
    """What `latency.reuse` means for this run: auto is true for the jobs of a sweep."""
    reuse = config.latency.reuse
    return config.tracking.parent is not None if reuse == "auto" else bool(reuse)


def timing_key(config: Config, data: Data, float_digest: str, int8: nn.Module, image: Tensor) -> str:
    """Everything that the latencies of a run depend on. Observers and calibration change scales, not what is executed.

    int8: converted; image: float32 [1, 3, H, W]. Beside what the INT8 model executes: the FP32 model, the images, the
    protocol, the code, and the machine with what the environment sets in it.
    """
    operators = _hash(quantize.executed(int8, config.engine, image))
    models = [float_digest, config.flow, config.fusion, config.engine, operators]
    protocol = {name: value for name, value in identity.plain(config)["latency"].items() if name != "reuse"}
    here = {name: value for name, value in asdict(machine.describe()).items() if name != "load"}
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    where = [here, cuda, kernels.probe().id, torch.__version__, _environment()]
    return json.dumps(["timings", models, data.test.digest, protocol, where, code_digest.code_hash()], sort_keys=True)


def has_timings(config: Config, key: str) -> bool:
    """Whether timings are kept under `key`, which may be empty: then there are none."""
    return bool(key) and _kept_timings(config, key) is not None


def timings(
    config: Config, key: str, lock: Path, name: str, measure: Callable[[], list[latency.Timing]]
) -> tuple[list[latency.Timing], str]:
    """The timings kept under `key` and the name of the run that made them; or those that `measure` makes now, and "".

    lock: held while timing, so that only one process does. name: of this run. Timings that `latency.validity` doubts
    are kept for the jobs of the same sweep alone, which make `TIMING_ATTEMPTS` of them and then share the last: on a
    machine that is never quiet more of them would not be better, only different.
    """
    carried = _kept_timings(config, key)
    if carried is None:
        with machine.lock(lock):
            carried = _kept_timings(config, key)  # another process may have timed it while this one waited
            if carried is None:
                made = measure()
                places = [key] if trusted(made) else _attempts(config, key)
                # The first that is free; of the attempts one is, or the last of them would have been carried.
                place = next((one for one in places if cache.find(folder(config), one) is None), None)
                if place is not None:
                    by = np.array(name)
                    cache.arrays(folder(config), place, lambda: {"made_by": by, **latency.to_arrays(made)})
                return made, ""
    log.info("latency is that of %s, whose INT8 model executes the same (latency.reuse=false times again)", carried[1])
    return carried


def _kept_timings(config: Config, key: str) -> tuple[list[latency.Timing], str] | None:
    """Those under `key`, else the last of the attempts if all were made; and who made them."""
    for place in (key, *_attempts(config, key)[-1:]):
        if (kept := cache.find_arrays(folder(config), place)) is not None:
            return latency.from_arrays(kept), str(kept["made_by"])
    return None


def _attempts(config: Config, key: str) -> list[str]:
    """What the timings of a sweep that can't be trusted are kept under, in the order in which they are made; a run by
    itself keeps none."""
    sweep = config.tracking.parent
    return [] if sweep is None else [json.dumps([key, sweep, attempt]) for attempt in range(TIMING_ATTEMPTS)]


def trusted(timings: Sequence[latency.Timing]) -> bool:
    """Whether the measurement at each batch size and number of threads is valid."""
    measured: dict[tuple[int, int], list[latency.Timing]] = {}
    for timing in timings:
        measured.setdefault((timing.batch_size, timing.threads), []).append(timing)
    return all(latency.validity(side_by_side)[0] for side_by_side in measured.values())


def folder(config: Config) -> Path:
    """The cache of all that runs share."""
    return Path(config.outputs) / "cache"


def _where(config: Config) -> list[Any]:
    """What computes, and how: on another CPU, or with another number of threads, last bits differ."""
    here = machine.describe()
    return [config.compute.threads, torch.__version__, here.cpu, here.isa, kernels.probe().id, _environment()]


def _environment() -> dict[str, str]:
    # torch sets TORCHINDUCTOR_CACHE_DIR itself, when its compiler is first imported.
    names = (name for name in sorted(os.environ) if name.startswith(_ENVIRONMENT) and not name.endswith("_CACHE_DIR"))
    return {name: os.environ[name] for name in names}


def _hash(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
