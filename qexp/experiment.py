"""The pipeline: from a configuration to a Result, and the check of its inputs before any run is started.

Both `check_inputs` and `run_job` take and give plain values, set every global that they depend on, and know nothing
of MLflow, so that they can be called in a process of their own.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qexp import config as schema
from qexp import evaluate, latency, machine, models, quantize, stats
from qexp.config import Config, Flow, Overflow, QConfig, Runtime, Target
from qexp.data import Data, count_shared, draw, load_data, normalise
from qexp.errors import RunError
from qexp.quantize import saturation
from qexp.results import METRICS, Artifact, Layer, Predictions, QParams, Result
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
        models.check_model(config.model, len(data.classes), data.test.shape)
        module = models.build(config.model, len(data.classes), config.seed)
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
        predictions = {precision: predicted(config, data, variants, precision) for precision in ("fp32", "int8")}
        if np.array_equal(predictions["fp32"].logits, predictions["int8"].logits):
            raise RunError("the INT8 logits equal the FP32 logits bit for bit: nothing was quantized.")
        timings = timed(config, variants, data) if config.latency.enabled else []

    metrics = {
        **accuracy_metrics(predictions["fp32"], predictions["int8"]),
        **latency_metrics(config, timings),
        **size_metrics(artifacts),
        **layer_metrics(layers),
        "quant/fusion_difference": difference,
        "calib/images": float(images),
        "calib/seconds": seconds,
    }
    return Result(
        metrics={name: value for name, value in metrics.items() if name in METRICS},
        resolved=resolved_params(qconfig, config),
        tags={**machine_tags(), **code_tags(config), **fastest_tags(timings), "float_model": fp32.source},
        doubts=tuple(doubts(config, qconfig, data, layers, metrics)),
        files=written(folder, config, predictions, qparams, layers, timings, artifacts),
        datasets=datasets_used(config, data, images),
    )


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

    Returns the artifacts, and the loaded models by `<precision>_<runtime>`. Raises RunError where a loaded model
    gives other logits than the model in memory did.
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
                agree(module, loaded, images, config.evaluate.batch_size, precision)
                variants[f"{precision}_{runtime}"] = loaded
                artifacts.append(_artifact(precision, str(runtime), path, str(engine or "")))
    return artifacts, variants


def _runs(runtime: Runtime, precision: str) -> bool:
    """INT8 kernels choose their own memory format: channels-last is a variant of FP32 only."""
    return precision == "fp32" or runtime is not Runtime.eager_channels_last


def _artifact(precision: str, runtime: str, path: Path, engine: str) -> Artifact:
    content = path.read_bytes()
    return Artifact(precision, runtime, str(path), hashlib.sha256(content).hexdigest(), len(content), engine)


def predicted(config: Config, data: Data, variants: Mapping[str, Loaded], precision: str) -> Predictions:
    """Predictions on all evaluation images, with the first of the runtimes that execute this precision."""
    model = next(loaded for name, loaded in variants.items() if name.startswith(precision))
    with quantize.engine(config.engine):
        return evaluate.predict(
            model, data.test, data.mean, data.std, config.evaluate.batch_size, f"evaluating {precision.upper()}"
        )


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
                        variants, inputs, config.latency, batch_size=batch_size, seed=config.seed
                    )
    return timings


def _on_cuda(model: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """The same float model on the GPU; a call takes an image from the CPU and gives its logits back there."""
    assert isinstance(model, Loaded)
    module = copy.deepcopy(model.module).cuda()
    return lambda images: module(images.cuda()).cpu()


# ------------------------------------------------------------------------------------------------ the numbers


def accuracy_metrics(fp32: Predictions, int8: Predictions) -> dict[str, float]:
    """Both accuracies on the same images, and their paired difference with what is known of it."""
    fp32_only, int8_only, n = stats.discordant(fp32, int8)
    delta = stats.tango(fp32_only, int8_only, n)
    return {
        "accuracy/fp32": float(fp32.correct.mean()),
        "accuracy/int8": float(int8.correct.mean()),
        "accuracy/delta": delta.value,
        "accuracy/delta_low": delta.low,
        "accuracy/delta_high": delta.high,
        "accuracy/mcnemar_p": stats.mcnemar(fp32_only, int8_only),
        "accuracy/agreement": stats.agreement(fp32, int8),
    }


def latency_metrics(config: Config, timings: list[latency.Timing]) -> dict[str, float]:
    """p50, p90 and p99 of each variant at the first batch size and number of threads, and fastest over fastest."""
    first = headline(timings)
    if not first:
        return {}
    metrics: dict[str, float] = {}
    for timing in first:
        summary = timing.summary
        metrics[f"latency/{timing.variant}_ms"] = summary.p50
        metrics[f"latency/{timing.variant}_p90_ms"] = summary.p90
        metrics[f"latency/{timing.variant}_p99_ms"] = math.nan if summary.p99 is None else summary.p99
    fp32, int8 = fastest(first)
    ratio = latency.speedup(fp32, int8)
    return metrics | {
        "latency/fp32_ms": fp32.summary.p50,
        "latency/int8_ms": int8.summary.p50,
        "latency/speedup": ratio.value,
        "latency/speedup_low": ratio.low,
        "latency/speedup_high": ratio.high,
    }


def headline(timings: list[latency.Timing]) -> list[latency.Timing]:
    """The timings at the first batch size and the first number of threads: those that metrics hold."""
    return [t for t in timings if (t.batch_size, t.threads) == (timings[0].batch_size, timings[0].threads)]


def fastest(timings: list[latency.Timing]) -> tuple[latency.Timing, latency.Timing]:
    """The fastest FP32 and the fastest INT8 variant on the CPU."""
    on_cpu = [timing for timing in timings if timing.variant != "fp32_cuda"]
    by = {precision: [t for t in on_cpu if t.variant.startswith(precision)] for precision in ("fp32", "int8")}
    return latency.fastest(by["fp32"]), latency.fastest(by["int8"])


def fastest_tags(timings: list[latency.Timing]) -> dict[str, str]:
    if not timings:
        return {}
    fp32, int8 = fastest(headline(timings))
    return {"fastest.fp32": fp32.variant.removeprefix("fp32_"), "fastest.int8": int8.variant.removeprefix("int8_")}


def size_metrics(artifacts: list[Artifact]) -> dict[str, float]:
    """Megabytes of the first artifact of each precision."""
    fp32, int8 = (next(a.bytes for a in artifacts if a.precision == precision) for precision in ("fp32", "int8"))
    return {"size/fp32_mb": fp32 / 1e6, "size/int8_mb": int8 / 1e6, "size/ratio": fp32 / int8}


def layer_metrics(layers: tuple[Layer, ...]) -> dict[str, float]:
    weighted = [layer for layer in layers if layer.kind != "batchnorm"]
    return {
        "quant/layers_int8": float(sum(layer.int8 for layer in weighted)),
        "quant/layers_float": float(sum(not layer.int8 for layer in weighted)),
        "quant/batchnorm_left": float(len(layers) - len(weighted)),
    }


def resolved_params(qconfig: QConfig, config: Config) -> dict[str, str]:
    """What was executed, beside what was asked."""
    if config.flow is Flow.dynamic:
        return {"resolved.weight_bits": str(qconfig.weight.bits)}
    return {
        "resolved.overflow": str(qconfig.overflow),
        "resolved.weight_bits": str(quantize.executed_bits(qconfig, quantize.Side.weights)),
        "resolved.activation_bits": str(quantize.executed_bits(qconfig, quantize.Side.activations)),
    }


def doubts(
    config: Config, qconfig: QConfig, data: Data, layers: tuple[Layer, ...], metrics: Mapping[str, float]
) -> Iterator[str]:
    """What the reader of the table must know, a sentence each."""
    if config.dataset["_target_"] == "qexp.datasets.digits":
        yield f"digits, with {len(data.test)} images of 8x8 pixels, is for trying the tool and not for deciding."
    unguarded = qconfig.overflow is Overflow.none and min(qconfig.weight.bits, qconfig.activation.bits) == 8
    if unguarded and saturation.can_saturate(qconfig, config.engine, config.flow, Target.native, saturation.probe()):
        yield (
            f"16-bit sums can saturate in the kernels of engine={config.engine}, and the guard is off: this accuracy "
            "holds for this CPU only; qconfig.overflow=auto avoids it."
        )
    low, high = metrics.get("latency/speedup_low"), metrics.get("latency/speedup_high")
    if low is not None and high is not None:
        if high < 1:
            yield f"INT8 is slower than FP32 with flow={config.flow} engine={config.engine} on this CPU."
        elif low <= 1:
            yield "INT8 and FP32 are as fast as each other, as far as the noise lets one tell."
    left = [layer for layer in layers if not layer.int8 and layer.kind != "batchnorm"]
    if left:
        reasons = ", ".join(dict.fromkeys(layer.reason for layer in left if layer.reason))
        named = ", ".join(layer.name for layer in left[:3]) + (", ..." if len(left) > 3 else "")
        yield f"{len(left)} layers stay in FP32 ({named}){f': {reasons}' if reasons else ''}."
    norms = sum(layer.kind == "batchnorm" for layer in layers)
    if norms and config.flow is not Flow.dynamic:
        yield f"{norms} BatchNorms were not folded into a convolution."


# ------------------------------------------------------------------------------------------------ what is kept


@cache
def machine_tags() -> dict[str, str]:
    here = machine.describe()
    return {
        "cpu": here.cpu,
        "isa": here.isa,
        "torch": torch.__version__,
        "kernel_signature": saturation.probe().id,
    }


def datasets_used(config: Config, data: Data, calibrated_on: int) -> tuple[dict[str, Any], ...]:
    """What was calibrated on and what was evaluated on, for MLflow's record of inputs."""
    common = {"name": data.name, "source": str(config.dataset.get("root") or config.dataset["_target_"])}
    shape = list(data.test.shape)
    evaluation = {**common, "digest": data.digest[:32], "context": "evaluation"}
    used = [{**evaluation, "profile": {"images": len(data.test), "shape": shape, "classes": len(data.classes)}}]
    if calibrated_on:
        drawn = hashlib.sha256(json.dumps([data.digest, asdict(config.calib)]).encode()).hexdigest()[:32]
        profile = {"images": calibrated_on, "shape": shape}
        used.append({**common, "digest": drawn, "context": "calibration", "profile": profile})
    return tuple(used)


def code_tags(config: Config) -> dict[str, str]:
    return {"config_hash": schema.config_hash(config), "code_hash": code_hash(), "git_sha": git_sha()}


@cache
def code_hash() -> str:
    """16 hex digits over the sources of qexp."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(here.rglob("*.py")):
        digest.update(str(path.relative_to(here)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def git_sha() -> str:
    """The commit of the current folder's checkout, `+` where it was changed; `none` outside of one."""
    try:
        sha = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return "none"
    return sha.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def written(
    folder: Path,
    config: Config,
    predictions: Mapping[str, Predictions],
    qparams: Mapping[str, QParams],
    layers: tuple[Layer, ...],
    timings: list[latency.Timing],
    artifacts: list[Artifact],
) -> dict[str, str]:
    """Write what is kept of a run into its folder; the paths by their place in the run's artifacts."""
    fp32, int8 = predictions["fp32"], predictions["int8"]
    np.savez_compressed(
        folder / "predictions.npz",
        fp32=fp32.logits, int8=int8.logits, labels=fp32.labels, image_ids=np.array(fp32.image_ids),
    )  # fmt: skip
    _json(folder / "config.json", schema.plain(config))
    _json(folder / "qparams.json", {name: _qparams(value) for name, value in qparams.items()})
    _json(folder / "layers.json", [asdict(layer) for layer in layers])
    _json(folder / "model" / "artifacts.json", [{**asdict(a), "path": Path(a.path).name} for a in artifacts])
    names = ["predictions.npz", "config.json", "qparams.json", "layers.json", "model"]
    if timings:
        _json(folder / "latency.json", {"machine": asdict(machine.describe()), "rows": [_timing(t) for t in timings]})
        samples = {f"{t.variant}.batch{t.batch_size}.threads{t.threads}": t.samples for t in timings}
        np.savez_compressed(folder / "latency_samples.npz", **samples)  # type: ignore[arg-type]
        names += ["latency.json", "latency_samples.npz"]
    files = {name: str(folder / name) for name in names}
    return {**files, "hydra": str(folder / ".hydra")} if (folder / ".hydra").is_dir() else files


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False, default=str) + "\n")


def _qparams(value: QParams) -> dict[str, Any]:
    plain = {"scale": value.scale.tolist(), "zero_point": value.zero_point.tolist()}
    return {**plain, "qmin": value.qmin, "qmax": value.qmax, "axis": value.axis}


def _timing(timing: latency.Timing) -> dict[str, Any]:
    summary = asdict(timing.summary)
    return {
        "variant": timing.variant,
        "batch_size": timing.batch_size,
        "threads": timing.threads,
        **summary,
        "images_per_second": 1000 * timing.batch_size / summary["p50"],
        "first_ms": timing.first_ms,
        "rounds": int(timing.round.max()) + 1,
        "started": timing.started,
        "ended": timing.ended,
    }
