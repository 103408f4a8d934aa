"""The stage *prepare*: check fusion, calibrate, convert, check layers, save."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from qexp import quantize
from qexp.config import identity
from qexp.config.schema import ActivationObserver, Config, Overflow, QConfig, Target, cache_folder
from qexp.data.calibration_images import draw
from qexp.data.loading import Data, count_shared, digest_of, normalise
from qexp.errors import RunError
from qexp.latency import placements, shared_timings
from qexp.models import float_model, inference
from qexp.pipeline import cache_keys, run_files
from qexp.pipeline.stages import small_steps
from qexp.quantize.inspection.int8_model import FEW
from qexp.quantize.saturation import kernels
from qexp.records import Artifact, Layer, Precision, Variant
from qexp.runtimes import RUNTIMES, int8_kernels, saved_models
from qexp.runtimes.base import Loaded
from qexp.system import cache
from qexp.system.steps import step

log = logging.getLogger(__name__)


AGREEMENT_IMAGES = 256
SATURATION_IMAGES = 64


def images_of(data: Data, pixels: np.ndarray) -> Tensor:
    """Pixels, uint8 [n, 3, H, W], as the model's input: normalised, float32 [n, 3, H, W]."""
    return normalise(pixels, data.mean, data.std)


def comparison_images(data: Data) -> Tensor:
    """The first evaluation images, on which models are compared with each other: float32 [n, 3, H, W]."""
    return images_of(data, data.test.pixels(np.arange(min(len(data.test), AGREEMENT_IMAGES))))


def resolved(config: Config) -> QConfig:
    """The qconfig with what `overflow=auto` means on the target CPU, and `placement=auto` on this one.

    Nothing overflows in a simulation.
    """
    placement = placements.resolved(config)
    if config.qconfig.simulated:
        return replace(config.qconfig, overflow=Overflow.none, placement=placement)
    others = int8_kernels.elsewhere(config) if config.qconfig.overflow is Overflow.auto else ()
    overflow = kernels.resolve_overflow(
        config.qconfig, config.engine, config.flow, config.target, kernels.probe(), others
    )
    return replace(config.qconfig, overflow=overflow, placement=placement)


def quantization_spec(config: Config) -> quantize.QuantizationSpec:
    """The settings that the model is quantized with."""
    return quantize.QuantizationSpec(resolved(config), config.observer, config.engine, config.fusion)


@step("check fusion")
def check_fusion(config: Config, data: Data, fp32: float_model.FloatModel, fused: nn.Module, images: Tensor) -> float:
    """The largest difference of the fused model's logits from the float model's, as a share of the largest logit.

    images: float32 [n, 3, H, W]. The result is cached. Raises NotFinite where the float model's own logits are not
    finite, RunError where the two models don't compute the same.
    """

    def measure() -> float:
        with torch.inference_mode():
            expected, actual = fp32.module(images), fused(images)
        inference.predictions(expected.numpy(), data.test, "evaluating FP32", np.arange(len(images)))
        return quantize.difference(expected, actual)

    difference = cache.number(cache_folder(config), cache_keys.fusion_key(config, data, fp32.digest), measure)
    if difference > quantize.TOLERANCE:
        raise RunError(quantize.explained(fp32.module, fused, quantize.FLOWS[config.flow], images))
    return difference


@dataclass(frozen=True)
class Calibration:
    """The calibration images, uint8 [n, 3, H, W], the seconds that calibration took, and the images' digest, empty
    where there were none."""

    pixels: np.ndarray
    seconds: float = 0.0
    digest: str = ""

    @property
    def images(self) -> int:
        return len(self.pixels)


@step("calibrate")
def calibrate(prepared: quantize.Prepared, config: Config, data: Data, float_digest: str) -> Calibration:
    """Run the calibration images through the observers, whose statistics are cached but for torch's own histogram."""
    if not prepared.flow.calibrates:
        return Calibration(np.empty((0, *data.train.shape), np.uint8))
    drawn = draw(data.train, config.calib)
    pixels = data.train.drawn(drawn)
    if config.calib.batches is not None and len(drawn) < config.calib.batches * config.calib.batch_size:
        log.info(
            "calibrated on %d images, all that %s has: the last of the %d batches is not full.",
            len(drawn), data.train.name, config.calib.batches,
        )  # fmt: skip
    shared = count_shared(pixels, data.test)
    if shared:
        log.warning("%d of the %d calibration images are evaluation images too, pixel for pixel.", shared, len(pixels))
    batches = np.split(pixels, range(config.calib.batch_size, len(pixels), config.calib.batch_size))
    as_input = partial(images_of, data)

    def named(position: int) -> str:
        return data.train.source.where(int(drawn[position]))

    started = time.perf_counter()
    with quantize.engine(config.engine):
        if config.observer.name is ActivationObserver.histogram:
            quantize.calibrate(prepared, batches, named, as_input)
        else:
            depends_on = cache_keys.activations_key(config, data, float_digest)
            quantize.calibrate_once(prepared, batches, as_input, cache_folder(config), depends_on, named)
    return Calibration(pixels, time.perf_counter() - started, digest_of(pixels))


@small_steps()
def convert(prepared: quantize.Prepared) -> quantize.QuantizedModel:
    """The INT8 model of a calibrated model."""
    return prepared.flow.convert(prepared)


@small_steps()
def simulate(int8: quantize.QuantizedModel, example: Tensor) -> quantize.QuantizedModel:
    """The model with all bits asked for, in float, where they are more than kernels hold; otherwise as it is. example:
    float32 [n, 3, H, W]."""
    return quantize.simulated(int8, example) if int8.qconfig.simulated else int8


@step("guard")
def reduce_range(
    int8: quantize.QuantizedModel, config: Config, data: Data, calibration: Calibration
) -> tuple[quantize.QuantizedModel, tuple[quantize.ReducedRange, ...]]:
    """With overflow=layers, reduce the range to 7 bits on one side of each layer whose 16-bit accumulators saturate on
    calibration images. Returns the model and these layers; otherwise the model as it is."""
    if int8.qconfig.overflow is not Overflow.layers or not calibration.images:
        return int8, ()
    images = images_of(data, calibration.pixels[:SATURATION_IMAGES])
    return quantize.reduce_range(int8, config.target, images, int8_kernels.elsewhere(config))


def shipped_size(config: Config, fp32: float_model.FloatModel, images: Tensor) -> int:
    """Bytes of the float model as its owner would ship it, cached. images: float32 [n, 3, H, W]."""
    measure = partial(saved_models.float_size, fp32.module, images)
    return int(cache.number(cache_folder(config), cache_keys.float_size_key(fp32.digest), measure))


def why_guarded(
    config: Config, overflow: Overflow, layers: tuple[Layer, ...], reduced: tuple[quantize.ReducedRange, ...]
) -> str:
    """A sentence: the guard that `qconfig.overflow=auto` chose for these layers, and the reason. Empty where it
    concerns none of them, or another setting was asked for."""
    if config.qconfig.overflow is not Overflow.auto or "qconfig.overflow" in identity.without_effect(config):
        return ""
    where = f"target={config.target}" if config.target is not Target.native else "this CPU"
    of_model, asked = {layer.kind for layer in layers if layer.int8}, int8_kernels.asked_for(config)
    overflowing = [one for one in asked if one.there & of_model]
    kinds = frozenset[str]().union(*(one.there for one in overflowing)) & of_model
    of = " and ".join(one.name for one in overflowing or asked)
    if overflow is Overflow.none and min(config.qconfig.weight.bits, config.qconfig.activation.bits) < 8:
        why = "sums of products with 7 bits or fewer on one side fit into 16 bits"
    elif overflow is Overflow.none:
        why = f"dense layers of {of} don't saturate on {where}"
    elif kinds:
        which = "" if "conv" in kinds else f"of {' and '.join(sorted(kinds))} layers "
        did = f"{len(reduced)} layers, which got 7 bits" if reduced else "none, so all keep their bits"
        can = f"16-bit sums {which}of {of} can saturate on {where}"
        why = f"{can}; on calibration images they do in {did}"
    else:
        return ""
    return f"qconfig.overflow=auto is {overflow}: {why}"


@step("check layers")
@small_steps()
def check_int8(
    config: Config, int8: quantize.QuantizedModel, reduced: tuple[quantize.ReducedRange, ...], images: Tensor
) -> None:
    """Raise RunError where no layer runs in INT8, or one computes another function than its float counterpart.

    reduced: as `reduce_range` returns them; images: float32 [n, 3, H, W].
    """
    if not any(layer.int8 for layer in int8.layers):
        reasons = "; ".join(dict.fromkeys(layer.reason for layer in int8.layers if layer.reason))
        raise RunError(f"no layer runs in INT8{f': {reasons}' if reasons else ''}.")
    if said := why_guarded(config, int8.qconfig.overflow, int8.layers, reduced):
        log.info("%s", said)
    quantize.check_layers(int8, images[:: -(-len(images) // FEW)])


@dataclass(frozen=True)
class Saved:
    """The models of a run, saved for each runtime and read back.

    artifacts: the saved files; variants: the models read from them; contents: the identity of each variant as it is
    executed; in_memory: the models that were saved, by precision; all_int8: True if no layer stayed in FP32;
    float_bytes: size of the float model as its owner would ship it; timing_key: the key under which runs share timings,
    empty where they don't.
    """

    artifacts: list[Artifact]
    variants: Mapping[Variant, Loaded]
    contents: Mapping[Variant, str]
    in_memory: Mapping[Precision, nn.Module]
    all_int8: bool
    float_bytes: int
    timing_key: str

    def reference_variant(self, precision: Precision) -> Variant:
        """The variant whose predictions count: the precision in the first runtime that executes it."""
        return self.of(precision)[0]

    def of(self, precision: Precision) -> list[Variant]:
        return [variant for variant in self.variants if variant.precision is precision]

    def path(self, variant: Variant) -> Path:
        """The file that a variant was saved to."""
        return Path(next(artifact.path for artifact in self.artifacts if artifact.variant == variant))

    def tolerance(self, variant: Variant) -> float:
        """The allowed difference of its logits from those of the model in memory, as a share of the largest."""
        return RUNTIMES[variant.runtime].tolerance(variant.precision, self.all_int8)

    def same(self, variant: Variant) -> list[Variant]:
        """The variants that return the same logits bit for bit, itself first."""
        exact = self.tolerance(variant) == 0
        others = [one for one in self.of(variant.precision) if one != variant and exact and self.tolerance(one) == 0]
        return [variant, *others]

    def quickest(self, variant: Variant) -> Variant:
        """The variant that predicts in its place: one with the same logits and less overhead around its kernels."""
        return next((one for one in self.same(variant) if RUNTIMES[one.runtime].predicts_for_others), variant)

    def content_key(self, precision: Precision) -> str:
        """The identity of the model whose predictions count, for cache keys."""
        return self.contents[self.reference_variant(precision)]


def contents_of(
    config: Config, float_digest: str, artifacts: list[Artifact], variants: Mapping[Variant, Loaded]
) -> dict[Variant, str]:
    """The identity of each variant as it is executed (see `saved_models.content`)."""
    artifact_of = {artifact.variant: artifact for artifact in artifacts}
    contents = {}
    for variant in variants:
        int8 = variants[variant] if variant.precision is Precision.int8 else None
        contents[variant] = saved_models.content(config, float_digest, artifact_of[variant], int8)
    return contents


@step("save")
@small_steps()
def save(
    config: Config,
    data: Data,
    fp32: float_model.FloatModel,
    int8: quantize.QuantizedModel,
    images: Tensor,
    folder: Path,
) -> Saved:
    """Write both models for every runtime asked for into `folder`, and read them back. images: float32 [n, 3, H, W]."""
    structures = {
        Precision.fp32: partial(quantize.sharing_copy, int8.fused),
        Precision.int8: partial(quantize.blank_copy, int8),
    }
    in_memory = {Precision.fp32: int8.fused, Precision.int8: int8.module}
    artifacts = saved_models.write(config, fp32.digest, in_memory, images, folder, run_files.images_expected(data))
    variants = saved_models.read(config, structures, folder, saved_models.variants(config))
    contents = contents_of(config, fp32.digest, artifacts, variants)
    size = shipped_size(config, fp32, images)
    shares = config.latency.enabled and shared_timings.reuses_timings(config)
    key = shared_timings.timing_key(config, data, fp32.digest, int8.module, images[:1]) if shares else ""
    all_int8 = all(layer.int8 for layer in int8.layers)
    return Saved(artifacts, variants, contents, in_memory, all_int8, size, key)
