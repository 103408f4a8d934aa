"""The pipeline: from a configuration to a Result, and the check of its inputs before any run is started.

Both `check_inputs` and `run_job` take and give plain values, set every global that they depend on, and know nothing
of MLflow, so that they can be called in a process of their own.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qexp import cache, evaluate, latency, machine, metrics, models, quantize, record
from qexp import config as schema
from qexp.config import Config, Flow, Overflow, QConfig, Runtime, Target
from qexp.data import Data, count_shared, draw, load_data, normalise
from qexp.errors import RunError
from qexp.quantize import saturation
from qexp.results import Artifact, Layer, Predictions, Result
from qexp.runtimes import eager as eager_runtime
from qexp.runtimes import torchscript
from qexp.runtimes.model import Loaded, agree

log = logging.getLogger(__name__)

FUSION_TOLERANCE = 1e-4  # of the largest logit
AGREEMENT_IMAGES = 256
LATENCY_IMAGES = 64
# One for the whole machine, whoever times on it.
TIMING_LOCK = Path(tempfile.gettempdir()) / "qexp-timing.lock"


def inputs_of(config: Config) -> str:
    """What `check_inputs` looks at: jobs for which this is equal need one check."""
    names = ("model", "dataset", "calib", "flow", "engine", "fusion", "latency")
    return json.dumps({name: getattr(config, name) for name in names}, default=asdict, sort_keys=True)


def check_inputs(config: Config) -> None:
    """Open the data and the checkpoint, draw the calibration images, and take the model through the flow once.

    Raises InputError (ConfigError where the machine allows fewer threads than asked for) before any run is started.
    """
    latency.check_threads(config.latency.threads, machine.allowed_cores())
    with _globals(config):
        data = load_data(config.dataset, _folder(config, "cache"))
        example = _images(data, data.train.pixels(draw(data.train, config.calib))[:1])
        module = models.check_model(config.model, len(data.classes), data.test.shape)
        quantize.dry_run(module, config.flow, config.fusion, resolved(config), config.observer, config.engine, example)


def run_job(config: Config, folder: Path) -> Result:
    """One experiment. folder: where everything that it produces is written; it exists.

    Raises RunError where the result could not be trusted: the fused model differs from the float model, nothing was
    quantized, what was saved gives other logits than what was evaluated.
    """
    with _globals(config):
        data = load_data(config.dataset, _folder(config, "cache"))
        qconfig = resolved(config)
        fp32 = models.float_model(
            config.model, config.train, data, config.seed, _folder(config, "checkpoints"), config.compute.threads
        )
        few = _images(data, data.test.pixels(np.arange(min(len(data.test), AGREEMENT_IMAGES))))
        fused = quantize.fuse(fp32.module, config.flow, config.fusion, few[:2])
        difference = checked_fusion(fp32.module, fused, few)

        prepared = quantize.prepare(fused, config.flow, qconfig, config.observer, config.engine, few[:2])
        images, seconds = calibrated(prepared, data, config)
        qparams = quantize.read_qparams(prepared)
        int8 = quantize.convert(prepared, config.flow, config.engine)
        layers = checked_layers(quantize.layers(int8, config.flow, config.engine))

        skeleton = quantize.skeleton(fp32.module, config.flow, config.fusion, qconfig, config.engine, few[:2])
        artifacts, variants = saved_and_loaded(config, fused, int8, skeleton, few, folder)
        in_memory = {"fp32": fused, "int8": int8}
        all_int8 = all(layer.int8 for layer in layers)
        predictions = predicted(config, data, fp32.digest, artifacts, variants, in_memory, all_int8)
        if np.array_equal(predictions["fp32"].logits, predictions["int8"].logits):
            raise RunError("the INT8 logits equal the FP32 logits bit for bit: nothing was quantized.")
        timings = timed(config, variants, data) if config.latency.enabled else []

    measured = metrics.latency_tags(timings)
    numbers = {
        **metrics.of_accuracy(predictions["fp32"], predictions["int8"]),
        **metrics.of_latency(timings),
        **metrics.of_size(artifacts),
        **metrics.of_layers(layers),
        "quant/fusion_difference": difference,
        "calib/images": float(images),
        "calib/seconds": seconds,
    }
    return Result(
        metrics=numbers,
        resolved=resolved_params(qconfig, config),
        tags={
            **record.tags(config),
            **measured,
            "float_model": fp32.source,
        },
        doubts=tuple(metrics.doubts(config, qconfig, data, layers, {**numbers, **measured})),
        files=record.written(folder, config, data, predictions, qparams, layers, timings, artifacts),
        datasets=record.datasets_used(config, data, images),
        flavor=record.flavor(config, data, artifacts),
    )


def load_int8(folder: Path) -> Loaded:
    """The INT8 model that a run saved as a state_dict, from that run's folder (or its artifacts, downloaded).

    Call it within `quantize.engine` of the engine that it was converted for.
    """
    config = schema.from_plain(json.loads((folder / "config.json").read_text()))
    images = json.loads((folder / "model" / "images.json").read_text())
    with _globals(config), quantize.engine(config.engine):
        module = models.build(config.model, images["classes"], config.seed)
        example = torch.zeros(2, *images["shape"])
        structure = quantize.skeleton(module, config.flow, config.fusion, resolved(config), config.engine, example)
        return eager_runtime.load(folder / "model" / "int8_eager.pt", structure, config.engine)


# ------------------------------------------------------------------------------------------------ the steps


@contextmanager
def _globals(config: Config) -> Iterator[None]:
    """Threads and torch's generator set for this job and put back: nothing leaks into the next."""
    with latency.threads(config.compute.threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        yield


def _folder(config: Config, name: str) -> Path:
    return Path(config.outputs) / name


def _images(data: Data, pixels: np.ndarray) -> Tensor:
    return normalise(pixels, data.mean, data.std)


def resolved(config: Config) -> QConfig:
    """The qconfig with `overflow` as it will be executed on the CPU that the model ships on."""
    overflow = saturation.resolve_overflow(
        config.qconfig, config.engine, config.flow, config.target, saturation.probe()
    )
    if config.qconfig.overflow is Overflow.auto and "qconfig.overflow" not in schema.without_effect(config):
        log.info("qconfig.overflow=auto is %s: %s", overflow, why_guarded(config, overflow))
    return replace(config.qconfig, overflow=overflow)


def why_guarded(config: Config, overflow: Overflow) -> str:
    """Why `auto` became what it is, in a few words."""
    where = f"target={config.target}" if config.target is not Target.native else "this CPU"
    if overflow is not Overflow.none:
        return f"16-bit sums of engine={config.engine} can saturate on {where}, so {overflow} get 7 bits"
    if min(config.qconfig.weight.bits, config.qconfig.activation.bits) < 8:
        return "7 bits or fewer on one side can't saturate"
    return f"engine={config.engine} does not saturate on {where}"


def resolved_params(qconfig: QConfig, config: Config) -> dict[str, str]:
    """What was executed, beside what was asked."""
    if config.flow is Flow.dynamic:
        return {"resolved.weight_bits": str(qconfig.weight.bits)}
    return {
        "resolved.overflow": str(qconfig.overflow),
        "resolved.weight_bits": str(quantize.executed_bits(qconfig, quantize.Side.weights)),
        "resolved.activation_bits": str(quantize.executed_bits(qconfig, quantize.Side.activations)),
    }


def checked_fusion(float_module: nn.Module, fused: nn.Module, images: Tensor) -> float:
    """How far the fused model is from the float model, as a share of the largest logit; RunError beyond 1e-4."""
    difference = quantize.fusion_difference(float_module, fused, images)
    if not difference <= FUSION_TOLERANCE:
        block = quantize.blame(float_module, fused, images)
        raise RunError(
            f"the fused model differs from the float model by {difference:.2g} of the largest logit, from {block} on: "
            f"{FUSION_TOLERANCE:g} is allowed. A ReLU module that is used twice is a common cause; use flow=fx, or "
            "give every ReLU its own module."
        )
    return difference


def calibrated(prepared: nn.Module, data: Data, config: Config) -> tuple[int, float]:
    """Feed the observers with the drawn training images; the number of images and the seconds that it took."""
    if "calib" in schema.without_effect(config):
        return 0, 0.0
    pixels = data.train.pixels(draw(data.train, config.calib))
    shared = count_shared(pixels, data.test)
    if shared:
        log.warning("%d of the %d calibration images are evaluation images too, pixel for pixel.", shared, len(pixels))
    size = config.calib.batch_size
    started = time.perf_counter()
    with quantize.engine(config.engine):
        images = quantize.calibrate(
            prepared, (_images(data, pixels[start : start + size]) for start in range(0, len(pixels), size))
        )
    return images, time.perf_counter() - started


def checked_layers(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """The same layers; RunError where none of them runs in INT8."""
    if not any(layer.int8 for layer in layers):
        reasons = "; ".join(dict.fromkeys(layer.reason for layer in layers if layer.reason))
        raise RunError(f"no layer runs in INT8{f': {reasons}' if reasons else ''}.")
    return layers


def saved_and_loaded(
    config: Config, fused: nn.Module, int8: nn.Module, skeleton: nn.Module, images: Tensor, folder: Path
) -> tuple[list[Artifact], dict[str, Loaded]]:
    """Save both precisions for every runtime and load them back: what is evaluated and timed is what was saved.

    Returns the artifacts, and the loaded models by `<precision>_<runtime>`.
    """
    where = folder / "model"
    where.mkdir(exist_ok=True)
    artifacts: list[Artifact] = []
    variants: dict[str, Loaded] = {}
    for precision, module, structure, engine in (
        ("fp32", fused, fused, None),
        ("int8", int8, skeleton, config.engine),
    ):
        with quantize.engine(config.engine):
            for runtime in (runtime for runtime in config.latency.runtimes if _runs(runtime, precision)):
                path = where / f"{precision}_{'torchscript' if runtime is Runtime.torchscript else 'eager'}.pt"
                if runtime is Runtime.torchscript:
                    torchscript.export(module, images[:2], path)
                    loaded = torchscript.load(path, engine)
                else:
                    eager_runtime.export(module, path)
                    blank = copy.deepcopy(structure)
                    loaded = eager_runtime.load(path, blank, engine, runtime is Runtime.eager_channels_last)
                variants[f"{precision}_{runtime}"] = loaded
                artifacts.append(_artifact(precision, str(runtime), path, str(engine or "")))
    return artifacts, variants


def _runs(runtime: Runtime, precision: str) -> bool:
    """INT8 kernels choose their own memory format: channels-last is a variant of FP32 only."""
    return precision == "fp32" or runtime is not Runtime.eager_channels_last


def _artifact(precision: str, runtime: str, path: Path, engine: str) -> Artifact:
    content = path.read_bytes()
    return Artifact(precision, runtime, str(path), hashlib.sha256(content).hexdigest(), len(content), engine)


def predicted(
    config: Config,
    data: Data,
    float_digest: str,
    artifacts: list[Artifact],
    variants: Mapping[str, Loaded],
    in_memory: Mapping[str, nn.Module],
    all_int8: bool,
) -> dict[str, Predictions]:
    """Predictions on all evaluation images by precision, with the first of the runtimes that execute it.

    FP32's are kept: they are the same for every way to quantize. Raises RunError where another runtime, or the model
    that was saved, gives other logits on the first images.
    """
    few = np.arange(min(len(data.test), AGREEMENT_IMAGES))

    def predict(model: Callable[[Tensor], Tensor], precision: str, indices: np.ndarray | None = None) -> np.ndarray:
        title = f"evaluating {precision.upper()}"
        return evaluate.predict(
            model, data.test, data.mean, data.std, config.evaluate.batch_size, title, indices
        ).logits

    found = {}
    with quantize.engine(config.engine):
        for precision, saved in in_memory.items():
            first, *others = [name for name in variants if name.startswith(precision)]
            whole = partial(predict, variants[first], precision)
            if precision == "fp32":
                key = _fp32_key(config, data, float_digest, artifacts[0])
                logits = cache.array(_folder(config, "cache"), key, whole)
            else:
                logits = whole()
            twins: list[Callable[[Tensor], Tensor]] = [saved, *(variants[name] for name in others)]
            for twin in twins:
                allowed = "mixed" if precision == "int8" and not all_int8 else precision
                agree(logits[few], predict(twin, precision, few), allowed)
            found[precision] = Predictions(logits, data.test.labels, data.test.ids)
    return found


def _fp32_key(config: Config, data: Data, float_digest: str, artifact: Artifact) -> str:
    """All that the FP32 logits depend on, in their last bit too."""
    executed = [artifact.sha256, artifact.runtime, config.flow, config.fusion, float_digest]
    images = [data.test.digest, data.mean, data.std, config.evaluate.batch_size]
    where = [config.compute.threads, torch.__version__, machine.describe().cpu, machine.describe().isa]
    return json.dumps(["fp32 logits", executed, images, where, record.code_hash()])


def timed(config: Config, variants: Mapping[str, Callable[[Tensor], Any]], data: Data) -> list[latency.Timing]:
    """Every variant timed side by side, at every batch size and number of threads asked for."""
    inputs = _images(data, data.test.pixels(np.arange(min(len(data.test), LATENCY_IMAGES))))
    if torch.cuda.is_available() and "fp32_eager" in variants:
        variants = {**variants, "fp32_cuda": _on_cuda(variants["fp32_eager"])}
    timings: list[latency.Timing] = []
    with machine.lock(TIMING_LOCK), quantize.engine(config.engine):
        for threads in config.latency.threads:
            for batch_size in config.latency.batch_sizes:
                with latency.threads(threads):
                    timings += latency.time_side_by_side(
                        variants,
                        inputs,
                        config.latency,
                        batch_size=batch_size,
                        seed=config.seed,
                        control_among=[name for name in variants if name.startswith("fp32") and name != "fp32_cuda"],
                    )
    return timings


def _on_cuda(model: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """The same float model on the GPU; a call takes an image from the CPU and gives its logits back there."""
    assert isinstance(model, Loaded)
    module = copy.deepcopy(model.module).cuda()
    return lambda images: module(images.cuda()).cpu()
