"""What `load` of every runtime gives back: a callable that refuses to run under another engine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from qexp import quantize
from qexp.config.schema import Engine, Runtime
from qexp.errors import RunError
from qexp.records import CUDA, Precision, Variant

TOLERANCE = {"fp32": 1e-4, "int8": 0.0, "mixed": 1e-2}
"""How far two runtimes may be apart, as a share of the largest logit. mixed: INT8 with layers left in FP32, whose
last bits may move an activation to the next step of its grid."""


@contextmanager
def packing_for(engine: Engine | None) -> Iterator[None]:
    """While INT8 weights are read from a file. They are packed as they are read, for the engine of that moment, and it
    is the packing that decides whose kernels run, whatever the engine is later. None: FP32, where it doesn't matter."""
    with quantize.engine(engine) if engine is not None else nullcontext():
        yield


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model read back from disk: float32 [n, 3, H, W] to float32 [n, classes], for any n.

    engine: what an INT8 model was converted for (None: FP32); calling it under another raises RunError. again: reads it
    once more, where no copy in memory would be a model of its own: what freezing made constants is shared.
    """

    module: nn.Module
    engine: Engine | None
    channels_last: bool = False
    again: Callable[[], Loaded] | None = None

    def __call__(self, images: Tensor) -> Tensor:
        if self.engine is not None:
            quantize.require(self.engine)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            logits: Tensor = self.module(images)
        return logits

    def copies(self, count: int) -> list[Loaded]:
        """So many more that can run at the same time, whatever the model keeps in itself while it runs.

        Weights are shared, but for those that are packed for INT8 kernels. A traced and frozen model keeps nothing in
        itself, but oneDNN's dynamic linear layer keeps what it needs for the range of its input: called twice at a
        time, it answers with the range of the other call (torch 2.13).
        """
        if self.again is not None:
            return [self.again() if self.engine is Engine.onednn else self for _ in range(count)]
        with packing_for(self.engine):
            return [replace(self, module=quantize.sharing_copy(self.module)) for _ in range(count)]


class OnDemand(Mapping[Variant, Loaded]):
    """Models by variant, each of which is read from disk when it is first asked for."""

    def __init__(self, read: Mapping[Variant, Callable[[], Loaded]]) -> None:
        self._read, self._loaded = read, dict[Variant, Loaded]()

    def __getitem__(self, variant: Variant) -> Loaded:
        if variant not in self._loaded:
            self._loaded[variant] = self._read[variant]()
        return self._loaded[variant]

    def __contains__(self, variant: object) -> bool:
        return variant in self._read  # Mapping's own would read it

    def __iter__(self) -> Iterator[Variant]:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)


def with_cuda(variants: Mapping[Variant, Loaded]) -> dict[Variant, Callable[[Tensor], Tensor]]:
    """The variants, and where torch finds a GPU the eager float model on it: a call takes an image from the CPU and
    gives its logits back there."""
    eager = Variant(Precision.fp32, Runtime.eager)
    if not torch.cuda.is_available() or eager not in variants:
        return dict(variants)
    module = copy.deepcopy(variants[eager].module).cuda()
    return {**variants, Variant(Precision.fp32, CUDA): lambda images: module(images.cuda()).cpu()}


def agree(expected: np.ndarray, actual: np.ndarray, precision: str) -> float:
    """Largest difference of the same images' logits, as a share of the largest.

    expected, actual: float32 [n, classes] of two variants of one model, computed in batches of one size; precision: a
    key of TOLERANCE. Raises RunError where the two differ by more than that allows.
    """
    largest, difference = float(np.abs(expected).max()), float(np.abs(expected - actual).max())
    relative = difference / largest if largest else difference
    if not relative <= TOLERANCE[precision]:
        raise RunError(
            f"two runtimes of the same {precision.upper()} model differ by {relative:.2g} of the largest logit: "
            f"{TOLERANCE[precision]:g} is allowed."
        )
    return relative
