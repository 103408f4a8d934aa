"""The stage *evaluate*: predictions on all evaluation images, equal in every runtime."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from qexp import quantize
from qexp.accuracy import predictions
from qexp.config.schema import (
    Config,
    Flow,
    cache_folder,
)
from qexp.data.splits import Data
from qexp.errors import RunError
from qexp.models import inference
from qexp.pipeline.prepare import AGREEMENT_IMAGES, Saved
from qexp.records import Precision, Predictions, Variant
from qexp.runtimes.base import agree
from qexp.system import cache


def predicted(config: Config, data: Data, saved: Saved) -> dict[str, Predictions]:
    """Predictions on all evaluation images by precision, those of the first of the runtimes that execute it.

    They are kept, and so is what the FP32 variants answer on the first images, which all runs of a model share. Raises
    RunError where any of the runtimes, or the model that was saved, gives other logits on these, or where the INT8
    logits are the FP32 ones.
    """
    few = np.arange(min(len(data.test), AGREEMENT_IMAGES))
    # Where activations are quantized as they come, an image's logits depend on the others of its batch.
    shuffled = config.flow is not Flow.dynamic

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
        return predictions.predictions_key(config, data, [content], indices)

    found, folder = dict[str, Predictions](), cache_folder(config)
    with quantize.engine(config.engine):
        for precision, model in saved.in_memory.items():
            first = saved.first(precision)
            quickest = saved.quickest(first)
            # What was kept may be of another process: then all are checked.
            checked = {quickest} if cache.find(folder, key(saved.contents[first])) is None else set()
            logits = cache.array(folder, key(saved.contents[first]), partial(answers, quickest))
            in_memory = f"{saved.contents[first]}, in memory", partial(predict, model, precision, few)
            others = [one for one in saved.variants if one.precision is precision and one not in checked]
            of_others = [(one, saved.contents[one], partial(answers, one, few)) for one in others]
            for variant, content, answer in [(first, *in_memory), *of_others]:
                again = cache.array(folder, key(content, few), answer) if precision is Precision.fp32 else answer()
                agree(logits[few], again, precision, saved.tolerance(variant))
            found[precision] = inference.predictions(logits, data.test, title(precision))
    if np.array_equal(found["fp32"].logits, found["int8"].logits):
        raise RunError("the INT8 logits equal the FP32 logits bit for bit: nothing was quantized.")
    return found
