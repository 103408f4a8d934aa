"""Checks of inputs before any run starts, and the provenance tags by which finished runs are recognised."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache as once
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor, nn
from tqdm import tqdm

from qexp import quantize
from qexp.config import identity
from qexp.config.schema import KERNEL_BITS, Calib, Config, RuntimeName, cache_folder
from qexp.data.calibration_images import draw
from qexp.data.loading import Data, digest_of, load_data
from qexp.errors import InputError, RunError
from qexp.latency import protocol
from qexp.models import float_model
from qexp.pipeline import run_files
from qexp.pipeline.prepare import images_of, quantization_spec
from qexp.pipeline.stages import job_settings
from qexp.quantize import qdq
from qexp.quantize.saturation import kernels
from qexp.records import Precision
from qexp.runtimes import RUNTIMES, saved_models
from qexp.system import machine

STATISTICS_IMAGES = 4


def check_inputs(configs: Sequence[Config]) -> None:
    """Open each data set and checkpoint of these jobs, draw as many calibration images as each asks for, and quantize
    each model once in each flow.

    Raises InputError (ConfigError where the machine allows fewer threads than asked for) before any run is started.
    """
    opened: dict[str, Data] = {}
    known: set[str] = set()
    of_models: dict[str, list[Config]] = {}
    for config in configs:
        of_models.setdefault(_plain([config.dataset, config.model]), []).append(config)

    def is_new(*looked_at: object) -> bool:
        key = _plain(looked_at)
        new = key not in known
        known.add(key)
        return new

    for of_model, alike in tqdm(of_models.items(), desc="checking inputs", disable=None, leave=False):
        module: nn.Module | None = None  # one is in memory at a time
        for config in alike:
            if is_new("machine", config.latency, config.runtimes, config.flow, config.engine):
                protocol.check_threads(config.latency.threads, machine.allowed_cores())
                kernels.check_environment(config.engine, kernels.probe(), os.environ)
                check_runtimes(config)
            with job_settings(config):
                of_data = _plain(config.dataset)
                if of_data not in opened:
                    opened[of_data] = load_data(config.dataset, cache_folder(config))
                data = opened[of_data]
                if is_new("images", of_data, replace(config.calib, seed=0)):
                    draw(data.train, config.calib)
                if module is None:
                    module = float_model.check_model(config.model, len(data.classes), data.test.shape)
                    if config.model.get("checkpoint") is None and config.model.get("weights") is None:
                        some = np.arange(min(len(data.train), STATISTICS_IMAGES))
                        float_model.with_statistics(module, images_of(data, data.train.pixels(some)))
                others = with_program(config)
                if is_new("flow", of_model, config.flow, config.fusion, config.engine, others):
                    first = draw(data.train, config.calib)[:1]
                    image, name = images_of(data, data.train.pixels(first)), data.train.source.where(int(first[0]))
                    flow, spec = quantize.FLOWS[config.flow], quantization_spec(config)
                    check_program(quantize.dry_run(module, flow, spec, image, name), others, image)


def with_program(config: Config) -> list[RuntimeName]:
    """The runtimes asked for that execute the INT8 model's Q/DQ program."""
    executes = {name: RUNTIMES[name].executes(config.flow, Precision.int8) for name in config.runtimes}
    return [name for name in config.runtimes if RUNTIMES[name].reads_program and executes[name]]


def check_program(int8: quantize.QuantizedModel, runtimes: Sequence[RuntimeName], image: Tensor) -> None:
    """Raise InputError where the INT8 model has no Q/DQ program, which these runtimes execute, or where one that isn't
    known to take all programs of its operators doesn't execute it.

    image: float32 [1, 3, H, W].
    """
    if not runtimes:
        return
    listed = " and ".join(runtimes)
    with quantize.engine(int8.engine), tempfile.TemporaryDirectory(prefix="qexp-check-") as folder:
        try:
            program = qdq.program(int8.module, image)
            tried = [RUNTIMES[name] for name in runtimes if not RUNTIMES[name].takes(program.graph)]
            files = {runtime.name: Path(folder) / runtime.file(Precision.int8) for runtime in tried}
            for runtime in tried:
                if not files[runtime.name].exists():  # another's
                    runtime.export(int8.module, image, files[runtime.name])
        except RunError as error:
            instead = f"take {listed} out"
            if any(name.simulates for name in runtimes):
                instead = f"use at most {KERNEL_BITS} bits, which kernels execute"
            raise InputError(f"runtimes has {runtimes[0]}, and {error}: {instead}.") from error
        for runtime in tried:
            try:
                runtime.load(files[runtime.name], partial(quantize.blank_copy, int8), int8.engine)(image)
            except RunError as error:
                raise InputError(f"{error}.") from error


def check_runtimes(config: Config) -> None:
    """Raise InputError where the flow or a runtime asked for can't be used here, or none executes the flow's INT8
    models."""
    if missing := config.flow.missing:
        raise InputError(
            f"flow={config.flow} needs the package {' and '.join(missing)}: pip install 'qexp[{config.flow}]'."
        )
    for name in config.runtimes:
        if reason := RUNTIMES[name].unavailable():
            raise InputError(f"runtimes has {name}, and {reason}, or take {name} out.")
    if not any(variant.precision is Precision.int8 for variant in saved_models.variants(config)):
        listed = ",".join(config.runtimes)
        others = [str(name) for name in RuntimeName if RUNTIMES[name].executes(config.flow, Precision.int8)]
        raise InputError(
            f"runtimes=[{listed}]: none of these executes what flow={config.flow} makes in INT8; add "
            f"{' or '.join(others)}."
        )


def _plain(looked_at: object) -> str:
    """Settings as text; equal settings have equal text."""
    return json.dumps(looked_at, default=asdict, sort_keys=True)


def provenance_tags(configs: Sequence[Config]) -> list[dict[str, str]]:
    """For each job the tags of everything that its result would depend on: settings, code, weights, images, machine.

    Resuming compares them with those of finished runs. Opens each data set once. Raises InputError, as `check_inputs`,
    where one can't be used.
    """

    @once
    def opened(dataset: str, folder: Path | None) -> Data:
        return load_data(json.loads(dataset), folder)

    @once
    def drawn(dataset: str, calib: str, folder: Path | None) -> str:
        train = opened(dataset, folder).train
        return digest_of(train.drawn(draw(train, Calib(**json.loads(calib)))))

    found = []
    for config in configs:
        with job_settings(config):
            where = json.dumps(config.dataset), cache_folder(config)
            idle = "calib" in identity.without_effect(config)
            calibration = "" if idle else drawn(where[0], json.dumps(asdict(config.calib)), where[1])
            found.append(run_files.tags(config) | run_files.data_tags(config, opened(*where), calibration))
    return found
