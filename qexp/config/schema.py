"""The schema of a configuration, as dataclasses of plain values.

`conversion.from_hydra` makes them of Hydra's DictConfig, `validation.check` checks them. Neither torch nor mlflow is
imported, so that bad input is refused within about a second.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qexp.records import Precision

KERNEL_BITS, MOST_BITS = 8, 16
"""The bits that INT8 kernels hold, and those that can be simulated in float."""


class Granularity(StrEnum):
    per_tensor = "per_tensor"
    per_channel = "per_channel"


class Scheme(StrEnum):
    symmetric = "symmetric"
    asymmetric = "asymmetric"


class Overflow(StrEnum):
    """The side whose range is reduced to 7 bits, so that the sum of two products fits into 16 bits; layers: only in
    layers where it would not, on the side where that costs less accuracy."""

    auto = "auto"
    none = "none"
    weights = "weights"
    activations = "activations"
    layers = "layers"


class Placement(StrEnum):
    """Where a network is quantized: around each operator that has an INT8 kernel, or only what goes into convolutions
    and linear layers; auto: where the runtimes asked for are fastest."""

    auto = "auto"
    every_op = "every_op"
    layers = "layers"


class WeightObserver(StrEnum):
    minmax = "minmax"
    mse = "mse"


class ActivationObserver(StrEnum):
    """A way to find the range of an activation (see `qexp.quantize.calibration.ranges`), followed by its parameters.

    parameters: these fields of `Observer`; its other fields are null.
    """

    parameters: tuple[str, ...]

    def __new__(cls, name: str, *parameters: str) -> ActivationObserver:
        observer = str.__new__(cls, name)
        observer._value_ = name
        observer.parameters = parameters
        return observer

    minmax = "minmax"
    moving_average = "moving_average", "averaging_constant"
    histogram = "histogram", "bins"
    percentile = "percentile", "percentile"
    mse = "mse"
    entropy = "entropy", "bins"


class Sampling(StrEnum):
    random = "random"
    stratified = "stratified"
    first = "first"


class Engine(StrEnum):
    x86 = "x86"
    fbgemm = "fbgemm"
    onednn = "onednn"
    qnnpack = "qnnpack"


class FlowName(StrEnum):
    """A way to quantize a model (see `qexp.quantize.flow`), followed by its traits.

    ignores: settings that have no effect in it, as names or prefixes of names; placements: the values of
    qconfig.placement that it can do, but auto; executed_by_torch: True if torch has INT8 kernels for its models, False
    if only runtimes that read their Q/DQ program execute them, and the model in memory is a simulation in float;
    packages: of Python that it needs, which an extra of qexp with its name installs.
    """

    ignores: frozenset[str]
    placements: tuple[Placement, ...]
    executed_by_torch: bool
    packages: tuple[str, ...]

    def __new__(
        cls,
        name: str,
        ignores: tuple[str, ...] = (),
        placements: tuple[Placement, ...] = (Placement.every_op,),
        executed_by_torch: bool = True,
        packages: tuple[str, ...] = (),
    ) -> FlowName:
        flow = str.__new__(cls, name)
        flow._value_ = name
        flow.ignores, flow.placements = frozenset(ignores), placements
        flow.executed_by_torch, flow.packages = executed_by_torch, packages
        return flow

    @property
    def missing(self) -> list[str]:
        """The packages that it needs and that aren't installed."""
        return missing(self.packages)

    eager = "eager"
    fx = "fx", ("fusion",)
    pt2e = "pt2e", ("fusion", "engine"), (Placement.every_op, Placement.layers), False, ("torchao",)
    # torch computes ranges of activations as the model runs, and reduces them to 7 bits by itself.
    dynamic = (
        "dynamic",
        (
            "fusion",
            "observer",
            "calib",
            "target",
            "saturation",
            "per_layer",
            "qconfig.activation.scheme",
            "qconfig.activation.bits",
            "qconfig.overflow",
            "qconfig.range_after_clamp",
            "qconfig.placement",
        ),
    )


class Target(StrEnum):
    native = "native"
    avx2 = "avx2"
    vnni = "vnni"


class RuntimeName(StrEnum):
    """A way to execute a saved model (see `qexp.runtimes`), followed by its traits.

    int8: it executes INT8 models too; symmetric: of these, only such with symmetric weights; portable: its file is
    loaded without qexp; served: MLflow serves its file; simulates: it computes in float models of more bits than
    kernels hold, and no others: nothing that could ship; packages: of Python that it needs, which an extra of qexp with
    its name installs.
    """

    int8: bool
    symmetric: bool
    portable: bool
    served: bool
    simulates: bool

    def __new__(cls, name: str, *traits: str) -> RuntimeName:
        runtime = str.__new__(cls, name)
        runtime._value_ = name
        for trait in ("int8", "symmetric", "portable", "served", "simulates"):
            setattr(runtime, trait, trait in traits)
        return runtime

    @property
    def packages(self) -> tuple[str, ...]:
        return _PACKAGES.get(str(self), ())

    @property
    def missing(self) -> list[str]:
        """The packages that it needs and that aren't installed."""
        return missing(self.packages)

    @classmethod
    def auto(cls) -> list[RuntimeName]:
        """The runtimes that people deploy on, as far as they are installed."""
        return [one for one in (cls.torchscript, cls.onnxruntime, cls.openvino) if not one.missing]

    eager = "eager", "int8"
    eager_channels_last = "eager_channels_last"  # INT8 kernels choose their memory format themselves
    torchscript = "torchscript", "int8", "portable"
    inductor = "inductor", "int8", "symmetric"
    onnxruntime = "onnxruntime", "int8", "served"
    openvino = "openvino", "int8"
    simulated = "simulated", "int8", "simulates"


def missing(packages: Iterable[str]) -> list[str]:
    """Those of these packages that aren't installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


_PACKAGES = {
    "onnxruntime": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
}


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Optimizer(StrEnum):
    sgd = "sgd"
    adam = "adam"
    adamw = "adamw"


class Schedule(StrEnum):
    constant = "constant"
    cosine = "cosine"
    onecycle = "onecycle"


class LogModel(StrEnum):
    auto = "auto"
    none = "none"
    artifact = "artifact"
    flavor = "flavor"


@dataclass
class Weight:
    granularity: Granularity
    scheme: Scheme
    bits: int
    observer: WeightObserver


@dataclass
class Activation:
    scheme: Scheme
    bits: int


@dataclass
class QConfig:
    weight: Weight
    activation: Activation
    overflow: Overflow
    range_after_clamp: bool
    placement: Placement = Placement.every_op  # a default, so that configurations saved before can still be read

    @property
    def simulated(self) -> bool:
        """True for more bits than kernels hold: the model is simulated in float."""
        return max(self.weight.bits, self.activation.bits) > KERNEL_BITS


@dataclass
class Observer:
    """An activation observer and its parameters; those that `name` does not have are null."""

    name: ActivationObserver
    averaging_constant: float | None = None
    bins: int | None = None
    percentile: float | None = None


@dataclass
class Calib:
    batches: int | None
    batch_size: int
    sampling: Sampling
    seed: int


@dataclass
class Augment:
    flip: bool
    crop_padding: int


@dataclass
class Train:
    epochs: int
    batch_size: int
    optimizer: Optimizer
    lr: float
    momentum: float
    weight_decay: float
    schedule: Schedule
    label_smoothing: float
    augment: Augment
    seed: int
    device: Device


@dataclass
class Latency:
    enabled: bool
    processes: int
    threads: list[int]
    batch_sizes: list[int]
    seconds: float
    block_ms: float
    warmup_calls: int
    warmup_seconds: float
    min_blocks: int
    reuse: Any  # true, false or auto; a union of types can't be merged by OmegaConf


@dataclass
class Evaluate:
    """select_share: of the evaluation images, those that a report chooses the winner by, 0: none; it is then tested on
    the others."""

    batch_size: int
    select_share: float


@dataclass
class PerLayer:
    """The number of evaluation images for the errors in the table of layers; 0: no such errors."""

    images: int


@dataclass
class Saturation:
    """The number of evaluation images that are run with exact, and with emulated 16-bit accumulators."""

    exact_images: int
    emulated_images: int


class ReportObjective(StrEnum):
    """The best of the settings: the fastest or smallest within the margin, or the most accurate within max_ms."""

    fastest = "fastest"
    smallest = "smallest"
    accurate = "accurate"


@dataclass
class Report:
    """The question that a report answers; none of it changes a run.

    auto: a sweep makes its report when it ends; margin: the tolerated loss, None: the data set's; max_ms: the highest
    latency, of objective=accurate; runtime: the only one considered, None: all; batch_size, threads: of the timings,
    None: the first that the runs have; export: the folder that serves what is recommended is written too.
    """

    auto: bool
    objective: ReportObjective
    margin: float | None
    max_ms: float | None
    runtime: RuntimeName | None
    batch_size: int | None
    threads: int | None
    export: bool = False  # a default, so that configurations saved before this setting can still be read


@dataclass
class Compute:
    threads: int


@dataclass
class Job:
    """timeout: seconds after which a run ends as FAILED, None for no limit. at_a_time: the number of a sweep's jobs
    that run at the same time, with Hydra's own launcher."""

    timeout: float | None
    at_a_time: int


@dataclass
class Cache:
    """The cache that runs share. max_gb: its limit, in gigabytes (10^9 bytes); enabled: false computes everything and
    neither reads nor writes there; folder: None for `outputs`/cache."""

    max_gb: float
    enabled: bool = True  # defaults, so that configurations saved before these settings can still be read
    folder: str | None = None


@dataclass
class Connection:
    """timeout: seconds to wait for a server's first answer; patience: seconds for which one that has answered is waited
    for when it can't be reached."""

    uri: str | None
    experiment: str | None
    timeout: float
    patience: float = field(default=600.0, kw_only=True)  # a default, for configurations saved before this setting


@dataclass
class Tracking(Connection):
    """registered_model: the name in MLflow's model registry, None: the model isn't registered."""

    log_model: LogModel
    parent: str | None
    name: str | None
    registered_model: str | None = None  # a default, for configurations saved before this setting


@dataclass
class Config:
    model: dict[str, Any]
    dataset: dict[str, Any]
    train: Train
    qconfig: QConfig
    observer: Observer
    calib: Calib
    flow: FlowName
    engine: Engine
    fusion: bool
    target: Target
    if TYPE_CHECKING:
        runtimes: list[RuntimeName]
    else:
        runtimes: Any  # auto, too, until `conversion` has put names in its place; OmegaConf merges no unions
    latency: Latency
    evaluate: Evaluate
    saturation: Saturation
    per_layer: PerLayer
    compute: Compute
    job: Job
    cache: Cache
    tracking: Tracking
    seed: int
    sweep: str | None
    study: str | None
    resume: bool
    rerun: str | None
    objective: str
    report: Report
    outputs: str
    racing: bool = False  # a default, so that configurations saved before this setting can still be read


@dataclass
class ReportCommand:
    """The settings of `python -m qexp.report`: the runs that it is about, by at most one of sweep, study, filter and
    compare, and by what it recommends. compare: two ids of runs; name: of the report's folder."""

    sweep: str | None
    study: str | None
    filter: str | None
    compare: list[str] | None
    name: str | None
    report: Report
    tracking: Connection
    outputs: str


class ExportFormat(StrEnum):
    """The forms in which a model can ship, followed by the packages that its folder needs to serve it."""

    needs: tuple[str, ...]

    @property
    def float_too(self) -> bool:
        """True if the float model can ship so as well."""
        return self in (ExportFormat.onnx, ExportFormat.openvino, ExportFormat.torchscript, ExportFormat.aoti)

    def __new__(cls, name: str, *needs: str) -> ExportFormat:
        made = str.__new__(cls, name)
        made._value_ = name
        made.needs = needs
        return made

    onnx = "onnx", "onnxruntime"
    openvino = "openvino", "openvino"
    torchscript = "torchscript", "torch"
    pt2 = "pt2", "torch", "torchao"
    aoti = "aoti", "torch"
    tensorrt = "tensorrt", "onnxruntime"


def export_name(run_id: str, form: ExportFormat, precision: Precision) -> str:
    """The name of the folder, in `outputs`/exports, that a run's model is written to."""
    return f"{run_id}-{form}" + ("-fp32" if precision is Precision.fp32 else "")


@dataclass
class ExportCommand:
    """The settings of `python -m qexp.export`. precision: of the run's two models; batch_size: of formats that fix it;
    folder: to write, None: one in outputs."""

    run_id: str | None
    format: ExportFormat
    precision: Precision
    batch_size: int
    folder: str | None
    tracking: Connection
    outputs: str


def cache_folder(config: Config) -> Path | None:
    """The folder of the cache that all runs share; None where it is not used."""
    return Path(config.cache.folder or Path(config.outputs) / "cache") if config.cache.enabled else None
