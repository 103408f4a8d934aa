"""The interface of every runtime, and Loaded, a model read back from disk, which runs under one engine only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, fx, nn

from qexp import quantize
from qexp.config import schema
from qexp.config.schema import Engine, FlowName
from qexp.errors import RunError
from qexp.quantize import qdq
from qexp.records import Precision, Variant

HERE = "Path(__file__).resolve().parent"  # in a script


class Runtime(ABC):
    """One way to execute models.

    name: as in the setting `runtimes`, with the runtime's traits. predicts_for_others: it has so little overhead around
    its kernels that it predicts in place of runtimes whose logits equal its own bit for bit. reads_program: it executes
    the Q/DQ program. rounds_otherwise: it does so with INT8 kernels of its own, which round otherwise than those of
    torch's quantized modules, so that its logits are compared by `parting`. kernels_of: torch's engine whose kernels
    these are, None where they are another library's.
    """

    name: schema.RuntimeName
    predicts_for_others = False
    reads_program = False
    rounds_otherwise = False
    kernels_of: Engine | None = None

    def unavailable(self) -> str | None:
        """A clause that says why this runtime can't be used here and what to do about it; None where it can."""
        return None

    def version(self) -> str:
        """The packages, with their versions, that its answers depend on besides torch; empty where there are none."""
        return ""

    def executes(self, flow: FlowName, precision: Precision) -> bool:
        """True if it executes the models of this precision that a flow makes; there is no Q/DQ program of a flow that
        computes ranges as the model runs."""
        takes = "calib" not in flow.ignores if self.reads_program else flow.executed_by_torch
        return precision is Precision.fp32 or (self.name.int8 and takes)

    def takes(self, program: fx.Graph) -> bool:
        """True if it is known to take every Q/DQ program of these operators; others are tried on one image before any
        work. program: of an INT8 model that it executes by such a program."""
        return True

    def tolerance(self, precision: Precision, all_int8: bool) -> float:
        """The allowed difference of its logits from those of the model in memory, as a share of the largest logit; 0
        where they must be equal bit for bit.

        all_int8: True if no layer of the INT8 model is left in FP32, whose last bits could round an activation to the
        neighbouring code.
        """
        if precision is Precision.fp32:
            return 1e-4
        if self.rounds_otherwise:
            return 5e-2  # of itself with another batch size: a few steps of the logits' grid
        return 0.0 if all_int8 else 1e-2

    def file(self, precision: Precision) -> str:
        """The name of the file that a model is saved to; the same for runtimes that load the same file."""
        return f"{Variant(precision, self.name)}.pt"

    def loading_code(self, file: str) -> tuple[str, str]:
        """An import, and a line that sets `model` to the INT8 model, for a script beside the file."""
        return "\nfrom qexp.runtimes.saved_models import load_int8\n", f"model = load_int8({HERE}.parent)\n"

    def program(self, model: nn.Module, example: Tensor) -> fx.GraphModule:
        """The Q/DQ program that it executes (see `qdq.program`). Of runtimes that read one."""
        return qdq.program(model, example)

    def key(self, model: nn.Module, example: Tensor) -> str:
        """All that determines a file that takes long to export, by which it is kept; empty where none does.

        Arguments as in `export`.
        """
        return ""

    def compile_seconds(self, path: Path) -> float | None:
        """The seconds that the file took to compile; None for a runtime that compiles none."""
        return None

    def layers(self, path: Path, shape: Sequence[int]) -> tuple[int, int]:
        """The numbers of convolutions and matrix products that it executes of a file, for images of this shape,
        [n, 3, H, W]: in INT8, and in float. Of runtimes with kernels of their own."""
        raise NotImplementedError

    def codes(self, model: nn.Module, path: Path, images: Tensor) -> list[np.ndarray]:
        """Return the codes, uint8, that this runtime computes for each tensor that `program` quantizes, in its order.

        Runtimes with kernels of their own have them.

        model: converted; path: its file; images: float32 [n, 3, H, W]. torch's engine must be set.
        """
        raise NotImplementedError

    @abstractmethod
    def export(self, model: nn.Module, example: Tensor, path: Path) -> Path:
        """Save a fused FP32 model or a converted INT8 one to `path`. example: float32 [n, 3, H, W]; for INT8, torch's
        engine must be set."""

    @abstractmethod
    def load(self, path: Path, structure: Callable[[], nn.Module], engine: Engine | None) -> Loaded:
        """Read back what `export` saved.

        structure: makes the model's modules anew, with any weights; engine: what an INT8 model was converted for, None
        for FP32. Raises RunError where the file holds another model.
        """


@contextmanager
def packing_for(engine: Engine | None) -> Iterator[None]:
    """Set the engine while INT8 weights are read from a file: they are packed then, and the packing decides whose
    kernels run, whatever the engine is later. None: FP32, where it doesn't matter."""
    with quantize.engine(engine) if engine is not None else nullcontext():
        yield


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model read back from disk: float32 [n, 3, H, W] to float32 [n, classes], for any n.

    engine: what an INT8 model was converted for (None: FP32, or another library's kernels); calling it under another
    raises RunError. again: reloads the file. Needed for frozen TorchScript, where deepcopy would share the constants,
    and for other libraries' models. reentrant: such a model can be called by several threads at a time.
    """

    module: nn.Module
    engine: Engine | None
    channels_last: bool = False
    again: Callable[[], Loaded] | None = None
    reentrant: bool = True

    def __call__(self, images: Tensor) -> Tensor:
        if self.engine is not None:
            quantize.require(self.engine)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            logits: Tensor = self.module(images)
        return logits

    def copies(self, count: int) -> list[Loaded]:
        """`count` copies that can run at the same time as the model, whatever state it has while it runs.

        Weights are shared, but for those packed for INT8 kernels.
        """
        if self.again is not None:
            return [self if self.reentrant else self.again() for _ in range(count)]
        with packing_for(self.engine):
            return [replace(self, module=quantize.sharing_copy(self.module)) for _ in range(count)]


class OnDemand(Mapping[Variant, Loaded]):
    """Models by variant, each read from disk at its first use."""

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


def agree(expected: np.ndarray, actual: np.ndarray, precision: Precision, tolerance: float) -> float:
    """The largest difference of the same images' logits, as a share of the largest logit.

    expected, actual: float32 [n, classes] of two variants of one model of this precision, computed in batches of one
    size. Raises RunError where the two differ by more than `tolerance`.
    """
    largest, difference = float(np.abs(expected).max()), float(np.abs(expected - actual).max())
    relative = difference / largest if largest else difference
    if not relative <= tolerance:
        raise RunError(
            f"two runtimes of the same {precision.upper()} model differ by {relative:.2g} of the largest logit: "
            f"{tolerance:g} is allowed."
        )
    return relative
