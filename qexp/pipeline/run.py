"""The pipeline: from a configuration to a Result, and the check of its inputs before any run is started.

Both `check_inputs` and `run_job` take and give plain values, set every global that they depend on, and know nothing
of MLflow, so that they can be called in a process of their own.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache as once
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from qexp import quantize
from qexp.accuracy import predictions, target_cpu
from qexp.config import identity
from qexp.config.schema import (
    ActivationObserver,
    Calib,
    Config,
    Engine,
    Flow,
    Overflow,
    QConfig,
    Runtime,
    Target,
    cache_folder,
)
from qexp.data.splits import Data, count_shared, digest_of, draw, load_data, normalise
from qexp.errors import RunError
from qexp.latency import protocol, shared_timings, worker
from qexp.models import float_model, inference
from qexp.pipeline import cache_keys, metrics, run_files, warnings
from qexp.pipeline.turn import Turn
from qexp.quantize.inspection.layer_check import FEW, check_layers
from qexp.quantize.inspection.layer_errors import at_a_time, layer_fidelity
from qexp.quantize.saturation import kernels
from qexp.quantize.torch_backend.slow_depthwise import without_fast_kernel
from qexp.records import Artifact, Fidelity, Layer, Predictions, Result
from qexp.runtimes import inductor, saved_models
from qexp.runtimes.base import Loaded, agree, with_cuda
from qexp.system import cache, machine

log = logging.getLogger(__name__)

AGREEMENT_IMAGES = 256
STATISTICS_IMAGES = 4
SATURATION_IMAGES = 64
LATENCY_IMAGES = 64
ALONE = Turn()
# One for the whole machine, whoever times on it and whatever TMPDIR is.
TIMING_LOCK = (Path("/tmp") if Path("/tmp").is_dir() else Path(tempfile.gettempdir())) / "qexp-timing.lock"


def check_inputs(configs: Sequence[Config]) -> None:
    """Open each data set and checkpoint of these jobs, draw as many calibration images as each asks for, and take each
    model through each flow once.

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
            if is_new("machine", config.latency, config.engine):
                protocol.check_threads(config.latency.threads, machine.allowed_cores())
                kernels.check_environment(config.engine, kernels.probe(), os.environ)
                if config.latency.enabled and Runtime.inductor in config.latency.runtimes:
                    inductor.check_compiler()
            with _globals(config):
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
                        float_model.with_statistics(module, _images(data, data.train.pixels(some)))
                if is_new("flow", of_model, config.flow, config.fusion, config.engine):
                    first = draw(data.train, config.calib)[:1]
                    image, name = _images(data, data.train.pixels(first)), data.train.source.where(int(first[0]))
                    settings = config.flow, config.fusion, resolved(config), config.observer, config.engine
                    quantize.dry_run(module, *settings, image, name)


def _plain(looked_at: object) -> str:
    """Settings as text, the same for those that are alike."""
    return json.dumps(looked_at, default=asdict, sort_keys=True)


def described(configs: Sequence[Config]) -> list[dict[str, str]]:
    """For each of these, the tags of what its result would depend on: settings, code, weights, images, machine.

    Opens each data set once. Raises as `check_inputs` does where one can't be used.
    """

    @once
    def opened(dataset: str, folder: Path) -> Data:
        return load_data(json.loads(dataset), folder)

    @once
    def drawn(dataset: str, calib: str, folder: Path) -> str:
        train = opened(dataset, folder).train
        return digest_of(train.drawn(draw(train, Calib(**json.loads(calib)))))

    found = []
    for config in configs:
        with _globals(config):
            where = json.dumps(config.dataset), cache_folder(config)
            idle = "calib" in identity.without_effect(config)
            calibration = "" if idle else drawn(where[0], json.dumps(asdict(config.calib)), where[1])
            found.append(run_files.tags(config) | run_files.data_tags(config, opened(*where), calibration))
    return found


def run_job(config: Config, folder: Path, turn: Turn = ALONE) -> Result:
    """One experiment. folder: where everything that it produces is written; it exists. turn: among the jobs of a sweep.

    Raises RunError where the result could not be trusted: the fused model differs from the float model, nothing was
    quantized, a layer of the INT8 model computes another function than in the float model, what was saved gives other
    logits than what was evaluated.
    """
    with _globals(config):
        known = run_files.tags(config)  # of the code as it is now, not when the job ends
        data = load_data(config.dataset, cache_folder(config), turn.sweep)
        qconfig = resolved(config)
        fp32 = float_model.float_model(
            config.model, config.train, data, config.seed, Path(config.outputs) / "checkpoints", config.compute.threads
        )
        few = _images(data, data.test.pixels(np.arange(min(len(data.test), AGREEMENT_IMAGES))))
        fused = quantize.fuse(fp32.module, config.flow, config.fusion, few[:2])
        difference = checked_fusion(config, data, fp32, fused, few)

        prepared = quantize.prepare(fused, config.flow, qconfig, config.observer, config.engine, few[:2])
        prepared, calibration = calibrated(prepared, data, config, qconfig, fp32.digest)
        # Around small steps torch's other threads wait for work by spinning, which takes time from the job beside.
        with protocol.threads(1):
            qparams = quantize.read_qparams(prepared)
            int8 = quantize.convert(prepared, config.flow, config.engine)
            layers = checked_layers(quantize.layers(int8, config.flow, config.engine))
            if said := why_guarded(config, qconfig.overflow, layers, calibration.narrowed):
                log.info("%s", said)
            check_layers(fused, int8, config.flow, config.engine, few[:: -(-len(few) // FEW)], qparams)

            skeleton = quantize.skeleton(fused, config.flow, qconfig, config.engine, few[:2])
            in_memory = {"fp32": fused, "int8": int8}
            artifacts = saved_models.write(config, fp32.digest, in_memory, few, folder, run_files.images_expected(data))
            float_bytes = shipped_size(config, fp32, few)
            # torch.compile takes half a minute, and only the processes that time need it.
            here = [runtime for runtime in config.latency.runtimes if runtime is not Runtime.inductor]
            variants = saved_models.read(config, {"fp32": fused, "int8": skeleton}, folder, here)
            all_int8 = all(layer.int8 for layer in layers)
            contents = contents_of(config, fp32.digest, artifacts, variants)
            key = timing_key(config, data, fp32.digest, int8)
        with turn.evaluating():
            turn.share()
            predictions = predicted(config, data, contents, variants, in_memory, all_int8)
            if np.array_equal(predictions["fp32"].logits, predictions["int8"].logits):
                raise RunError("the INT8 logits equal the FP32 logits bit for bit: nothing was quantized.")
            if config.latency.enabled and not shared_timings.has_timings(config, key):
                turn.alone()
            measure = partial(side_by_side, config, variants, data, predictions, all_int8, folder)
            timings, latency_from = timed(config, key, folder, measure)
        executed = contents[first_of("int8", variants)]
        # In a sweep another job evaluates meanwhile.
        with protocol.threads(1 if turn.sweep else config.compute.threads):
            fidelity = per_layer(config, fused, int8, data)
            answer = target_cpu.answer(config, qconfig, data, prepared, int8, predictions["int8"], executed)

    margin = config.dataset["margin"]
    measured = {
        **metrics.latency_tags(timings, target_cpu.other_kernels(config)),
        **({"latency_from": latency_from} if latency_from else {}),
        "accuracy_source": str(answer.source),
        "saturation": str(answer.saturation),
        "verdict": metrics.verdict(predictions["fp32"], answer, margin, qconfig.overflow),
    }
    numbers = {
        **metrics.of_accuracy(predictions["fp32"], predictions["int8"]),
        **metrics.of_target(predictions["fp32"], answer, margin),
        **metrics.of_latency(timings),
        **metrics.of_size(float_bytes, artifacts),
        **metrics.of_layers(layers),
        "quant/layers_narrowed": float(len(calibration.narrowed)),
        "quant/fusion_difference": difference,
        "calib/images": float(calibration.images),
        "calib/seconds": calibration.seconds,
    }
    return Result(
        metrics=numbers,
        resolved=resolved_params(qconfig, config, calibration.narrowed),
        tags={
            **known,
            **run_files.data_tags(config, data, calibration.digest),
            **measured,
            "float_model": fp32.source,
        },
        doubts=(
            *warnings.doubts(config, data, layers, {**numbers, **measured}),
            *warnings.of_sums(config, qconfig.overflow, layers, calibration.narrowed, answer),
            *warnings.of_slow_kernels(config, slow_kernels(config, int8)),
        ),
        files={
            **run_files.written(folder, config, data, predictions, qparams, layers, timings, latency_from, artifacts),
            **run_files.layers_written(folder, config, layers, fidelity, answer.layers, calibration.narrowed),
        },
        datasets=run_files.datasets_used(config, data, calibration.images),
        flavor=run_files.flavor(config, data, artifacts),
    )


# ------------------------------------------------------------------------------------------------ the steps


@contextmanager
def _globals(config: Config) -> Iterator[None]:
    """Threads, torch's generator and the cache's bound set for this job and put back: nothing leaks into the next."""
    bound = cache.bounded(config.cache.max_gb)
    with bound, protocol.threads(config.compute.threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        yield


def _images(data: Data, pixels: np.ndarray) -> Tensor:
    return normalise(pixels, data.mean, data.std)


def resolved(config: Config) -> QConfig:
    """The qconfig with `overflow` as it will be executed on the CPU that the model ships on."""
    overflow = kernels.resolve_overflow(config.qconfig, config.engine, config.flow, config.target, kernels.probe())
    return replace(config.qconfig, overflow=overflow)


def why_guarded(
    config: Config, overflow: Overflow, layers: tuple[Layer, ...], narrowed: tuple[quantize.Narrowed, ...]
) -> str:
    """What `qconfig.overflow=auto` became for these layers and why, in a sentence; empty where it concerns none of
    them, or isn't what was asked for."""
    if config.qconfig.overflow is not Overflow.auto or "qconfig.overflow" in identity.without_effect(config):
        return ""
    where = f"target={config.target}" if config.target is not Target.native else "this CPU"
    kinds = kernels.overflowing_kinds(config.qconfig, config.engine, config.flow, config.target, kernels.probe()) & {
        layer.kind for layer in layers if layer.int8
    }
    if overflow is Overflow.none and min(config.qconfig.weight.bits, config.qconfig.activation.bits) < 8:
        why = "sums of products with 7 bits or fewer on one side fit into 16 bits"
    elif overflow is Overflow.none:
        why = f"dense layers of engine={config.engine} don't saturate on {where}"
    elif kinds:
        which = "" if "conv" in kinds else f"of {' and '.join(sorted(kinds))} layers "
        did = f"{len(narrowed)} layers, which got 7 bits" if narrowed else "none, so all keep their bits"
        can = f"16-bit sums {which}of engine={config.engine} can saturate on {where}"
        why = f"{can}; on calibration images they do in {did}"
    else:
        return ""
    return f"qconfig.overflow=auto is {overflow}: {why}"


def resolved_params(qconfig: QConfig, config: Config, narrowed: tuple[quantize.Narrowed, ...] = ()) -> dict[str, str]:
    """What was executed, beside what was asked."""

    def bits(side: quantize.Side) -> str:
        whole, layers = quantize.executed_bits(qconfig, side), sum(layer.side is side for layer in narrowed)
        if side is quantize.Side.activations and whole < qconfig.activation.bits:
            return f"{whole} (of the scale: codes beyond its range go on to {quantize.highest_activation(qconfig)})"
        return f"{whole} ({quantize.SAFE_BITS} in {layers} layers)" if layers else str(whole)

    if config.flow is Flow.dynamic:
        return {"resolved.weight_bits": str(qconfig.weight.bits)}
    return {
        "resolved.overflow": str(qconfig.overflow),
        "resolved.weight_bits": bits(quantize.Side.weights),
        "resolved.activation_bits": bits(quantize.Side.activations),
    }


def checked_fusion(config: Config, data: Data, fp32: float_model.FloatModel, fused: nn.Module, few: Tensor) -> float:
    """How far the fused model is from the float model, as a share of the largest logit.

    few: the first evaluation images, float32 [n, 3, H, W]. What was found is kept. Raises NotFinite where the float
    model's own logits are not finite, RunError where the two models are not the same.
    """

    def measured() -> np.ndarray:
        with torch.inference_mode():
            expected, actual = fp32.module(few), fused(few)
        inference.predictions(expected.numpy(), data.test, "evaluating FP32", np.arange(len(few)))
        return np.array([quantize.difference(expected, actual)])

    difference = float(cache.array(cache_folder(config), cache_keys.fusion_key(config, data, fp32.digest), measured)[0])
    if difference > quantize.TOLERANCE:
        raise RunError(quantize.explained(fp32.module, fused, config.flow, few))
    return difference


@dataclass(frozen=True)
class Calibration:
    """What calibration saw and took, and the layers that it gave 7 bits on one side (see quantize/narrowing.py).

    digest: of the images, empty where there were none.
    """

    images: int = 0
    seconds: float = 0.0
    narrowed: tuple[quantize.Narrowed, ...] = ()
    digest: str = ""


def calibrated(
    prepared: nn.Module, data: Data, config: Config, qconfig: QConfig, float_digest: str
) -> tuple[nn.Module, Calibration]:
    """Feed the observers with the drawn training images; with overflow=layers, narrow what can saturate then.

    What calibration sees is kept, for every observer but torch's own histogram.
    """
    if "calib" in identity.without_effect(config):
        return prepared, Calibration()
    chosen = draw(data.train, config.calib)
    pixels = data.train.drawn(chosen)
    if config.calib.batches is not None and len(chosen) < config.calib.batches * config.calib.batch_size:
        log.info(
            "calibrated on %d images, all that %s has: the last of the %d batches is not full.",
            len(chosen), data.train.name, config.calib.batches,
        )  # fmt: skip
    shared = count_shared(pixels, data.test)
    if shared:
        log.warning("%d of the %d calibration images are evaluation images too, pixel for pixel.", shared, len(pixels))
    batches = np.split(pixels, range(config.calib.batch_size, len(pixels), config.calib.batch_size))
    as_input = partial(_images, data)

    def named(position: int) -> str:
        return data.train.source.where(int(chosen[position]))

    started = time.perf_counter()
    with quantize.engine(config.engine):
        if config.observer.name is ActivationObserver.histogram:
            quantize.calibrate(prepared, batches, named, as_input)
        else:
            depends_on = cache_keys.activations_key(config, data, float_digest)
            quantize.calibrate_once(prepared, batches, as_input, cache_folder(config), depends_on, named)
    narrowed: tuple[quantize.Narrowed, ...] = ()
    if qconfig.overflow is Overflow.layers:
        some = _images(data, pixels[:SATURATION_IMAGES])
        prepared, narrowed = quantize.narrow(prepared, config.flow, qconfig, config.engine, config.target, some)
    return prepared, Calibration(len(pixels), time.perf_counter() - started, narrowed, digest_of(pixels))


def slow_kernels(config: Config, int8: nn.Module) -> tuple[str, ...]:
    """The layers for which the engine has no fast kernel on the CPU that the model ships on."""
    native = config.target is Target.native
    vnni = not kernels.probe().dense_saturates(Engine.fbgemm) if native else config.target is Target.vnni
    return without_fast_kernel(int8, config.engine, vnni)


def checked_layers(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """The same layers; RunError where none of them runs in INT8."""
    if not any(layer.int8 for layer in layers):
        reasons = "; ".join(dict.fromkeys(layer.reason for layer in layers if layer.reason))
        raise RunError(f"no layer runs in INT8{f': {reasons}' if reasons else ''}.")
    return layers


def shipped_size(config: Config, fp32: float_model.FloatModel, few: Tensor) -> int:
    """Bytes of the float model as its owner would ship it; what was found is kept. few: float32 [n, 3, H, W]."""

    def measured() -> np.ndarray:
        return np.array([saved_models.float_size(fp32.module, few)])

    return int(cache.array(cache_folder(config), cache_keys.float_size_key(fp32.digest), measured)[0])


def contents_of(
    config: Config, float_digest: str, artifacts: list[Artifact], variants: Mapping[str, Loaded]
) -> dict[str, str]:
    """The identity of each variant as it is executed (see `kept.content`)."""
    by_name = {f"{artifact.precision}_{artifact.runtime}": artifact for artifact in artifacts}
    contents = {}
    for name in variants:
        int8 = variants[name] if by_name[name].precision == "int8" else None
        contents[name] = saved_models.content(config, float_digest, by_name[name], int8)
    return contents


def first_of(precision: str, variants: Mapping[str, object]) -> str:
    """The variant whose predictions count: that of the first runtime which executes the precision."""
    return next(name for name in variants if name.startswith(precision))


def quickest_of(precision: str, variants: Mapping[str, object], all_int8: bool) -> str:
    """The variant that predicts in place of the first: where all is INT8 every runtime gives the same bit for bit, and
    TorchScript has the least around its kernels."""
    traced = "int8_torchscript"
    return traced if precision == "int8" and all_int8 and traced in variants else first_of(precision, variants)


def predicted(
    config: Config,
    data: Data,
    contents: Mapping[str, str],
    variants: Mapping[str, Loaded],
    in_memory: Mapping[str, nn.Module],
    all_int8: bool,
) -> dict[str, Predictions]:
    """Predictions on all evaluation images by precision, those of the first of the runtimes that execute it.

    They are kept, and so is what the FP32 variants answer on the first images, which all runs of a model share. Raises
    RunError where any of the runtimes, or the model that was saved, gives other logits on these.
    """
    few = np.arange(min(len(data.test), AGREEMENT_IMAGES))

    def title(precision: str) -> str:
        return f"evaluating {precision.upper()}"

    def predict(
        model: inference.Model,
        precision: str,
        indices: np.ndarray | None = None,
        copies: Sequence[inference.Model] = (),
    ) -> np.ndarray:
        size = config.evaluate.batch_size
        return inference.predict(model, data.test, data.mean, data.std, size, title(precision), indices, copies).logits

    def answers(name: str, precision: str, indices: np.ndarray | None = None) -> np.ndarray:
        model = variants[name]  # one whose answers are kept is not even read
        # To make copies takes longer than a few images do.
        copies = model.copies(config.compute.threads - 1) if indices is None else ()
        return predict(model, precision, indices, copies)

    def key(content: str, indices: np.ndarray | None = None) -> str:
        return predictions.predictions_key(config, data, [content], indices)

    found, folder = {}, cache_folder(config)
    with quantize.engine(config.engine):
        for precision, model in in_memory.items():
            first, quickest = first_of(precision, variants), quickest_of(precision, variants, all_int8)
            # What was kept may be of another process: then all are checked.
            checked = {quickest} if cache.find(folder, key(contents[first])) is None else set()
            logits = cache.array(folder, key(contents[first]), partial(answers, quickest, precision))
            twins = {f"{contents[first]}, in memory": partial(predict, model, precision, few)}
            others = [name for name in variants if name.startswith(precision) and name not in checked]
            twins |= {contents[name]: partial(answers, name, precision, few) for name in others}
            for content, answer in twins.items():
                again = cache.array(folder, key(content, few), answer) if precision == "fp32" else answer()
                agree(logits[few], again, tolerances(all_int8)[precision])
            found[precision] = inference.predictions(logits, data.test, title(precision))
    return found


def per_layer(config: Config, fused: nn.Module, int8: nn.Module, data: Data) -> tuple[Fidelity, ...]:
    """How well each layer of the INT8 model does what it does in FP32, on evaluation images."""
    chosen = target_cpu.spread(len(data.test), config.per_layer.images)
    if "per_layer" in identity.without_effect(config) or not len(chosen):
        return ()
    size = at_a_time(data.test.shape)
    batches = np.split(chosen, range(size, len(chosen), size))
    images = (_images(data, data.test.pixels(batch)) for batch in batches)
    return layer_fidelity(fused, int8, config.flow, config.engine, images)


def timing_key(config: Config, data: Data, float_digest: str, int8: nn.Module) -> str:
    """What this run's timings are kept under; empty where they are its own."""
    if not config.latency.enabled or not shared_timings.reuses_timings(config):
        return ""
    return shared_timings.timing_key(config, data, float_digest, int8, _images(data, data.test.pixels(np.arange(1))))


def timed(
    config: Config, key: str, folder: Path, measure: Callable[[], list[protocol.Timing]]
) -> tuple[list[protocol.Timing], str]:
    """What `measure` times, one job at a time on the whole machine, and ""; with `latency.reuse` what another run timed
    whose INT8 model executes the same (see `timing_key`), and that run."""
    if not config.latency.enabled:
        return [], ""
    if not key:
        with machine.lock(TIMING_LOCK):
            return measure(), ""
    where = str(folder.relative_to(config.outputs) if folder.is_relative_to(config.outputs) else folder)
    name = f"{config.tracking.name} ({where})" if config.tracking.name else where
    return shared_timings.timings(config, key, TIMING_LOCK, name, measure)


def side_by_side(
    config: Config,
    variants: Mapping[str, Loaded],
    data: Data,
    predictions: Mapping[str, Predictions],
    all_int8: bool,
    folder: Path,
) -> list[protocol.Timing]:
    """Every variant timed side by side, at every batch size and number of threads asked for."""
    images = min(len(data.test), LATENCY_IMAGES)
    inputs = _images(data, data.test.pixels(np.arange(images)))
    with quantize.engine(config.engine):
        if config.latency.processes:
            logits = {precision: found.logits[:images] for precision, found in predictions.items()}
            return worker.measure(config, folder, inputs.numpy(), logits, tolerances(all_int8))
        timed = with_cuda(variants)
        timings: list[protocol.Timing] = []
        for threads in config.latency.threads:
            for batch_size in config.latency.batch_sizes:
                with protocol.threads(threads):
                    timings += protocol.time_side_by_side(
                        timed,
                        inputs,
                        config.latency,
                        batch_size=batch_size,
                        seed=config.seed,
                        control_among=protocol.on_cpu(timed),
                    )
        return timings


def tolerances(all_int8: bool) -> dict[str, str]:
    """By precision, how far two variants of one model may be apart, as a key of `model.TOLERANCE`."""
    return {"fp32": "fp32", "int8": "int8" if all_int8 else "mixed"}
