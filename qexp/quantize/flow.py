"""The interface of every flow, from a float model to an INT8 one, and the values that its steps pass on.

The steps are `fuse` → `prepare` → (calibration) → `convert`. The flows are in `quantize/flows/`, a file each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, cast

from torch import Tensor, fx, nn

from qexp.config import schema
from qexp.config.schema import Engine, Observer, QConfig
from qexp.quantize.calibration.observers import observed_qparams, ranges_taken
from qexp.quantize.graph.exported import is_program
from qexp.quantize.inspection.programs import program_layers
from qexp.quantize.torch_backend.engines import engine
from qexp.records import Layer, QParams
from qexp.system.steps import step

if TYPE_CHECKING:
    from torch.export import ExportedProgram


@dataclass(frozen=True)
class QuantizationSpec:
    """The settings that a model is quantized with.

    qconfig: with `overflow` resolved, never `auto`; engine: its INT8 kernels run; fusion: True to make Conv, BatchNorm
    and ReLU one module, in the flows that fuse on request.
    """

    qconfig: QConfig
    observer: Observer
    engine: Engine
    fusion: bool = True


@dataclass(frozen=True, eq=False)
class Prepared:
    """A model ready for calibration, or for conversion where the flow doesn't calibrate.

    fused: the float model that `Flow.fuse` returned; module: a copy of it with the flow's observers.
    """

    flow: Flow
    spec: QuantizationSpec
    fused: nn.Module
    module: nn.Module


@dataclass(frozen=True, eq=False)
class QuantizedModel:
    """An INT8 model.

    prepared: the model that it was converted from; module: computes float32 logits [n, classes] from float32
    [n, 3, H, W], under `engine` only, for which its weights are packed.
    """

    prepared: Prepared
    module: nn.Module

    @property
    def flow(self) -> Flow:
        return self.prepared.flow

    @property
    def engine(self) -> Engine:
        return self.prepared.spec.engine

    @property
    def qconfig(self) -> QConfig:
        return self.prepared.spec.qconfig

    @property
    def fused(self) -> nn.Module:
        """The float model that it was converted from."""
        return self.prepared.fused

    @cached_property
    def qparams(self) -> dict[str, QParams]:
        """Scale, zero point and grid by tensor name: an activation's is the module or operation that computes it, a
        weight's the layer's with `.weight`."""
        if is_program(self.module):
            return observed_qparams(self.prepared.module)
        from qexp.quantize.torch_backend.layers import read_qparams

        return read_qparams(self.prepared.module)

    @cached_property
    def ranges_taken(self) -> dict[str, str]:
        """Where the range of each quantized activation was taken, in words, by tensor name."""
        return ranges_taken(self.prepared.module)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Each layer, with the kernel that runs it in INT8 or the reason why it stays in FP32."""
        if is_program(self.module):
            return program_layers(cast(fx.GraphModule, self.module))
        from qexp.quantize.torch_backend.layers import layers

        return layers(self.module, self.flow, self.engine)

    def qdq_program(self, example: Tensor) -> ExportedProgram:
        """Return the Q/DQ program of the model (see `qdq.program`), for any number of images.

        example: float32 [n, 3, H, W], n > 1. Raises UnsupportedError, which names the module, where there is none.
        """
        from qexp.quantize import qdq

        with engine(self.engine):
            return qdq.exported(qdq.program(self.module, example), example)


class Flow(ABC):
    """One way to quantize a model.

    name: the value of the setting `flow`, which also lists the settings without effect. traced: True if the model is
    traced into a graph, which contains neither hooks on modules nor decisions that forward takes at each call.
    observes_functions: True if outputs of functions have ranges of their own, as outputs of modules always do.
    folds_batchnorm: True if a BatchNorm that follows a convolution is folded into it.
    """

    name: schema.FlowName
    traced: bool
    observes_functions: bool
    folds_batchnorm: bool

    def __init_subclass__(cls) -> None:
        for name in ("fuse", "prepare", "convert"):  # steps of a run, which are timed
            if name in vars(cls):
                setattr(cls, name, step(name)(vars(cls)[name]))

    @property
    def ignores(self) -> frozenset[str]:
        """Settings without effect, as names or prefixes of names."""
        return self.name.ignores

    @property
    def calibrates(self) -> bool:
        """True if ranges of activations come from calibration images; otherwise each call computes its own."""
        return "calib" not in self.ignores

    @property
    def fuses_on_request(self) -> bool:
        """True if the setting `fusion` decides whether modules are fused."""
        return "fusion" not in self.ignores

    def leaves_in_float(self, layer: nn.Module, kind: str) -> str:
        """The reason why the flow leaves this layer in FP32, as a clause, or "". kind: as in `records.Layer`."""
        return ""

    @abstractmethod
    def fuse(self, model: nn.Module, spec: QuantizationSpec, example: Tensor) -> nn.Module:
        """Return a copy of a float model in the form that the flow quantizes, in evaluation mode and equivalent to it.

        example: float32 [n, 3, H, W]. Raises InputError if the flow doesn't support the model.
        """

    @abstractmethod
    def prepare(self, fused: nn.Module, spec: QuantizationSpec, example: Tensor) -> Prepared:
        """Return a copy of a fused model with the flow's observers. example: float32 [n, 3, H, W]."""

    @abstractmethod
    def convert(self, prepared: Prepared) -> QuantizedModel:
        """Return an INT8 copy of a model whose observers have seen calibration images."""
