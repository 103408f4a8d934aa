"""The stage *evaluate*: predictions on all evaluation images, in every runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


@step("evaluate")
def predict(config: Config, data: Data, saved: Saved) -> dict[Variant, Predictions]:
    """Predictions on all evaluation images: of FP32 in its reference runtime, of INT8 in every runtime.

    Runtimes whose logits must be equal bit for bit share predictions, once they agree on the first images. Predictions
    are cached, and so are FP32 logits of the first images, which all runs of a model share. Raises RunError where the
    logits of a runtime, or of the model in memory, differ by more than its tolerance from the reference's on the first
    images (but for INT8 in runtimes that round otherwise, see `partings`), or where the INT8 logits equal the FP32
    logits.
    """
    first_images = np.arange(min(len(data.test), AGREEMENT_IMAGES))
    # Dynamic quantization takes ranges from the whole batch, so an image's logits depend on the batch it is in.
    shuffled = quantize.FLOWS[config.flow].calibrates

    def title(precision: Precision) -> str:
        return f"evaluating {precision.upper()}"

    def run_model(
        model: inference.Model,
        precision: Precision,
        indices: np.ndarray | None = None,
        copies: Sequence[inference.Model] = (),
    ) -> np.ndarray:
        size = config.evaluate.batch_size
        name = title(precision)
        return inference.predict(
            model, data.test, data.mean, data.std, size, name, indices, copies, shuffled and indices is None
        ).logits

    def logits_of(variant: Variant, indices: np.ndarray | None = None) -> np.ndarray:
        model = saved.variants[variant]  # isn't even read from disk where its logits are cached
        # For a few images, making copies would take longer than it saves.
        copies = model.copies(config.compute.threads - 1) if indices is None else ()
        return run_model(model, variant.precision, indices, copies)

    def key(content: str, indices: np.ndarray | None = None) -> str:
        return prediction_key(config, data, [content], indices)

    def as_predictions(logits: np.ndarray, precision: Precision) -> Predictions:
        return inference.predictions(logits, data.test, title(precision))

    def all_logits(variant: Variant) -> np.ndarray:
        return cache.array(folder, key(saved.contents[variant]), partial(logits_of, saved.quickest(variant)))

    found, folder = dict[Variant, Predictions](), cache_folder(config)
    with quantize.engine(config.engine):
        for precision, model in saved.in_memory.items():
            reference = saved.reference_variant(precision)
            # Cached logits may be another process's: then this process checks all variants.
            is_cached = cache.find(folder, key(saved.contents[reference])) is not None
            computed = set() if is_cached else {saved.quickest(reference)}
            logits = all_logits(reference)
            in_memory = f"{saved.contents[reference]}, in memory", partial(run_model, model, precision, first_images)
            others = [one for one in saved.of(precision) if one not in computed]
            of_others = [(one, saved.contents[one], partial(logits_of, one, first_images)) for one in others]
            compared, expected = [(reference, *in_memory), *of_others], logits[first_images]
            if precision is Precision.int8:
                compared = [one for one in compared if not rounds_otherwise(one[0])]  # see `partings`
                if compared and rounds_otherwise(reference):
                    _, compute_in_memory = in_memory
                    expected = compute_in_memory()
            for variant, content, compute in compared:
                shared = precision is Precision.fp32
                again = cache.array(folder, key(content, first_images), compute) if shared else compute()
                agree(expected, again, precision, saved.tolerance(variant))
            found[reference] = as_predictions(logits, precision)
            if precision is Precision.int8:
                for variant in saved.of(precision):
                    same = variant in saved.same(reference)
                    found[variant] = found[reference] if same else as_predictions(all_logits(variant), precision)
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
