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
from qexp.records import Artifact, Precision, Variant
from qexp.runtimes import eager, inductor, torchscript
from qexp.runtimes.base import Loaded, OnDemand
from qexp.system import cache


def variants(runtimes: Collection[Runtime]) -> list[Variant]:
    """What these runtimes execute, FP32 first."""
    each = [Variant(precision, runtime) for precision in Precision for runtime in runtimes]
    return [one for one in each if one.precision is Precision.fp32 or Runtime(one.runtime).takes_int8]


def write(
    config: Config,
    float_digest: str,
    module: Mapping[Precision, nn.Module],
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

    def export(variant: Variant, path: Path) -> Path:
        if variant.runtime == Runtime.torchscript:
            return torchscript.export(module[variant.precision], images[:2], path)
        return eager.export(module[variant.precision], path)

    artifacts, digests = [], dict[Path, str]()
    with quantize.engine(config.engine):
        for variant in variants(config.latency.runtimes):
            path = _path(folder, variant)
            engine = str(config.engine) if variant.precision is Precision.int8 else ""
            if path not in digests:
                made = partial(export, variant)
                if variant.precision is Precision.fp32:
                    key = float_file_key(config, float_digest, path.name, images.shape[1:])
                    digests[path] = cache.file(cache_folder(config), key, made, path)
                else:
                    digests[path] = cache.digest_of(made(path))
            artifacts.append(Artifact(variant, str(path), digests[path], path.stat().st_size, engine))
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


def _path(folder: Path, variant: Variant) -> Path:
    # Only TorchScript has a form of its own; the other runtimes begin with a state_dict.
    form = Runtime.torchscript if variant.runtime == Runtime.torchscript else Runtime.eager
    return folder / "model" / f"{Variant(variant.precision, form)}.pt"


def read(
    config: Config, structures: Mapping[Precision, nn.Module], folder: Path, runtimes: Collection[Runtime]
) -> OnDemand:
    """The models that `write` saved. structures: of the precisions wanted (see below); the INT8 one becomes the model
    that is read."""

    def load(variant: Variant) -> Loaded:
        path, int8 = _path(folder, variant), variant.precision is Precision.int8
        engine = config.engine if int8 else None
        if variant.runtime == Runtime.torchscript:
            return torchscript.load(path, engine)
        # One runtime alone takes a structure for INT8.
        structure = structures[variant.precision]
        structure = structure if int8 else quantize.sharing_copy(structure)
        if variant.runtime == Runtime.inductor:
            return inductor.load(path, structure)
        return eager.load(path, structure, engine, channels_last=variant.runtime == Runtime.eager_channels_last)

    return OnDemand({one: partial(load, one) for one in variants(runtimes) if one.precision in structures})


def structures(
    config: Config, folder: Path, precisions: Collection[Precision] = tuple(Precision)
) -> dict[Precision, nn.Module]:
    """The modules of a run by precision, with meaningless weights, made again from what is in its folder."""
    images = json.loads((folder / "model" / "images.json").read_text())
    module = float_model.build(config.model, images["classes"], config.seed)
    example = torch.zeros(2, *images["shape"])
    fused = quantize.fuse(module, config.flow, config.fusion, example)
    made = {Precision.fp32: fused}
    if Precision.int8 in precisions:
        # A narrowed grid is in the state, not in the structure.
        plain = replace(config.qconfig, overflow=Overflow.none)
        made[Precision.int8] = quantize.skeleton(fused, config.flow, plain, config.engine, example)
    return {precision: made[precision] for precision in precisions}


def load_int8(folder: Path) -> Loaded:
    """The INT8 model that a run saved as a state_dict, from that run's folder (or its artifacts, downloaded).

    Call it within `quantize.engine` of the engine that it was converted for.
    """
    config = conversion.from_plain(json.loads((folder / "config.json").read_text()))
    with torch.random.fork_rng(devices=[]):
        made = structures(config, folder, [Precision.int8])
    return read(config, made, folder, [Runtime.eager])[Variant(Precision.int8, Runtime.eager)]


def content(config: Config, float_digest: str, artifact: Artifact, int8: Loaded | None) -> str:
    """The identity of a saved model as it is executed: the file, the structure that it was read into, the engine.

    int8: the model, if it is one; the structure of others follows from the float model's.
    """
    structure = [repr(int8.module), str(getattr(int8.module, "code", ""))] if int8 is not None else []
    made_of = [float_digest, config.flow, config.fusion]
    return cache.hash_of([str(artifact.variant), artifact.sha256, artifact.engine, made_of, structure])


def float_file_key(config: Config, float_digest: str, name: str, shape: Sequence[int]) -> str:
    """Everything that a file of the fused float model depends on. name: of the file; shape: of an image."""
    made_of = [float_digest, config.flow, config.fusion, list(shape)]
    code = code_digest.of("runtimes")
    return json.dumps(["file", name, made_of, kernels.computed_by(config.compute.threads), code])
