"""The stage *evaluate*: predictions on all evaluation images, in every runtime."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from qexp import quantize
from qexp.accuracy.prediction_key import prediction_key
from qexp.config.schema import (
    Config,
    cache_folder,
)
from qexp.data.loading import Data
from qexp.errors import RunError
from qexp.models import inference
from qexp.pipeline.prepare import AGREEMENT_IMAGES, Saved
from qexp.records import Precision, Predictions, Variant
from qexp.runtimes.base import agree
from qexp.system import cache
from qexp.system.steps import step


@step("evaluate")
def predict(config: Config, data: Data, saved: Saved) -> dict[Variant, Predictions]:
    """Predictions on all evaluation images, of FP32 in the first of its runtimes, of INT8 in each.

    A runtime that gives the logits of another bit for bit has its predictions, after a comparison of the two on the
    first images. All are cached, and so are the FP32 logits of these, which all runs of a model share. Raises RunError
    where the logits of a runtime, or of the model that was saved, are too far from the first's on these, or where the
    INT8 logits are the FP32 ones.
    """
    few = np.arange(min(len(data.test), AGREEMENT_IMAGES))
    # Where activations are quantized as they come, an image's logits depend on the others of its batch.
    shuffled = quantize.FLOWS[config.flow].calibrates

    def title(precision: Precision) -> str:
        return f"evaluating {precision.upper()}"

    def predict(
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

    def answers(variant: Variant, indices: np.ndarray | None = None) -> np.ndarray:
        model = saved.variants[variant]  # one whose answers are kept is not even read
        # To make copies takes longer than a few images do.
        copies = model.copies(config.compute.threads - 1) if indices is None else ()
        return predict(model, variant.precision, indices, copies)

    def key(content: str, indices: np.ndarray | None = None) -> str:
        return prediction_key(config, data, [content], indices)

    def checked(logits: np.ndarray, precision: Precision) -> Predictions:
        return inference.predictions(logits, data.test, title(precision))

    def everywhere(variant: Variant) -> np.ndarray:
        return cache.array(folder, key(saved.contents[variant]), partial(answers, saved.quickest(variant)))

    found, folder = dict[Variant, Predictions](), cache_folder(config)
    with quantize.engine(config.engine):
        for precision, model in saved.in_memory.items():
            first = saved.reference_variant(precision)
            # What was cached may be of another process: then all are checked.
            computed = {saved.quickest(first)} if cache.find(folder, key(saved.contents[first])) is None else set()
            logits = everywhere(first)
            in_memory = f"{saved.contents[first]}, in memory", partial(predict, model, precision, few)
            others = [one for one in saved.of(precision) if one not in computed]
            of_others = [(one, saved.contents[one], partial(answers, one, few)) for one in others]
            for variant, content, answer in [(first, *in_memory), *of_others]:
                again = cache.array(folder, key(content, few), answer) if precision is Precision.fp32 else answer()
                agree(logits[few], again, precision, saved.tolerance(variant))
            found[first] = checked(logits, precision)
            if precision is Precision.int8:
                for variant in saved.of(precision):
                    same = variant in saved.same(first)
                    found[variant] = found[first] if same else checked(everywhere(variant), precision)
    fp32, int8 = (found[saved.reference_variant(precision)].logits for precision in Precision)
    if np.array_equal(fp32, int8):
        raise RunError("the INT8 logits equal the FP32 logits bit for bit: nothing was quantized.")
    return found
