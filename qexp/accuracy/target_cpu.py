"""INT8 accuracy on the target CPU, where its kernels accumulate otherwise than this CPU's.

Without VNNI, kernels add pairs of products in 16-bit accumulators, which can saturate. This CPU saturates, the target
doesn't: run the model on qnnpack, which has 32-bit accumulators. This CPU doesn't, the target does: emulate its 16-bit
accumulators. Both saturate: run only layers that can overflow on qnnpack, to see what saturation costs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from qexp import quantize
from qexp.accuracy.prediction_key import prediction_key
from qexp.config.schema import Config, Engine, Target, cache_folder
from qexp.data.loading import Data
from qexp.models import inference
from qexp.quantize.graph.exported import is_program
from qexp.quantize.saturation import kernels as torch_kernels
from qexp.quantize.saturation import programs
from qexp.quantize.saturation.accumulators import LayerSaturation
from qexp.quantize.saturation.kernels import Kernels
from qexp.quantize.saturation.programs import SaturatingProgram
from qexp.records import AccuracySource, Predictions, SaturationStatus
from qexp.system import cache
from qexp.system.steps import step

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TargetAccuracy:
    """Predictions on the target CPU, and the effect of 16-bit accumulators on this model.

    source: the means by which they were found; predictions: on `images` (int64 indices of evaluation images); exact,
    saturating: predictions on the images `compared`, with 32-bit and 16-bit accumulators, None where they were not
    needed; layers: the comparison of the two in each layer.
    """

    source: AccuracySource
    images: np.ndarray
    predictions: Predictions
    saturation: SaturationStatus
    compared: np.ndarray = field(default_factory=lambda: np.arange(0))
    exact: Predictions | None = None
    saturating: Predictions | None = None
    layers: tuple[LayerSaturation, ...] = ()

    @property
    def target_is_exact(self) -> bool:
        """True if the target's accumulators can't saturate."""
        return self.saturation is SaturationStatus.impossible or self.source is AccuracySource.exact

    @property
    def saturating_layers(self) -> tuple[str, ...]:
        """The layers in which accumulators were seen to saturate."""
        return tuple(layer.name for layer in self.layers if layer.saturates)


@step("target")
def target_accuracy(
    config: Config,
    data: Data,
    int8: quantize.QuantizedModel,
    executed: Predictions,
    content: str,
    kernels: Kernels,
) -> TargetAccuracy:
    """The accuracy on the CPU that `config.target` means, by the cheapest means: executed, exact or emulated.

    executed: INT8 predictions on all evaluation images, made on this CPU by `kernels`; content: the identity of int8
    (see `saved_models.content`). Other libraries' kernels are emulated, and their exact sums computed, with torch's
    rounding; those that execute a Q/DQ program, in float.
    """
    everything, module = np.arange(len(executed.labels)), int8.module
    here, there = kernels.here, kernels.there
    program = is_program(module)
    sums: Any = programs if program else _emulation()  # with the same functions
    plain = TargetAccuracy(AccuracySource.executed, everything, executed, SaturationStatus.impossible)
    if config.qconfig.simulated or not sums.at_risk(module, kernels.order, here | there):
        return plain
    kinds = None if kernels.of_torch else here | there
    emulate: Any = SaturatingProgram if program else sums.with_emulated_accumulators
    emulated = partial(emulate, module, kernels.order, kinds=kinds)
    # Depthwise kernels can saturate with VNNI too, so saturation here doesn't prove that this CPU can stand in for
    # target=avx2.
    if here and (config.target is not Target.avx2 or "conv" in here):
        every = config.target is Target.vnni
        compared = everything if every else spread(len(everything), config.saturation.exact_images)
        if not len(compared):
            return replace(plain, saturation=SaturationStatus.possible)
        exact_model = partial(emulated, saturating=False) if program else partial(quantize.exact, int8.prepared)
        title = "evaluating INT8 with exact sums"
        as_executed = module if kernels.of_torch or program else emulated()
        found, layers = _run(exact_model, as_executed, content, config, data, compared, title, kernels, whole=every)
        source, counts = (AccuracySource.exact, found) if every else (AccuracySource.executed, executed)
        return TargetAccuracy(source, everything, counts, _seen(layers), compared, found, executed.at(compared), layers)
    compared = spread(len(everything), config.saturation.emulated_images)
    if left := sums.not_emulated(module):
        said = "%d layers add up as they do on this CPU, since their 16-bit sums can't be emulated: %s."
        log.warning(said, len(left), ", ".join(left))
    found, layers = _run(emulated, module, content, config, data, compared, "emulating 16-bit sums", kernels)
    exact = executed.at(compared) if kernels.of_torch else _predicted(module, config, data, compared)
    return TargetAccuracy(AccuracySource.emulated, compared, found, _seen(layers), compared, exact, found, layers)


def _emulation() -> Any:
    """The emulation of torch's kernels, which knows the modules of torch.ao."""
    from qexp.quantize.torch_backend import emulation

    return emulation


def other_kernels(config: Config) -> str:
    """The reason why timings on this machine don't hold for the target, as a clause; empty where they do."""
    saturates = torch_kernels.probe().dense_saturates(Engine.fbgemm)
    if "target" in config.flow.ignores or config.target is Target.native:
        return ""
    if config.target is Target.vnni and saturates:
        return "timed on a CPU without VNNI, and target=vnni means one with it"
    if config.target is Target.avx2 and not saturates:
        return "timed on a CPU with VNNI, and target=avx2 means one without it"
    return ""


def spread(available: int, wanted: int) -> np.ndarray:
    """int64 indices of `wanted` images, evenly spaced, since a folder's images are sorted by class."""
    count = min(available, wanted)
    return np.arange(count) * available // max(count, 1)


def _seen(layers: tuple[LayerSaturation, ...]) -> SaturationStatus:
    return SaturationStatus.observed if any(layer.saturates for layer in layers) else SaturationStatus.possible


def _predicted(int8: nn.Module, config: Config, data: Data, images: np.ndarray) -> Predictions:
    """Predictions of a converted model in torch's own kernels."""
    size, title = config.evaluate.batch_size, "evaluating INT8 with exact sums"
    with quantize.engine(config.engine):
        return inference.predict(int8, data.test, data.mean, data.std, size, title, images)


def _run(
    make: Callable[[], nn.Module],
    int8: nn.Module,
    content: str,
    config: Config,
    data: Data,
    images: np.ndarray,
    title: str,
    kernels: Kernels,
    whole: bool = False,
) -> tuple[Predictions, tuple[LayerSaturation, ...]]:
    """Predictions of the model that `make` returns, and a comparison of each of its layers with the same one in `int8`.

    content: of int8, a part of the cache key; title: in the progress bar, names how the model differs from int8; whole:
    run layers in which nothing can overflow, too (see `emulation.compared`).
    """

    def run() -> dict[str, np.ndarray]:
        model = make()
        comparing: AbstractContextManager[dict[str, LayerSaturation]] = (
            nullcontext(model.found)
            if isinstance(model, SaturatingProgram)
            else _emulation().compared(int8, model, kernels.order, whole)
        )
        with comparing as layers, quantize.engine(config.engine):
            size = config.evaluate.batch_size
            predictions = inference.predict(model, data.test, data.mean, data.std, size, title, images)
        return {"logits": predictions.logits, "layers": np.array(json.dumps([asdict(one) for one in layers.values()]))}

    how = [*(["whole"] if whole else []), *([] if kernels.of_torch else [kernels.name])]
    key = prediction_key(config, data, [content, title, *how], images)
    found = cache.arrays(cache_folder(config), key, run)
    layers = tuple(LayerSaturation(**values) for values in json.loads(str(found["layers"])))
    return inference.predictions(found["logits"], data.test, title, images), layers
