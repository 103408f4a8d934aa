"""How a float model becomes an INT8 one: the interface of every flow, and what its steps hand on.

The steps are `fuse` → `prepare` → (calibration) → `convert`. The flows are in `quantize/flows/`, a file each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from qexp.config import schema
from qexp.config.schema import Engine, Observer, QConfig
from qexp.quantize.inspection.layers import layers, read_qparams
from qexp.records import Layer, QParams
from qexp.system.steps import step


@dataclass(frozen=True)
class QuantizationSpec:
    """What a model is to be quantized with. qconfig: with `overflow` resolved, which `auto` is not; engine: whose INT8
    kernels run; fusion: whether Conv, BatchNorm and ReLU become one module, in the flows that do that on request."""

    qconfig: QConfig
    observer: Observer
    engine: Engine
    fusion: bool = True


@dataclass(frozen=True, eq=False)
class Prepared:
    """A model ready for calibration, or for conversion where the flow doesn't calibrate.

    fused: the float model as from `Flow.fuse`; module: a copy with the flow's observers.
    """

    flow: Flow
    spec: QuantizationSpec
    fused: nn.Module
    module: nn.Module


@dataclass(frozen=True, eq=False)
class QuantizedModel:
    """What a flow hands over. prepared: what it was converted from; module: executes it, float32 [n, 3, H, W] to
    float32 [n, classes], under `engine` only, which its weights are packed for."""

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
        """The float model that it was made from, which computes the same in FP32."""
        return self.prepared.fused

    @cached_property
    def qparams(self) -> dict[str, QParams]:
        """Scale, zero point and grid by tensor name (see `read_qparams`)."""
        return read_qparams(self.prepared.module)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Each layer, with the kernel that runs it in INT8 or why it stays in FP32."""
        return layers(self.module, self.flow, self.engine)


class Flow(ABC):
    """One way to quantize a model.

    name: as in the setting `flow`, which also knows the settings without effect. traced: whether the model becomes a
    graph, by tracing: hooks on its modules, and what forward decides at each call, are not in it. observes_functions:
    whether what functions give has a range of its own, and not what modules give alone. folds_batchnorm: whether a
    BatchNorm that follows a convolution becomes part of it.
    """

    name: schema.FlowName
    traced: bool
    observes_functions: bool
    folds_batchnorm: bool

    def __init_subclass__(cls) -> None:
        for name in ("fuse", "prepare", "convert"):  # how long they take is noted
            if name in vars(cls):
                setattr(cls, name, step(name)(vars(cls)[name]))

    @property
    def ignores(self) -> frozenset[str]:
        """Settings without effect, as names or prefixes of names."""
        return self.name.ignores

    @property
    def calibrates(self) -> bool:
        """Whether ranges of activations come from calibration images; else each call computes its own."""
        return "calib" not in self.ignores

    @property
    def fuses_on_request(self) -> bool:
        """Whether the setting `fusion` decides if modules are fused."""
        return "fusion" not in self.ignores

    def leaves_in_float(self, layer: nn.Module, kind: str) -> str:
        """Why the flow quantizes no such layer, as a clause; empty where it does. kind: as of `records.Layer`."""
        return ""

    @abstractmethod
    def fuse(self, model: nn.Module, spec: QuantizationSpec, example: Tensor) -> nn.Module:
        """A copy of a float model in the form that the flow quantizes, in evaluation mode; it computes the same.

        example: float32 [n, 3, H, W]. Raises InputError where the flow can't take the model.
        """

    @abstractmethod
    def prepare(self, fused: nn.Module, spec: QuantizationSpec, example: Tensor) -> Prepared:
        """A copy of a fused model with observers where the flow puts them. example: float32 [n, 3, H, W]."""

    @abstractmethod
    def convert(self, prepared: Prepared) -> QuantizedModel:
        """A converted copy of a model whose observers have seen calibration images."""
