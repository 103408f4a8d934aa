"""A run's models on disk: saved for every runtime and read back, so that the saved models are evaluated and timed."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qexp import quantize
from qexp.config import code_digest, conversion
from qexp.config.schema import Config, cache_folder
from qexp.models import float_model
from qexp.quantize.saturation import kernels
from qexp.records import Artifact, Precision, Variant
from qexp.runtimes import RUNTIMES
from qexp.runtimes.base import Loaded, OnDemand, Runtime
from qexp.system import cache


def variants(config: Config) -> list[Variant]:
    """The variants that the runtimes asked for execute, FP32 first."""
    each = [Variant(precision, name) for precision in Precision for name in config.runtimes]
    return [one for one in each if RUNTIMES[one.runtime].executes(config.flow, one.precision)]


def write(
    config: Config,
    float_digest: str,
    module: Mapping[Precision, nn.Module],
    images: Tensor,
    folder: Path,
    takes: Mapping[str, Any],
) -> list[Artifact]:
    """Save both models (by precision) for every runtime asked for, into folder/model.

    All runs of a float model share its files. images: float32 [n, 3, H, W], for the trace; takes: describes the
    models' input (see `run_files.images_expected`).
    """
    where = folder / "model"
    where.mkdir(exist_ok=True)
    (where / "images.json").write_text(json.dumps(takes, indent=1, allow_nan=False) + "\n")

    artifacts, digests, kept = [], dict[Path, str](), cache_folder(config)
    with quantize.engine(config.engine):
        for variant in variants(config):
            runtime, path = RUNTIMES[variant.runtime], _path(folder, variant)
            engine = str(config.engine) if variant.precision is Precision.int8 else ""
            if path not in digests:
                shared = variant.precision is Precision.fp32
                key = float_file_key(config, float_digest, path.name, images.shape[1:]) if shared else ""
                digests[path] = export(runtime, module[variant.precision], images[:2], path, kept, key)
            size, seconds = path.stat().st_size, runtime.compile_seconds(path)
            artifacts.append(Artifact(variant, str(path), digests[path], size, engine, seconds))
    return artifacts


def export(runtime: Runtime, model: nn.Module, example: Tensor, path: Path, folder: Path | None, key: str = "") -> str:
    """Save a model for a runtime at `path`, and return the file's SHA-256 in hex.

    folder: of the cache, where the file is kept under the runtime's own key for it, or else under `key` if there is
    one. Other arguments as of `Runtime.export`.
    """
    make, kept = partial(runtime.export, model, example), runtime.key(model, example) or key
    return cache.file(folder, kept, make, path) if kept else cache.digest_of(make(path))


def float_size(module: nn.Module, images: Tensor) -> int:
    """Bytes of a float model as its owner would ship it: its state_dict, with pruning masks and other
    parametrizations applied, and a tensor that layers share saved once.

    images: float32 [n, 3, H, W]. Not the size of the saved file, since fusing splits shared tensors.
    """
    counted = _Counted()
    with io.BufferedWriter(counted) as file:
        torch.save(quantize.evaluation_copy(module, images).state_dict(), file)
    return counted.size


class _Counted(io.RawIOBase):
    """A file that stores nothing but its size."""

    size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.size += len(data)
        return len(data)


def _path(folder: Path, variant: Variant) -> Path:
    return folder / "model" / RUNTIMES[variant.runtime].file(variant.precision)


Structure = Callable[[], nn.Module]
"""Builds the modules of a model, with meaningless weights."""


def read(
    config: Config, structures: Mapping[Precision, Structure], folder: Path, wanted: Collection[Variant]
) -> OnDemand:
    """The saved models of the variants wanted, as far as there is a structure for their precision."""

    def load(variant: Variant) -> Loaded:
        engine = config.engine if variant.precision is Precision.int8 else None
        return RUNTIMES[variant.runtime].load(_path(folder, variant), structures[variant.precision], engine)

    return OnDemand({variant: partial(load, variant) for variant in wanted if variant.precision in structures})


def structures(config: Config, folder: Path) -> dict[Precision, Structure]:
    """The structures of a run's models by precision, built from the files in its folder."""
    images = json.loads((folder / "model" / "images.json").read_text())
    module = float_model.build(config.model, images["classes"], config.seed)
    example = torch.zeros(2, *images["shape"])
    flow = quantize.FLOWS[config.flow]
    spec = quantize.QuantizationSpec(config.qconfig, config.observer, config.engine, config.fusion)
    fused = flow.fuse(module, spec, example)
    return {
        Precision.fp32: partial(quantize.sharing_copy, fused),
        Precision.int8: partial(quantize.skeleton, fused, flow, spec, example),
    }


def load_int8(folder: Path) -> Loaded:
    """The INT8 model that a run saved, in the first of its runtimes, from that run's folder (or its artifacts,
    downloaded).

    Call it within `quantize.engine` of the engine that it was converted for.
    """
    config = conversion.from_plain(json.loads((folder / "config.json").read_text()))
    int8 = next(variant for variant in variants(config) if variant.precision is Precision.int8)
    with torch.random.fork_rng(devices=[]):
        return read(config, structures(config, folder), folder, [int8])[int8]


def content(config: Config, float_digest: str, artifact: Artifact, int8: Loaded | None) -> str:
    """The identity of a saved model as it is executed: the file, the structure that it was read into, the engine.

    int8: the model, None for FP32, whose structure follows from the float model's.
    """
    structure = [repr(int8.module), str(getattr(int8.module, "code", ""))] if int8 is not None else []
    made_of = [float_digest, config.flow, config.fusion, RUNTIMES[artifact.variant.runtime].version()]
    return cache.hash_of([str(artifact.variant), artifact.sha256, artifact.engine, made_of, structure])


def float_file_key(config: Config, float_digest: str, name: str, shape: Sequence[int]) -> str:
    """The key of a file of the fused float model. name: of the file; shape: of an image."""
    made_of = [float_digest, config.flow, config.fusion, list(shape)]
    code = code_digest.of("runtimes")
    return json.dumps(["file", name, made_of, kernels.computed_by(config.compute.threads), code])
