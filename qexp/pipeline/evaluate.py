"""The stage *evaluate*: predictions on all evaluation images, in every runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from qexp import quantize
from qexp.accuracy.prediction_key import prediction_key
from qexp.config.schema import Config, cache_folder
from qexp.data.loading import Data
from qexp.errors import RunError
from qexp.models import inference
from qexp.pipeline.prepare import AGREEMENT_IMAGES, Saved, images_of
from qexp.records import Precision, Predictions, Variant
from qexp.runtimes import RUNTIMES
from qexp.runtimes.base import agree
from qexp.runtimes.parting import MOST, Parting, first_parted, times_rounding
from qexp.system import cache
from qexp.system.steps import step

PARTING_IMAGES = 16  # on which tensors of all layers are compared


@dataclass(frozen=True)
class Evaluation:
    """The means to evaluate a run's saved models. known: logits of variants on all evaluation images that are at hand,
    float32 [N, classes]. Call its methods with torch's engine set."""

    config: Config
    data: Data
    saved: Saved
    known: Mapping[Variant, np.ndarray] = field(default_factory=dict)

    def run(
        self,
        model: inference.Model,
        precision: Precision,
        indices: np.ndarray | None = None,
        copies: Sequence[inference.Model] = (),
    ) -> np.ndarray:
        """Logits on all evaluation images or on `indices` (int64): float32 [n, classes]."""
        config, data = self.config, self.data
        # Dynamic quantization takes ranges from the whole batch, so an image's logits depend on the batch it is in.
        shuffled = quantize.FLOWS[config.flow].calibrates and indices is None
        size = config.evaluate.batch_size
        return inference.predict(
            model, data.test, data.mean, data.std, size, title(precision), indices, copies, shuffled
        ).logits

    def of_first(self, variant: Variant, indices: np.ndarray) -> np.ndarray:
        """Logits on a few images, for which making copies would take longer than it saves."""
        return self.run(self.saved.variants[variant], variant.precision, indices)

    def copies(self, variant: Variant) -> list[inference.Model]:
        """Copies of a variant's model, one for each further thread."""
        return list(self.saved.variants[variant].copies(self.config.compute.threads - 1))

    def key(self, content: str, indices: np.ndarray | None = None) -> str:
        return prediction_key(self.config, self.data, [content], indices)

    def at_hand(self, variant: Variant) -> np.ndarray | None:
        """Logits on all images that were computed before: float32 [N, classes]; None where they weren't."""
        return cache.find(cache_folder(self.config), self.key(self.saved.contents[variant]))

    def logits(self, variant: Variant) -> np.ndarray:
        """Logits on all images, which are cached: float32 [N, classes]."""

        def make() -> np.ndarray:
            if variant in self.known:
                return self.known[variant]
            quickest = self.saved.quickest(variant)
            model = self.saved.variants[quickest]  # isn't even read from disk where its logits are cached
            return self.run(model, variant.precision, None, self.copies(quickest))

        return cache.array(cache_folder(self.config), self.key(self.saved.contents[variant]), make)


def title(precision: Precision) -> str:
    return f"evaluating {precision.upper()}"


@step("evaluate")
def predict(
    config: Config, data: Data, saved: Saved, known: Mapping[Variant, np.ndarray] | None = None
) -> dict[Variant, Predictions]:
    """Predictions on all evaluation images: of FP32 in its reference runtime, of INT8 in every runtime.

    known: logits that this process has computed already, float32 [N, classes] (see `race`).

    Runtimes whose logits must be equal bit for bit share predictions, once they agree on the first images. Predictions
    are cached, and so are FP32 logits of the first images, which all runs of a model share. Raises RunError where the
    logits of a runtime, or of the model in memory, differ by more than its tolerance from the reference's on the first
    images (but for INT8 in runtimes that round otherwise, see `partings`), or where the INT8 logits equal the FP32
    logits.
    """
    first_images = np.arange(min(len(data.test), AGREEMENT_IMAGES))
    evaluation = Evaluation(config, data, saved, known or {})

    def as_predictions(logits: np.ndarray, precision: Precision) -> Predictions:
        return inference.predictions(logits, data.test, title(precision))

    found, folder = dict[Variant, Predictions](), cache_folder(config)
    with quantize.engine(config.engine):
        for precision, model in saved.in_memory.items():
            reference = saved.reference_variant(precision)
            # Cached logits may be another process's: then this process checks all variants.
            is_cached = reference not in evaluation.known and evaluation.at_hand(reference) is not None
            computed = set() if is_cached else {saved.quickest(reference)}
            logits = evaluation.logits(reference)
            compute = partial(evaluation.run, model, precision, first_images)
            in_memory = f"{saved.contents[reference]}, in memory", compute
            others = [one for one in saved.of(precision) if one not in computed]
            of_others = [(one, saved.contents[one], partial(evaluation.of_first, one, first_images)) for one in others]
            compared, expected = [(reference, *in_memory), *of_others], logits[first_images]
            if precision is Precision.int8:
                compared = [one for one in compared if not rounds_otherwise(one[0])]  # see `partings`
                if compared and rounds_otherwise(reference):
                    _, compute_in_memory = in_memory
                    expected = compute_in_memory()
            for variant, content, compute in compared:
                shared = precision is Precision.fp32
                key = evaluation.key(content, first_images)
                again = cache.array(folder, key, compute) if shared else compute()
                agree(expected, again, precision, saved.tolerance(variant))
            found[reference] = as_predictions(logits, precision)
            if precision is Precision.int8:
                for variant in saved.of(precision):
                    same = variant in saved.same(reference)
                    found[variant] = found[reference] if same else as_predictions(evaluation.logits(variant), precision)
    fp32, int8 = (found[saved.reference_variant(precision)].logits for precision in Precision)
    if np.array_equal(fp32, int8):
        raise RunError("the INT8 logits equal the FP32 logits bit for bit: nothing was quantized.")
    return found


def rounds_otherwise(variant: Variant) -> bool:
    """True if the variant's INT8 kernels are not torch's, and round otherwise."""
    return RUNTIMES[variant.runtime].rounds_otherwise


@step("layers of runtimes")
def runtime_layers(config: Config, data: Data, saved: Saved) -> dict[str, tuple[int, int]]:
    """For each runtime with kernels of its own, the numbers of layers that it says it executes in INT8, and in FP32.

    Raises RunError where there is none in INT8.
    """
    found = {}
    for variant in filter(rounds_otherwise, saved.of(Precision.int8)):
        shape = config.latency.batch_sizes[0], *data.test.shape
        found[variant.runtime] = RUNTIMES[variant.runtime].layers(saved.path(variant), shape)
        if not found[variant.runtime][0]:
            raise RunError(
                f"{variant.runtime} executes no layer of the INT8 model in INT8: take it out of runtimes, or try the "
                "other flow."
            )
    return found


@step("compare runtimes")
def partings(
    config: Config, data: Data, saved: Saved, predictions: Mapping[Variant, Predictions]
) -> tuple[Parting, ...]:
    """The runtimes with kernels of their own whose INT8 logits part from torch's by more than rounding explains."""
    others = [variant for variant in saved.of(Precision.int8) if rounds_otherwise(variant)]
    if not others:
        return ()
    first = np.arange(min(len(data.test), AGREEMENT_IMAGES))
    fp32 = predictions[saved.reference_variant(Precision.fp32)].logits[first]
    model, few = saved.in_memory[Precision.int8], images_of(data, data.test.pixels(first[:PARTING_IMAGES]))
    found = []
    with quantize.engine(config.engine):
        size = config.evaluate.batch_size
        int8 = inference.predict(model, data.test, data.mean, data.std, size, "comparing runtimes", first).logits
        for variant in others:
            times = times_rounding(fp32, int8, predictions[variant].logits[first])
            if times > MOST:
                layer, steps = first_parted(model, few, saved.path(variant), RUNTIMES[variant.runtime])
                found.append(Parting(variant.runtime, times, layer, steps))
    return tuple(found)
