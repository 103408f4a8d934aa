"""A run's models on disk: written for every runtime, and read back. What is evaluated and timed is what was saved."""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qexp import quantize
from qexp.config import code_digest, conversion
from qexp.config.schema import Config, Overflow, Runtime, cache_folder
from qexp.models import float_model
from qexp.quantize.saturation import kernels
from qexp.records import Artifact
from qexp.runtimes import eager, inductor, torchscript
from qexp.runtimes.base import Loaded, OnDemand
from qexp.system import cache

PRECISIONS = ("fp32", "int8")


def variants(runtimes: Collection[Runtime]) -> list[tuple[str, Runtime]]:
    """Every (precision, runtime) among these runtimes that exists, FP32 first."""
    return [(p, runtime) for p in PRECISIONS for runtime in runtimes if p == "fp32" or runtime.takes_int8]


def write(
    config: Config,
    float_digest: str,
    module: Mapping[str, nn.Module],
    images: Tensor,
    folder: Path,
    takes: Mapping[str, Any],
) -> list[Artifact]:
    """Save both models (by precision) for every runtime asked for, into folder/model.

    All runs of a float model share its files. images: float32 [n, 3, H, W], for the trace; takes: which images the
    models take (see `record.images_expected`).
    """
    where = folder / "model"
    where.mkdir(exist_ok=True)
    (where / "images.json").write_text(json.dumps(takes, indent=1, allow_nan=False) + "\n")

    def export(precision: str, runtime: Runtime, path: Path) -> Path:
        if runtime is Runtime.torchscript:
            return torchscript.export(module[precision], images[:2], path)
        return eager.export(module[precision], path)

    artifacts, digests = [], dict[Path, str]()
    with quantize.engine(config.engine):
        for precision, runtime in variants(config.latency.runtimes):
            path = _path(folder, precision, runtime)
            engine = str(config.engine) if precision == "int8" else ""
            if path not in digests:
                made = partial(export, precision, runtime)
                if precision == "fp32":
                    key = float_file_key(config, float_digest, path.name, images.shape[1:])
                    digests[path] = cache.file(cache_folder(config), key, made, path)
                else:
                    digests[path] = cache.digest_of(made(path))
            artifacts.append(Artifact(precision, str(runtime), str(path), digests[path], path.stat().st_size, engine))
    return artifacts


def float_size(module: nn.Module, images: Tensor) -> int:
    """Bytes of a float model as its owner would ship it: a file with its state_dict, in which masks of pruning and what
    else computes weights are settled, and a tensor that layers share stands once.

    images: float32 [n, 3, H, W]. What is saved to be executed is fused, which parts what was shared.
    """
    counted = _Counted()
    with io.BufferedWriter(counted) as file:
        torch.save(quantize.evaluation_copy(module, images).state_dict(), file)
    return counted.size


class _Counted(io.RawIOBase):
    """A file of which nothing is kept but its size."""

    size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.size += len(data)
        return len(data)


def _path(folder: Path, precision: str, runtime: Runtime) -> Path:
    # Only TorchScript has a form of its own; the other runtimes begin with a state_dict.
    return folder / "model" / f"{precision}_{'torchscript' if runtime is Runtime.torchscript else 'eager'}.pt"


def read(config: Config, structures: Mapping[str, nn.Module], folder: Path, runtimes: Collection[Runtime]) -> OnDemand:
    """The models that `write` saved, by `<precision>_<runtime>`. structures: of the precisions wanted (see below); the
    INT8 one becomes the model that is read."""

    def load(precision: str, runtime: Runtime) -> Loaded:
        path = _path(folder, precision, runtime)
        engine = config.engine if precision == "int8" else None
        if runtime is Runtime.torchscript:
            return torchscript.load(path, engine)
        # One runtime alone takes a structure for INT8.
        structure = structures[precision] if precision == "int8" else quantize.sharing_copy(structures[precision])
        if runtime is Runtime.inductor:
            return inductor.load(path, structure)
        return eager.load(path, structure, engine, channels_last=runtime is Runtime.eager_channels_last)

    wanted = [(precision, runtime) for precision, runtime in variants(runtimes) if precision in structures]
    return OnDemand({f"{precision}_{runtime}": partial(load, precision, runtime) for precision, runtime in wanted})


def structures(config: Config, folder: Path, precisions: Collection[str] = PRECISIONS) -> dict[str, nn.Module]:
    """The modules of a run by precision, with meaningless weights, made again from what is in its folder."""
    images = json.loads((folder / "model" / "images.json").read_text())
    module = float_model.build(config.model, images["classes"], config.seed)
    example = torch.zeros(2, *images["shape"])
    fused = quantize.fuse(module, config.flow, config.fusion, example)
    made = {"fp32": fused}
    if "int8" in precisions:
        # A narrowed grid is in the state, not in the structure.
        plain = replace(config.qconfig, overflow=Overflow.none)
        made["int8"] = quantize.skeleton(fused, config.flow, plain, config.engine, example)
    return {precision: made[precision] for precision in precisions}


def load_int8(folder: Path) -> Loaded:
    """The INT8 model that a run saved as a state_dict, from that run's folder (or its artifacts, downloaded).

    Call it within `quantize.engine` of the engine that it was converted for.
    """
    config = conversion.from_plain(json.loads((folder / "config.json").read_text()))
    with torch.random.fork_rng(devices=[]):
        made = structures(config, folder, ["int8"])
    return read(config, made, folder, [Runtime.eager])["int8_eager"]


def content(config: Config, float_digest: str, artifact: Artifact, int8: Loaded | None) -> str:
    """The identity of a saved model as it is executed: the file, the structure that it was read into, the engine.

    int8: the model, if it is one; the structure of others follows from the float model's.
    """
    structure = [repr(int8.module), str(getattr(int8.module, "code", ""))] if int8 is not None else []
    made_of = [float_digest, config.flow, config.fusion]
    return cache.hash_of([artifact.precision, artifact.runtime, artifact.sha256, artifact.engine, made_of, structure])


def float_file_key(config: Config, float_digest: str, name: str, shape: Sequence[int]) -> str:
    """Everything that a file of the fused float model depends on. name: of the file; shape: of an image."""
    made_of = [float_digest, config.flow, config.fusion, list(shape)]
    code = code_digest.of("runtimes")
    return json.dumps(["file", name, made_of, kernels.computed_by(config.compute.threads), code])
