"""One experiment, step by step: from a configuration to a Result.

Takes and returns plain values and doesn't depend on MLflow, so that it can run in a process of its own.
"""

from __future__ import annotations

from pathlib import Path

from qexp.accuracy.target_cpu import target_accuracy
from qexp.config.schema import Config, cache_folder
from qexp.data.loading import load_data
from qexp.models.float_model import load_or_train
from qexp.pipeline import run_files
from qexp.pipeline.analyse import Measured, layer_errors, resolved_params, result
from qexp.pipeline.evaluate import partings, predict, runtime_layers
from qexp.pipeline.measure import measure_latency
from qexp.pipeline.prepare import (
    calibrate,
    check_fusion,
    check_int8,
    comparison_images,
    convert,
    quantization_spec,
    reduce_range,
    save,
    simulate,
)
from qexp.pipeline.race import finishers, race_of, run_race
from qexp.pipeline.run_metrics import headline_variant
from qexp.pipeline.stages import analysing, job_settings
from qexp.quantize import FLOWS
from qexp.records import Precision, Result, Stopped
from qexp.runtimes import int8_kernels
from qexp.system import machine_lock
from qexp.system.steps import noted


def run_experiment(config: Config, folder: Path) -> Result | Stopped:
    """Quantize a model and measure what that changes. folder: an existing one, for all files of the run.

    Stopped: with `racing`, where the run of a sweep can't be what is recommended.

    Raises RunError where the result could not be trusted: the fused model differs from the float model, nothing was
    quantized, an INT8 layer computes another function than its float counterpart, or the saved model's logits differ
    from those of the model in memory.
    """
    with noted(folder / "steps.json"), machine_lock.wait_share() as lock_wait_share, job_settings(config):
        provenance = run_files.tags(config)  # first, since the code on disk may change while the job runs
        data = load_data(config.dataset, cache_folder(config), config.sweep or "")
        fp32 = load_or_train(config, data)
        images = comparison_images(data)
        example = images[:2]

        flow, spec = FLOWS[config.flow], quantization_spec(config)
        fused = flow.fuse(fp32.module, spec, example)
        fusion_difference = check_fusion(config, data, fp32, fused, images)
        prepared = flow.prepare(fused, spec, example)
        calibration = calibrate(prepared, config, data, fp32.digest)
        int8, reduced = reduce_range(convert(prepared), config, data, calibration)
        check_int8(config, int8, reduced, images)
        int8 = simulate(int8, example)

        # From here on it is the saved models, read back, that are evaluated and timed.
        saved = save(config, data, fp32, int8, images, folder)
        race = race_of(config, data, fp32.digest, provenance)
        raced = run_race(config, data, saved, race)
        if raced.reason:
            images_used = run_files.data_tags(config, data, calibration.digest)
            known = {**provenance, **images_used, **run_files.float_tags(fp32)}
            return raced.stopped(config, resolved_params(int8.qconfig, config, reduced), known)
        predictions = predict(config, data, saved, raced.logits)
        parted = partings(config, data, saved, predictions)
        layers_run = runtime_layers(config, data, saved)
        timings, latency_from = measure_latency(config, data, saved, predictions, folder)
        headline = headline_variant(config, saved.of(Precision.int8), timings, {one.runtime for one in parted})
        with analysing(config):
            errors = layer_errors(config, int8, data)
            executing = int8_kernels.of(config, headline.runtime)
            content = saved.content_key(Precision.int8)
            on_target = target_accuracy(config, data, int8, predictions[headline], content, executing)

        measured = Measured(
            fusion_difference=fusion_difference,
            calibration=calibration,
            int8=int8,
            reduced=reduced,
            saved=saved,
            predictions=predictions,
            headline=headline,
            parted=parted,
            runtime_layers=layers_run,
            timings=timings,
            latency_from=latency_from,
            layer_errors=errors,
            on_target=on_target,
            lock_wait_share=lock_wait_share(),
        )
        made = result(config, data, fp32, measured, provenance, folder)
        if race is not None:
            race.leave(finishers(config, saved, predictions, timings, [one.runtime for one in parted]))
        return made
