"""One experiment, step by step: from a configuration to a Result.

Takes and gives plain values and knows nothing of MLflow, so that it can be called in a process of its own.
"""

from __future__ import annotations

from pathlib import Path

from qexp.accuracy import target_cpu
from qexp.config.schema import Config, cache_folder
from qexp.data.loading import load_data
from qexp.models import float_model
from qexp.pipeline import run_files, run_metrics
from qexp.pipeline.analyse import Measured, per_layer, result
from qexp.pipeline.evaluate import predicted
from qexp.pipeline.measure import timed
from qexp.pipeline.prepare import (
    calibrated,
    check_int8,
    checked_fusion,
    converted,
    first_images,
    guarded,
    save,
    spec_of,
)
from qexp.pipeline.stages import analysing, job_settings
from qexp.quantize import FLOWS
from qexp.records import Precision, Result
from qexp.system.steps import noted


def run_job(config: Config, folder: Path) -> Result:
    """One experiment. folder: where everything that it produces is written; it exists.

    Raises RunError where the result could not be trusted: the fused model differs from the float model, nothing was
    quantized, a layer of the INT8 model computes another function than in the float model, what was saved gives other
    logits than what was evaluated.
    """
    with noted(folder / "steps.json"), job_settings(config):
        code = run_files.tags(config)  # as it is now, not when the job ends
        data = load_data(config.dataset, cache_folder(config), config.sweep or "")
        fp32 = float_model.float_model(
            config.model, config.train, data, config.seed, Path(config.outputs) / "checkpoints", config.compute.threads
        )
        flow, spec, few = FLOWS[config.flow], spec_of(config), first_images(data)
        fused = flow.fuse(fp32.module, spec, few[:2])
        difference = checked_fusion(config, data, fp32, fused, few)
        prepared = flow.prepare(fused, spec, few[:2])
        calibration = calibrated(prepared, config, data, fp32.digest)
        int8, narrowed = guarded(converted(prepared), config, data, calibration)
        check_int8(config, int8, narrowed, few)
        saved = save(config, data, fp32, int8, folder)
        predictions = predicted(config, data, saved)
        timings, latency_from = timed(config, data, saved, predictions, folder)
        headline = run_metrics.headline_variant(config, saved.first(Precision.int8), timings)
        with analysing(config):
            fidelity = per_layer(config, int8, data)
            answer = target_cpu.answer(config, data, int8, predictions[headline], saved.executed(Precision.int8))
        measured = Measured(
            difference, calibration, int8, narrowed, saved, predictions, headline, timings, latency_from, fidelity,
            answer,
        )  # fmt: skip
        return result(config, data, fp32, measured, code, folder)
