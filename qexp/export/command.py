"""The work of `python -m qexp.export`: it makes a run's INT8 model again, and writes the folder that ships."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from qexp import quantize, tracking
from qexp.config import conversion
from qexp.config.schema import KERNEL_BITS, Config, ExportCommand, cache_folder, export_name
from qexp.data.loading import Data, load_data
from qexp.errors import ConfigError, InputError
from qexp.export.folder import write
from qexp.models.float_model import load_or_train
from qexp.pipeline import run_files
from qexp.pipeline.prepare import calibrate, comparison_images, convert, images_of, quantization_spec, reduce_range
from qexp.pipeline.stages import job_settings
from qexp.quantize import FLOWS, QuantizedModel
from qexp.records import Precision, RunRecord
from qexp.runtimes.parting import MOST, times_rounding

IMAGES = 16  # that the check script compares
FLOAT_TOLERANCE = 1e-3  # of the float model's logits, as a share of the largest, between two runtimes


@dataclass(frozen=True, eq=False)
class Finished:
    """A finished run: its record, settings, and predictions.npz (float32 logits of FP32 and INT8 on all images)."""

    record: RunRecord
    config: Config
    logits: dict[str, np.ndarray]


def export(command: ExportCommand, cwd: Path) -> str:
    """Write the folder, and return what to print. cwd: the folder that relative paths were typed in.

    Raises InputError where the run can't be used, RunError where its model can't be written in this format.
    """
    run = find(command, cwd)
    name = export_name(str(command.run_id), command.format, command.precision)
    folder = Path(command.folder or Path(command.outputs) / "exports" / name)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"folder={folder} is not empty: remove it, or give another.")
    with job_settings(run.config):
        data, model = made_again(run.config, command.precision)
        size = command.batch_size
        chosen = np.resize(np.arange(len(data.test)), -(-IMAGES // size) * size)  # whole batches
        pixels = data.test.pixels(chosen)
        check_same(run, model, images_of(data, pixels), chosen)
        qparams = model.qparams if isinstance(model, QuantizedModel) else {}
        facts = {
            "input": run_files.images_expected(data),
            "scales": {name: run_files.plain_qparams(value) for name, value in qparams.items()},
            "metrics": dict(run.record.metrics),
            "run": {"id": run.record.run_id, "name": run.record.name, "params": dict(run.record.params)},
        }
        kept = cache_folder(run.config)
        return write(folder, command.format, command.batch_size, model, pixels, images_of(data, pixels), facts, kept)


def find(command: ExportCommand, cwd: Path) -> Finished:
    """The run. Raises InputError where there is none, it has not finished, or is not one of qexp's."""
    outputs, run_id = Path(command.outputs), str(command.run_id)
    store = tracking.connect_existing(command.tracking, outputs, cwd)
    record, _ = tracking.find(store, run_id)
    if tracking.SWEEP_TAG in record.tags:
        raise InputError(
            f"run_id={run_id} is a whole sweep ({record.name!r}); give the id of one of the runs under it."
        )
    if record.status != "FINISHED":
        raise InputError(f"run_id={run_id}: the run {record.name!r} is {record.status}, and only a finished one ships.")
    with tempfile.TemporaryDirectory(prefix="qexp-") as folder:
        files = {name: tracking.fetch(store, run_id, name, Path(folder)) for name in ("config.json", "predictions.npz")}
        for name, file in files.items():
            if file is None:
                raise InputError(f"run_id={run_id}: the run {record.name!r} has no artifact {name}.")
        config = _recorded(run_id, json.loads(Path(str(files["config.json"])).read_text()))
        with np.load(str(files["predictions.npz"])) as arrays:
            logits = {name: arrays[name] for name in ("fp32", "int8")}
    if config.qconfig.simulated and command.precision is Precision.int8:
        raise InputError(
            f"run_id={run_id}: the run {record.name!r} simulates more bits than kernels hold, and nothing of it ships; "
            f"export a run of at most {KERNEL_BITS} bits."
        )
    config = replace(config, outputs=command.outputs, sweep=None)
    return Finished(record, config, logits)


def _recorded(run_id: str, values: dict[str, Any]) -> Config:
    try:
        return conversion.from_plain(values)
    except (ValueError, TypeError, AttributeError, ConfigError, OmegaConfBaseException) as error:
        reason = str(error).partition("\n")[0].removesuffix(".")
        raise InputError(
            f"run_id={run_id}: this version of qexp can't take the configuration of the run ({reason}); repeat it with "
            f"`python -m qexp rerun={run_id}`, and export that."
        ) from error


def made_again(config: Config, precision: Precision) -> tuple[Data, QuantizedModel | nn.Module]:
    """The data of a run, and its INT8 model, quantized with the same calibration images, or its fused float model."""
    data = load_data(config.dataset, cache_folder(config))
    fp32 = load_or_train(config, data)
    example = comparison_images(data)[:2]
    flow, spec = FLOWS[config.flow], quantization_spec(config)
    fused = flow.fuse(fp32.module, spec, example)
    if precision is Precision.fp32:
        return data, fused
    prepared = flow.prepare(fused, spec, example)
    calibration = calibrate(prepared, config, data, fp32.digest)
    int8, _ = reduce_range(convert(prepared), config, data, calibration)
    return data, int8


def check_same(run: Finished, model: QuantizedModel | nn.Module, images: torch.Tensor, chosen: np.ndarray) -> None:
    """Raise InputError where the model that was made again is not the run's, by its answers to some images."""
    fp32, int8 = (run.logits[name][chosen] for name in ("fp32", "int8"))
    if isinstance(model, QuantizedModel):
        with quantize.engine(model.engine), torch.inference_mode():
            same = times_rounding(fp32, int8, model.module(images).numpy()) <= MOST
    else:
        with torch.inference_mode():
            same = np.abs(model(images).numpy() - fp32).max() <= FLOAT_TOLERANCE * np.abs(fp32).max()
    if not same:
        raise InputError(
            f"run_id={run.record.run_id}: its settings make another model now, since the float model, the data or the "
            f"code have changed; repeat it with `python -m qexp rerun={run.record.run_id}`, and export that."
        )
