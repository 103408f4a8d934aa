"""A sweep of many runs, simulated and written into a store within seconds: its settings, predicted classes and metrics
are those of a real one in form."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from mlflow.store.tracking.dbmodels import models
from mlflow.utils.file_utils import local_file_uri_to_path
from sqlalchemy import create_engine, insert

from qexp import statistics, tracking
from qexp.config import conversion, identity
from qexp.config.composition import CONF
from qexp.metrics import Metric
from qexp.records import SAME_TAG, Interval, RunRecord, Top1

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
RUNTIMES = ("eager", "torchscript")
MARGIN = 0.005

# What each value costs: the share of images whose class changes, and the log of the speedup.
AXES: dict[str, dict[str, tuple[float, float]]] = {
    "qconfig": {"per_channel": (0.001, 0.0), "per_tensor": (0.006, 0.03)},
    "qconfig.activation.scheme": {"asymmetric": (0.001, 0.0), "symmetric": (0.005, 0.02)},
    "observer": {"minmax": (0.001, 0.0), "mse": (0.001, 0.0), "entropy": (0.006, 0.0), "percentile": (0.02, 0.0)},
    "calib.batches": {"1": (0.012, 0.0), "2": (0.006, 0.0), "4": (0.003, 0.0), "8": (0.001, 0.0), "16": (0.001, 0.0),
                      "32": (0.001, 0.0), "64": (0.001, 0.0)},
}  # fmt: skip


def simulated_sweep(count: int = 1000, images: int = 10_000, seed: int = 0) -> tuple[list[RunRecord], dict[str, Top1]]:
    """`count` finished runs in the order in which they started, and the predicted classes of each by its id.

    Settings vary along `AXES`, and each combination has as many calibration seeds as fit. Both runtimes agree bit for
    bit. The differences in accuracy are from about -0.2 to -2.5 points, the speedups about 3.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(len(CLASSES), size=images).astype(np.int32)
    fp32 = np.where(rng.random(images) < 0.93, labels, (labels + 1) % len(CLASSES)).astype(np.int32)
    difficulty = rng.random(images)
    grid = list(itertools.product(*(values.items() for values in AXES.values())))
    base, now = _params(), time.time() - 60 * count
    records, top1 = [], {}
    for number in range(count):
        combination, calib_seed = grid[number % len(grid)], number // len(grid)
        setting = dict(zip(AXES, (value for value, _ in combination), strict=True))
        changed_share = sum(cost for _, (cost, _) in combination)
        # Hard images change in whatever setting, so that runs are correlated.
        changed = difficulty + 0.01 * rng.standard_normal(images) > 1 - changed_share
        int8 = np.where(changed, np.where(fp32 == labels, (labels + 2) % len(CLASSES), labels), fp32).astype(np.int32)
        int8 = np.where(changed & (rng.random(images) < 0.4), fp32, int8).astype(np.int32)
        run_id = uuid.UUID(int=rng.integers(2**63).item() << 64 | number).hex
        speedup = 3.0 * np.exp(sum(gain for _, (_, gain) in combination) + 0.01 * rng.standard_normal())
        params = {**base, **setting, "calib.seed": str(calib_seed)}
        tags = {**_TAGS, "config_hash": run_id[-16:], "mlflow.runName": " ".join(setting.values())}
        start = now + 60 * number
        records.append(
            RunRecord(
                run_id, " ".join(setting.values()), "FINISHED", start, start + 50, params,
                _metrics(labels, fp32, int8, speedup), tags,
            )
        )  # fmt: skip
        top1[run_id] = Top1(labels, fp32, dict.fromkeys(RUNTIMES, int8), CLASSES)
    return records, top1


_TAGS = {
    "cpu": "simulated", "isa": "avx512_vnni", "kernel_signature": "simulated", "torch": "2.13.0", "host": "simulated",
    "data_digest": "simulated", "float_digest": "simulated", "float_model": "simulated", "code_hash": "simulated",
    "accuracy_source": "executed", "latency_valid": "true", "saturation": "impossible", "fastest.fp32": "torchscript",
    "verdict": "undecided", "verdict.margin": str(MARGIN), "verdict.images": "10000",
    SAME_TAG: " ".join(RUNTIMES), "mlflow.user": "nobody", "mlflow.source.name": "qexp", "mlflow.source.type": "LOCAL",
}  # fmt: skip


def _params() -> dict[str, str]:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        composed = compose("config", ["model=resnet18", "dataset=digits"])
    found = identity.params(conversion.from_hydra(composed, "."), {"model": "resnet18", "dataset": "digits"}, {})
    return {**found, "resolved.runtime": "torchscript", "resolved.overflow": "none", "dataset.margin": str(MARGIN)}


@cache
def _tests(fp32_only: int, int8_only: int, n: int) -> tuple[Interval, float, float]:
    return (
        statistics.tango(fp32_only, int8_only, n),
        statistics.non_inferiority(fp32_only, int8_only, n, MARGIN),
        statistics.mcnemar(fp32_only, int8_only),
    )


def _metrics(labels: np.ndarray, fp32: np.ndarray, int8: np.ndarray, speedup: float) -> dict[str, float]:
    a, b = fp32 == labels, int8 == labels
    fp32_only, int8_only, n = int((a & ~b).sum()), int((b & ~a).sum()), len(labels)
    delta, non_inferiority_p, mcnemar_p = _tests(fp32_only, int8_only, n)
    ms = 20 / speedup
    metrics: dict[str, float] = {
        Metric.accuracy_fp32: float(a.mean()), Metric.accuracy_int8: float(b.mean()),
        Metric.accuracy_delta: delta.value, Metric.delta_low: delta.low, Metric.delta_high: delta.high,
        Metric.target_accuracy: float(b.mean()), Metric.target_delta: delta.value,
        Metric.target_delta_low: delta.low, Metric.target_delta_high: delta.high, Metric.target_images: float(n),
        Metric.target_fp32_only: float(fp32_only), Metric.target_int8_only: float(int8_only),
        Metric.non_inferiority_p: non_inferiority_p,
        Metric.mcnemar_p: mcnemar_p,
        Metric.images: float(n), Metric.agreement: float((fp32 == int8).mean()), Metric.size_int8: 11.3,
        Metric.size_fp32: 44.8, Metric.layers_int8: 21.0, Metric.layers_float: 0.0, Metric.calibration_images: 512.0,
        Metric.latency_fp32: 20.0, Metric.latency_int8: ms, Metric.speedup: speedup,
        Metric.speedup_low: speedup * 0.99, Metric.speedup_high: speedup * 1.01,
    }  # fmt: skip
    for runtime in RUNTIMES:
        factor = 1.0 if runtime == "torchscript" else 0.8
        metrics |= {
            Metric.runtime_accuracy.of(runtime): float(b.mean()), Metric.runtime_agreement.of(runtime): 1.0,
            Metric.fp32_only.of(runtime): float(fp32_only), Metric.int8_only.of(runtime): float(int8_only),
            Metric.runtime_latency.of(f"int8_{runtime}"): ms / factor,
            Metric.runtime_latency.of(f"fp32_{runtime}"): 20.0,
            Metric.runtime_speedup.of(runtime): speedup * factor,
            Metric.runtime_speedup_low.of(runtime): speedup * factor * 0.99,
            Metric.runtime_speedup_high.of(runtime): speedup * factor * 1.01,
        }  # fmt: skip
    return {str(name): float(value) for name, value in metrics.items()}


def write_sweep(
    store: tracking.Store, records: Sequence[RunRecord], top1: Mapping[str, Top1], name: str = "sweep simulated"
) -> RunRecord:
    """Write the runs and their files into a store that is a database, under a new parent run, which is returned.

    Into MLflow's own tables, many rows at once: its client would take minutes for a thousand runs.
    """
    parent = tracking.open_parent(store, experiment=store.experiment_name("digits"), name=name, tags={})
    location = store.client.get_experiment(parent.experiment_id).artifact_location
    rows: dict[Any, list[dict[str, Any]]] = {}
    for record in records:
        key = {"run_uuid": record.run_id}
        started, ended = int(1000 * record.start), int(1000 * (record.end or 0))
        where = f"{location}/{record.run_id}/artifacts"
        rows.setdefault(models.SqlRun, []).append(
            {
                **key, "name": record.name, "source_type": "LOCAL", "source_name": "", "entry_point_name": "",
                "user_id": "nobody", "status": record.status, "start_time": started, "end_time": ended or None,
                "source_version": "", "lifecycle_stage": "active", "artifact_uri": where,
                "experiment_id": int(parent.experiment_id),
            }
        )  # fmt: skip
        tags = {**record.tags, tracking.PARENT_TAG: parent.id}
        named = ((models.SqlParam, record.params), (models.SqlTag, tags))
        for table, values in named:
            rows.setdefault(table, []).extend({**key, "key": name, "value": value} for name, value in values.items())
        metrics = [
            {**key, "key": name, "value": value, "timestamp": ended or started, "step": 0, "is_nan": False}
            for name, value in record.metrics.items()
        ]
        for table in (models.SqlMetric, models.SqlLatestMetric):
            rows.setdefault(table, []).extend(metrics)
        if record.run_id in top1:
            folder = Path(local_file_uri_to_path(where))
            folder.mkdir(parents=True)
            np.savez_compressed(folder / "top1.npz", allow_pickle=False, **top1[record.run_id].arrays())
    engine = create_engine(store.uri)
    with engine.begin() as connection:
        for table, of_table in rows.items():
            connection.execute(insert(table), of_table)
    engine.dispose()
    tracking.close_parent(parent, "FINISHED", {"finished": len(records)})
    return tracking.find(store, parent.id)[0]
