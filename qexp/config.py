"""The schema of a configuration, and every check that needs nothing but the configuration.

Hydra ends here: `from_hydra` turns the composed DictConfig into these dataclasses, whose values are plain.
Neither torch nor mlflow is imported, so that a refusal answers in about a second.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Granularity(StrEnum):
    per_tensor = "per_tensor"
    per_channel = "per_channel"


class Scheme(StrEnum):
    symmetric = "symmetric"
    asymmetric = "asymmetric"


class Overflow(StrEnum):
    """Which grid is narrowed to 7 bits, so that sums of two products fit into 16 bits."""

    auto = "auto"
    none = "none"
    weights = "weights"
    activations = "activations"


class WeightObserver(StrEnum):
    minmax = "minmax"


class ActivationObserver(StrEnum):
    minmax = "minmax"
    moving_average = "moving_average"
    histogram = "histogram"


class Sampling(StrEnum):
    random = "random"
    stratified = "stratified"
    first = "first"


class Engine(StrEnum):
    x86 = "x86"
    fbgemm = "fbgemm"
    onednn = "onednn"
    qnnpack = "qnnpack"


class Flow(StrEnum):
    eager = "eager"
    fx = "fx"
    dynamic = "dynamic"


class Target(StrEnum):
    native = "native"
    avx2 = "avx2"
    vnni = "vnni"


class Runtime(StrEnum):
    eager = "eager"
    eager_channels_last = "eager_channels_last"
    torchscript = "torchscript"


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


@dataclass
class Observer:
    """An activation observer and its parameters; those that `name` does not have are null."""

    name: ActivationObserver
    averaging_constant: float | None = None
    bins: int | None = None


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
    runtimes: list[Runtime]
    threads: list[int]
    batch_sizes: list[int]
    seconds: float
    block_ms: float
    warmup_calls: int
    warmup_seconds: float
    min_blocks: int


@dataclass
class Evaluate:
    batch_size: int


@dataclass
class Compute:
    threads: int


@dataclass
class Tracking:
    uri: str | None
    experiment: str | None
    log_model: LogModel
    parent: str | None
    timeout: float


@dataclass
class Config:
    model: dict[str, Any]
    dataset: dict[str, Any]
    train: Train
    qconfig: QConfig
    observer: Observer
    calib: Calib
    flow: Flow
    engine: Engine
    fusion: bool
    target: Target
    latency: Latency
    evaluate: Evaluate
    compute: Compute
    tracking: Tracking
    seed: int
    study: str | None
    objective: str
    outputs: str
