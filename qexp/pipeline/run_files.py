"""The files that a run writes into its folder, and the tags that record the code, machine and data behind it."""

from __future__ import annotations

import csv
import hashlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qexp.config import code_digest, identity
from qexp.config.schema import Config, RuntimeName
from qexp.data.loading import Data, normalise
from qexp.latency import protocol
from qexp.models.float_model import FloatModel
from qexp.pipeline import run_metrics
from qexp.quantize import ReducedRange
from qexp.quantize.saturation import kernels
from qexp.quantize.saturation.accumulators import LayerSaturation
from qexp.records import Artifact, Fidelity, Interval, Layer, Precision, Predictions, QParams, Top1
from qexp.runtimes import RUNTIMES
from qexp.system import machine


def tags(config: Config) -> dict[str, str]:
    """The tags of the machine and the code that a result holds for."""
    here = machine.describe()
    return {
        "cpu": here.cpu,
        "isa": here.isa,
        "torch": str(torch.__version__),  # a plain str: torch's own class would import torch wherever this is unpickled
        "kernel_signature": kernels.probe().id,
        **code_digest.tags(config),
        "git_sha": git_sha(),
    }


def data_tags(config: Config, data: Data, calibration: str) -> dict[str, str]:
    """The tags of the images that a result holds for. calibration: digest of those drawn, empty where there are none.

    The data's digest covers the evaluation images and all labels, and the training images too where the model is
    trained here.
    """
    trained = not (config.model.get("checkpoint") or config.model.get("weights"))
    parts = [data.digest, data.train.digest] if trained else [data.digest]
    digest = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
    return {"data_digest": digest, "calib_digest": calibration[:16] or identity.NOT_APPLICABLE}


def float_tags(fp32: FloatModel) -> dict[str, str]:
    """The tags of the float model that a result holds for."""
    return {"float_model": fp32.source, "float_digest": fp32.digest[:16]}


def images_expected(data: Data) -> dict[str, Any]:
    """The model's input and output: the images' shape, mean and std (of pixels scaled to 0..1), and the classes."""
    mean, std = list(data.mean), list(data.std)
    return {
        "shape": list(data.test.shape),
        "classes": len(data.classes),
        "names": list(data.classes),
        "mean": mean,
        "std": std,
    }


def flavor(data: Data, artifacts: list[Artifact]) -> dict[str, Any]:
    """Arguments of `tracking.Run.log_model`; empty where MLflow can't serve what the INT8 model was saved as."""
    int8 = [one for one in artifacts if one.variant.precision is Precision.int8]
    saved = [one for one in int8 if RuntimeName(one.variant.runtime).served]
    if not saved:
        return {}
    example = normalise(data.test.pixels(np.arange(1)), data.mean, data.std).numpy()
    return {
        "path": Path(saved[0].path),
        "name": "int8",
        "example": example,
        "classes": len(data.classes),
        "metadata": images_expected(data),
    }


def loading_code(config: Config, artifacts: list[Artifact]) -> str:
    """A script that loads the INT8 model beside it."""
    int8 = [one for one in artifacts if one.variant.precision is Precision.int8]
    chosen = max(int8, key=lambda one: RuntimeName(one.variant.runtime).portable)
    head = (
        '"""Loads the INT8 model beside it: float32 [n, 3, H, W], normalised as images.json says, to logits."""'
        "\n\nfrom pathlib import Path\n\nimport torch\n"
    )
    engine = (
        "# Weights are packed for the engine that is set when the model is loaded, and run under that engine only.\n"
        f'torch.backends.quantized.engine = "{config.engine}"\n'
    )
    imports, loading = RUNTIMES[chosen.variant.runtime].loading_code(Path(chosen.path).name)
    return f"{head}{imports}\n{engine}{loading}"


def datasets_used(config: Config, data: Data, calibrated_on: int) -> tuple[dict[str, Any], ...]:
    """The data sets of evaluation and calibration, for MLflow's record of inputs."""
    common = {"name": data.name, "source": str(config.dataset.get("root") or config.dataset["_target_"])}
    shape = list(data.test.shape)
    evaluation = {**common, "digest": data.digest[:32], "context": "evaluation"}
    used = [{**evaluation, "profile": {"images": len(data.test), "shape": shape, "classes": len(data.classes)}}]
    if calibrated_on:
        drawn = hashlib.sha256(json.dumps([data.digest, asdict(config.calib)]).encode()).hexdigest()[:32]
        profile = {"images": calibrated_on, "shape": shape}
        used.append({**common, "digest": drawn, "context": "calibration", "profile": profile})
    return tuple(used)


@cache
def git_sha() -> str:
    """The commit of the current folder's checkout, with `+` where it has changes; `none` outside of one."""
    try:
        sha = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return "none"
    return sha.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def write_files(
    folder: Path,
    config: Config,
    predictions: Mapping[str, Predictions],
    qparams: Mapping[str, QParams],
    ranges_taken: Mapping[str, str],
    timings: list[protocol.Timing],
    latency_from: str,
    artifacts: list[Artifact],
) -> dict[str, str]:
    """Write all files but the table of layers into the run's folder. Returns artifact path -> path on disk.

    ranges_taken: of activations, in words, by tensor name.
    """
    fp32, int8 = predictions["fp32"], predictions["int8"]
    np.savez_compressed(
        folder / "predictions.npz",
        fp32=fp32.logits, int8=int8.logits, labels=fp32.labels, image_ids=np.array(fp32.image_ids),
    )  # fmt: skip
    _json(folder / "config.json", identity.plain(config))
    _json(folder / "qparams.json", {name: plain_qparams(value) for name, value in qparams.items()})
    _csv(folder / "tensors.csv", TENSORS, [_tensor(name, value, ranges_taken) for name, value in qparams.items()])
    _json(folder / "model" / "artifacts.json", [_artifact(a) for a in artifacts])
    (folder / "model" / "load.py").write_text(loading_code(config, artifacts))
    names = ["predictions.npz", "config.json", "qparams.json", "tensors.csv", "model"]
    if timings:
        rows = [_timing(t) for t in timings]
        _csv(folder / "latency.csv", list(rows[0]), rows)
        build = {"version": torch.__version__, "build": torch.__config__.show(), "engine": str(config.engine)}
        measured_by = {"latency_from": latency_from} if latency_from else {}
        where = {"machine": asdict(machine.describe()), "torch": build, **measured_by}
        validity = [
            {"batch_size": batch_size, "threads": threads, "reasons": reasons}
            for (batch_size, threads), reasons in run_metrics.reasons_by_conditions(config, timings).items()
        ]
        speedups = [_pair(*pair) for pair in protocol.pairs(timings)]
        _json(folder / "latency.json", {**where, "rows": rows, "speedups": speedups, "validity": validity})
        samples = {f"{t.name}.batch{t.batch_size}.threads{t.threads}": t.samples for t in timings}
        np.savez_compressed(folder / "latency_samples.npz", **samples)  # type: ignore[arg-type]
        names += ["latency.json", "latency.csv", "latency_samples.npz"]
    return {name: str(folder / name) for name in names}


COLUMNS = (
    "name", "kind", "int8", "sqnr_db", "own_sqnr_db", "weight_sqnr_db", "clipped", "saturated", "highest", "narrowed",
    "scale", "kernel", "reason",
)  # fmt: skip


def write_top1(folder: Path, top1: Top1) -> dict[str, str]:
    """Write the predicted classes (top1.npz, without pickle). Returns paths as `write_files`."""
    np.savez_compressed(folder / "top1.npz", allow_pickle=False, **top1.arrays())
    return {"top1.npz": str(folder / "top1.npz")}


def write_layers(
    folder: Path,
    config: Config,
    layers: tuple[Layer, ...],
    fidelity: tuple[Fidelity, ...],
    sums: tuple[LayerSaturation, ...],
    reduced: tuple[ReducedRange, ...],
) -> dict[str, str]:
    """Write the table of layers (layers.csv, in execution order) and its chart. Returns paths as `write_files`.

    saturated: share of the layer's outputs that 16-bit accumulators changed, where both were run; highest: the largest
    activation code that entered the layer there, if its weights let accumulators overflow (a range of 7 bits ends at
    127); narrowed: the side whose range overflow=layers reduced to 7 bits.
    """
    of_layers, measured = {layer.name: layer for layer in layers}, {row.name: row for row in fidelity}
    shares, sides = {row.name: row.share for row in sums}, {row.name: str(row.side) for row in reduced}
    codes = {row.name: row.highest for row in sums if row.highest}
    rows = []
    for name in dict.fromkeys([*measured, *of_layers]):
        row: dict[str, Any] = {"name": name, "saturated": shares.get(name), "narrowed": sides.get(name)}
        row["highest"] = codes.get(name)
        for by in (of_layers, measured):
            row |= asdict(by[name]) if name in by else {}
        rows.append({column: row.get(column) for column in COLUMNS})
    _csv(folder / "layers.csv", COLUMNS, rows)
    files = {"layers.csv": str(folder / "layers.csv")}
    if fidelity:
        from qexp.report import charts

        model, qconfig = config.model["_target_"].rpartition(".")[2], config.qconfig
        how = f"overflow={qconfig.overflow}, flow={config.flow}, engine={config.engine}"
        title = f"{model}, weights {qconfig.weight.granularity}, {how}"
        charts.save(charts.layers(fidelity, title), folder / "layers.png")
        files["layers.png"] = str(folder / "layers.png")
    return files


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False, default=str) + "\n")


def _csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


TENSORS = ("name", "kind", "range_taken", "channels", "lowest", "highest", "scale", "zero_point", "qmin", "qmax")


def _tensor(name: str, value: QParams, ranges_taken: Mapping[str, str]) -> dict[str, Any]:
    """A row of the table of quantized tensors (tensors.csv): the values that its codes reach, and its grid.

    channels: how many grids it has; scale: their largest; zero_point: empty where they differ.
    """
    low, high = ((value.scale * (code - value.zero_point)) for code in (value.qmin, value.qmax))
    points = set(value.zero_point.tolist())
    grid = {"scale": float(value.scale.max()), "zero_point": points.pop() if len(points) == 1 else None}
    reach = {"channels": value.scale.size, "lowest": float(low.min()), "highest": float(high.max())}
    taken = ranges_taken.get(name)
    kind = {"kind": "weight" if taken is None else "activation", "range_taken": taken or "weights"}
    return {"name": name, **kind, **reach, **grid, "qmin": value.qmin, "qmax": value.qmax}


def plain_qparams(value: QParams) -> dict[str, Any]:
    """Quantization parameters as plain values."""
    plain = {"scale": value.scale.tolist(), "zero_point": value.zero_point.tolist()}
    return {**plain, "qmin": value.qmin, "qmax": value.qmax, "axis": value.axis}


def _artifact(artifact: Artifact) -> dict[str, Any]:
    plain = asdict(artifact)
    return {**plain.pop("variant"), **plain, "path": Path(artifact.path).name}


def _timing(timing: protocol.Timing) -> dict[str, Any]:
    summary = asdict(timing.summary)
    return {
        "variant": timing.name,
        "repeats": str(timing.variant) if timing.control else "",
        "batch_size": timing.batch_size,
        "threads": timing.threads,
        **summary,
        "images_per_second": 1000 * timing.batch_size / summary["p50"],
        "first_ms": timing.first_ms,
        "processes": len(timing.conditions),
        "rounds": len(timing.rounds),
        "started": timing.started,
        "ended": timing.ended,
    }


def _pair(fp32: protocol.Timing, int8: protocol.Timing, speedup: Interval) -> dict[str, Any]:
    names = {"fp32": str(fp32.variant), "int8": str(int8.variant)}
    return {**names, "batch_size": fp32.batch_size, "threads": fp32.threads, **asdict(speedup)}
