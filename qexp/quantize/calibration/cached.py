"""Calibration whose statistics are cached on disk: the same images never run through the same model twice.

FP32 activations don't depend on how they will be quantized, so one entry serves every observer, grid and engine. An
entry covers the first n batches; a longer calibration resumes from the longest entry that covers a part of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor, nn

from qexp.quantize.calibration.observers import observers
from qexp.quantize.calibration.passes import calibrate
from qexp.quantize.calibration.recorder import Recorder
from qexp.quantize.calibration.recording_observer import Recording
from qexp.quantize.calibration.tensor_statistics import TensorStats
from qexp.quantize.flow import Prepared
from qexp.quantize.graph.tensor_names import tensor_names
from qexp.system import cache


def calibrate_once(
    prepared: Prepared,
    batches: Sequence[np.ndarray],
    as_input: Callable[[np.ndarray], Tensor],
    folder: Path | None,
    depends_on: str,
    named: Callable[[int], str] = "calibration image {}".format,
) -> None:
    """Calibrate a model with recorders, running only the batches that no entry in `folder` covers (None: no cache).

    batches: the images as they are stored; as_input, named: as in `calibrate`; depends_on: everything else that the
    activations depend on (model, flow, normalisation, libraries), beside the batches and the recorded tensors.
    """
    recorders = _recorders(prepared.module)
    keys = _keys(batches, f"{depends_on} {_sites(prepared.module, recorders)}")

    def make() -> dict[str, np.ndarray]:
        done = 0
        for number in range(len(batches) - 1, 0, -1):
            found = cache.find_arrays(folder, keys[number - 1])
            if found is not None:
                _resume(recorders, found)
                done = number
                break
        before = sum(map(len, batches[:done]))
        calibrate(prepared, batches[done:], lambda position: named(before + position), as_input)
        return pack([recorder.stats for recorder in recorders if recorder.stats is not None])

    _resume(recorders, cache.arrays(folder, keys[-1], make))


def _recorders(module: nn.Module) -> list[Recorder]:
    """Return the recorders, each once, even if several tensors share one."""
    recording = [one for one in observers(module).values() if isinstance(one, Recording)]
    return list({id(one.recorder): one.recorder for one in recording}.values())


def _sites(module: nn.Module, recorders: list[Recorder]) -> str:
    """Describe, for a key, which tensors are recorded, which share a recorder, and how they are clamped before."""
    names, index = tensor_names(module), {id(recorder): i for i, recorder in enumerate(recorders)}
    return repr(
        [
            (name, names.get(name), index[id(observer.recorder)], list(cast(Any, observer)._forward_pre_hooks.values()))
            for name, observer in observers(module).items()
            if isinstance(observer, Recording)
        ]
    )


def _keys(batches: Sequence[np.ndarray], depends_on: str) -> list[str]:
    """Return the key of the first batch, of the first two, …"""
    digest, keys = hashlib.sha256(depends_on.encode()), []
    for batch in batches:
        digest.update(f"{batch.dtype.str} {batch.shape}".encode() + np.ascontiguousarray(batch).tobytes())
        keys.append(f"calibration {digest.hexdigest()}")
    return keys


def _resume(recorders: list[Recorder], packed: Mapping[str, np.ndarray]) -> None:
    for recorder, stats in zip(recorders, unpack(packed), strict=True):
        recorder.resume(stats)


def pack(stats: Sequence[TensorStats]) -> dict[str, np.ndarray]:
    """Concatenate the statistics of n tensors into a few arrays, with their sizes, int64 [n, 2]."""

    def joined(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
        return np.concatenate([np.empty(0, dtype), *arrays], dtype=dtype)

    return {
        "tensors": np.array(len(stats)),
        "sizes": np.array([(len(one.minima), len(one.keys)) for one in stats], np.int64).reshape(-1, 2),
        "minima": joined([one.minima for one in stats], np.float32),
        "maxima": joined([one.maxima for one in stats], np.float32),
        "keys": joined([one.keys for one in stats], np.int32),
        "counts": joined([one.counts for one in stats], np.int64),
    }


def unpack(packed: Mapping[str, np.ndarray]) -> list[TensorStats]:
    """Return the statistics that `pack` concatenated."""
    batches, bins = (np.cumsum(sizes)[:-1] for sizes in packed["sizes"].T)
    parts = [
        *(np.split(packed[name], batches) for name in ("minima", "maxima")),
        *(np.split(packed[name], bins) for name in ("keys", "counts")),
    ]
    return [TensorStats(*arrays) for arrays in zip(*parts, strict=True)][: int(packed["tensors"])]
