"""The schema of a configuration, and every check that needs nothing but the configuration.

Hydra ends here: `from_hydra` turns the composed DictConfig into these dataclasses, whose values are plain.
Neither torch nor mlflow is imported, so that a refusal answers in about a second.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from qexp.data import preprocessing
from qexp.errors import ConfigError
from qexp.system import credentials


class Granularity(StrEnum):
    per_tensor = "per_tensor"
    per_channel = "per_channel"


class Scheme(StrEnum):
    symmetric = "symmetric"
    asymmetric = "asymmetric"


class Overflow(StrEnum):
    """Which grid is narrowed to 7 bits, so that sums of two products fit into 16 bits; layers: only where they would
    not, and on the side where it costs less."""

    auto = "auto"
    none = "none"
    weights = "weights"
    activations = "activations"
    layers = "layers"


class WeightObserver(StrEnum):
    minmax = "minmax"
    mse = "mse"


class ActivationObserver(StrEnum):
    minmax = "minmax"
    moving_average = "moving_average"
    histogram = "histogram"
    percentile = "percentile"
    mse = "mse"
    entropy = "entropy"


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
    inductor = "inductor"

    @property
    def takes_int8(self) -> bool:
        """INT8 kernels choose their own memory format, and torch.compile doesn't know torch.ao's modules."""
        return self in (Runtime.eager, Runtime.torchscript)


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
    runtimes: list[Runtime]
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
    batch_size: int


@dataclass
class PerLayer:
    """How many evaluation images the table of layers is measured on; 0: no such table."""

    images: int


@dataclass
class Saturation:
    """How many evaluation images tell what 16-bit sums do: with exact sums, and with emulated ones."""

    exact_images: int
    emulated_images: int


@dataclass
class Compute:
    threads: int


@dataclass
class Job:
    """timeout: seconds after which a run is ended as FAILED; None: however long it takes. ahead: whether a sweep's next
    job is prepared while one evaluates."""

    timeout: float | None
    ahead: bool = True  # what was saved before there was this setting can still be read


@dataclass
class Cache:
    """What a run may leave in `outputs`/cache for others, in gigabytes (10^9 bytes)."""

    max_gb: float


@dataclass
class Tracking:
    uri: str | None
    experiment: str | None
    log_model: LogModel
    timeout: float
    parent: str | None
    name: str | None


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
    saturation: Saturation
    per_layer: PerLayer
    compute: Compute
    job: Job
    cache: Cache
    tracking: Tracking
    seed: int
    study: str | None
    resume: bool
    rerun: str | None
    objective: str
    outputs: str


NOT_APPLICABLE = "n/a"

# Which observer has which parameter; the rest of its fields are null.
OBSERVER_PARAMETERS: dict[ActivationObserver, tuple[str, ...]] = {
    ActivationObserver.minmax: (),
    ActivationObserver.moving_average: ("averaging_constant",),
    ActivationObserver.histogram: ("bins",),
    ActivationObserver.percentile: ("percentile",),
    ActivationObserver.mse: (),
    ActivationObserver.entropy: ("bins",),
}

# Which observers find the same range in whatever order the images come.
ORDERLESS = frozenset(ActivationObserver) - {ActivationObserver.moving_average, ActivationObserver.histogram}

# What a number that may be null must be.
NULLS = {
    "calib.batches": "a positive number, or null for all of the training images",
    "job.timeout": "a positive number of seconds, or null for no limit",
}

OBJECTIVES = ("accuracy/int8", "accuracy/delta", "latency/int8_ms", "latency/speedup", "size/int8_mb")

GROUPS = ("model", "dataset", "train", "qconfig", "observer", "calib", "latency")

# The params of a run beside its groups' choices, in the order of the tables.
FIELDS = (
    "qconfig.weight.granularity",
    "qconfig.weight.scheme",
    "qconfig.weight.bits",
    "qconfig.weight.observer",
    "qconfig.activation.scheme",
    "qconfig.activation.bits",
    "qconfig.overflow",
    "qconfig.range_after_clamp",
    "observer.averaging_constant",
    "observer.bins",
    "observer.percentile",
    "calib.batches",
    "calib.batch_size",
    "calib.sampling",
    "calib.seed",
    "flow",
    "engine",
    "fusion",
    "target",
    "seed",
)

# What is said of a run, and changes nothing in its result.
RECORDED_ONLY = ("tracking", "job", "cache", "study", "resume", "rerun", "objective", "outputs")

# What a run is called: made of masked settings, it may hold a mask.
LABELS = ("tracking.name", "study")

# What has no effect in a flow. torch's dynamic quantization computes activation ranges as it runs, and reduces them
# to 7 bits by itself where kernels could saturate.
NO_EFFECT: dict[Flow, tuple[str, ...]] = {
    Flow.eager: (),
    Flow.fx: ("fusion",),
    Flow.dynamic: (
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
    ),
}


def from_hydra(composed: Any, cwd: str) -> Config:
    """The composed DictConfig as typed, plain values; relative paths are taken against `cwd`, where the user typed.

    Raises ConfigError where a value that has no default is missing.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from qexp.config.refusals import unresolved

    try:
        missing = sorted(str(key) for key in OmegaConf.missing_keys(composed))
        missing += [one.name for one in fields(Config) if one.name not in composed]
        if missing:
            raise ConfigError(f"{missing[0]} has no value: give one, as in {missing[0]}=...")
        config: Config = OmegaConf.to_object(composed)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError(unresolved(error)) from error
    for name, allowed in _unknown(config):
        raise ConfigError(f"{name} is no setting; there are {', '.join(allowed)}.")
    config.outputs = absolute(config.outputs, cwd)
    for group, key in ((config.model, "checkpoint"), (config.dataset, "root")):
        if isinstance(group.get(key), str):
            group[key] = absolute(group[key], cwd)
    credentials.learn(config)
    return config


def _unknown(settings: Any, parent: str = "") -> Iterator[tuple[str, list[str]]]:
    """What was added to these settings with + and is none of them, each with those that stand beside it."""
    known = [one.name for one in fields(settings)]
    for name, value in vars(settings).items():
        if name not in known:
            yield f"{parent}{name}", [f"{parent}{other}" for other in known]
        elif is_dataclass(value):
            yield from _unknown(value, f"{parent}{name}.")


def from_plain(values: Mapping[str, Any]) -> Config:
    """The configuration that `exact` gave, back from its nested plain values."""
    from omegaconf import OmegaConf

    config: Config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), dict(values)))  # type: ignore[assignment]
    return config


def absolute(path: str, cwd: str) -> str:
    """`path` with `~` expanded, against `cwd` where it is relative."""
    return str(Path(cwd, Path(path).expanduser()).absolute())


def check(config: Config, swept: Collection[str] = ()) -> None:
    """Raise ConfigError for what can't work whatever the inputs are.

    swept: the settings that vary in the sweep that this is a job of; where `observer` does, a parameter that only
    some of the observers have is ignored by the others instead of refused.
    """
    _check_ranges(config)
    _check_qconfig(config)
    if "observer" not in swept:
        _check_observer(config.observer)
    _check_entropy(config)
    _check_credentials(config)
    _check_mappings(config)
    preprocessing.check(config.dataset)


def _check_ranges(config: Config) -> None:
    calib, train, latency = config.calib, config.train, config.latency
    positive = {
        "calib.batches": calib.batches,
        "calib.batch_size": calib.batch_size,
        "train.epochs": train.epochs,
        "train.batch_size": train.batch_size,
        "train.lr": train.lr,
        "evaluate.batch_size": config.evaluate.batch_size,
        "compute.threads": config.compute.threads,
        "saturation.emulated_images": config.saturation.emulated_images,
        "job.timeout": config.job.timeout,
        "tracking.timeout": config.tracking.timeout,
        "cache.max_gb": config.cache.max_gb,
        "observer.bins": config.observer.bins,
        "latency.seconds": latency.seconds,
        "latency.block_ms": latency.block_ms,
        "latency.min_blocks": latency.min_blocks,
    }
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise ConfigError(f"{name}={value}: must be {NULLS.get(name, 'positive')}.")
    counts = {"saturation.exact_images": config.saturation.exact_images, "per_layer.images": config.per_layer.images}
    for name, count in counts.items():
        if count < 0:
            raise ConfigError(f"{name}={count}: must be 0 or more.")
    if config.observer.averaging_constant is not None and not 0 < config.observer.averaging_constant <= 1:
        raise ConfigError(f"observer.averaging_constant={config.observer.averaging_constant}: must be in (0, 1].")
    if config.observer.percentile is not None and not 50 < config.observer.percentile <= 100:
        raise ConfigError(f"observer.percentile={config.observer.percentile}: must be over 50 and at most 100.")
    for name, values in (("latency.threads", latency.threads), ("latency.batch_sizes", latency.batch_sizes)):
        if not values or any(value < 1 for value in values):
            raise ConfigError(f"{name}={values}: must be a list of positive numbers, such as [1] or [1,2].")
    for name, least in (("warmup_calls", latency.warmup_calls), ("warmup_seconds", latency.warmup_seconds)):
        if not least >= 0:
            raise ConfigError(f"latency.{name}={least}: must not be negative.")
    if config.tracking.log_model is LogModel.flavor and Runtime.torchscript not in latency.runtimes:
        raise ConfigError(
            "tracking.log_model=flavor logs the TorchScript model, which is not among latency.runtimes="
            f"{[str(runtime) for runtime in latency.runtimes]}; add torchscript, or use tracking.log_model=artifact."
        )
    if latency.processes < 0:
        raise ConfigError(f"latency.processes={latency.processes}: must be 0 (in the running process) or more.")
    if latency.reuse not in (True, False, "auto"):
        raise ConfigError(f"latency.reuse={latency.reuse}: must be auto (true in a sweep), true or false.")
    _check_runtimes(latency)
    for name, seed in (("seed", config.seed), ("calib.seed", calib.seed), ("train.seed", train.seed)):
        if not 0 <= seed < 2**32:
            raise ConfigError(f"{name}={seed}: must be in 0..{2**32 - 1}.")


def _check_runtimes(latency: Latency) -> None:
    listed = [str(runtime) for runtime in latency.runtimes]
    if not latency.runtimes or len(set(latency.runtimes)) < len(latency.runtimes):
        raise ConfigError(f"latency.runtimes={listed}: must be one or more of {', '.join(Runtime)}, each once.")
    if not any(runtime.takes_int8 for runtime in latency.runtimes):
        raise ConfigError(f"latency.runtimes={listed}: INT8 runs in none of these; add eager or torchscript.")
    if Runtime.inductor in latency.runtimes and latency.enabled and latency.processes == 0:
        raise ConfigError(
            f"latency.runtimes={listed}: inductor compiles in processes of its own, and latency.processes=0 asks for "
            "none; use latency=standard or latency=publish, or set latency.processes=2."
        )


def _check_qconfig(config: Config) -> None:
    qconfig, engine = config.qconfig, config.engine
    for name, bits in (("weight", qconfig.weight.bits), ("activation", qconfig.activation.bits)):
        if not 2 <= bits <= 8:
            raise ConfigError(f"qconfig.{name}.bits={bits}: must be in 2..8; INT8 kernels hold no more than 8 bits.")
    if engine is Engine.onednn and qconfig.weight.scheme is Scheme.asymmetric:
        raise ConfigError(
            "engine=onednn takes symmetric weights only, got qconfig.weight.scheme=asymmetric; "
            "use engine=x86, fbgemm or qnnpack, or qconfig.weight.scheme=symmetric."
        )


def _check_observer(observer: Observer) -> None:
    has = OBSERVER_PARAMETERS[observer.name]
    for parameter in sorted({name for names in OBSERVER_PARAMETERS.values() for name in names}):
        value = getattr(observer, parameter)
        if value is not None and parameter not in has:
            owners = [f"observer={name}" for name, names in OBSERVER_PARAMETERS.items() if parameter in names]
            raise ConfigError(
                f"observer.{parameter}={value}: observer={observer.name} has no such parameter, "
                f"{' and '.join(owners)} {'does' if len(owners) == 1 else 'do'}."
            )
        if value is None and parameter in has:
            raise ConfigError(f"observer.{parameter}=null: observer={observer.name} needs a value.")


def _check_entropy(config: Config) -> None:
    levels = 2**config.qconfig.activation.bits
    bins = config.observer.bins
    if config.observer.name is ActivationObserver.entropy and bins is not None and bins < levels:
        raise ConfigError(
            f"observer.bins={bins}: observer=entropy needs at least as many bins as the grid has steps, {levels} with "
            f"qconfig.activation.bits={config.qconfig.activation.bits}; 2048 leave it a choice."
        )


def _check_credentials(config: Config) -> None:
    for name, value in flat(exact(config)).items():
        if isinstance(value, str) and credentials.MASK in value and name not in LABELS:
            raise ConfigError(
                f"{name}={value}: {credentials.MASK} stands for a credential, which qexp writes down nowhere; give it "
                "in full."
            )


def _check_mappings(config: Config) -> None:
    for name, mapping in (("model", config.model), ("dataset", config.dataset)):
        if not isinstance(mapping.get("_target_"), str) or not mapping["_target_"]:
            raise ConfigError(f"{name}._target_={mapping.get('_target_')}: must be the dotted name of a callable.")
    if config.model.get("checkpoint") and config.model.get("weights"):
        given = f"model.checkpoint={config.model['checkpoint']} and model.weights={config.model['weights']}"
        raise ConfigError(f"{given}: give one of them.")
    margin = config.dataset.get("margin")
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 < margin < 1:
        raise ConfigError(f"dataset.margin={margin}: must be an accuracy loss in (0, 1), such as 0.005.")
    if config.objective not in OBJECTIVES:
        raise ConfigError(f"objective={config.objective}: must be one of {', '.join(OBJECTIVES)}.")


def plain(config: Config) -> dict[str, Any]:
    """The configuration as nested plain values, enums by their names, without credentials: as it is written down."""
    written: dict[str, Any] = credentials.masked_tree(exact(config))
    return written


def exact(config: Config) -> dict[str, Any]:
    """The configuration as nested plain values, enums by their names, credentials included."""

    def convert(value: Any) -> Any:
        if isinstance(value, StrEnum):
            return str(value)
        if isinstance(value, dict):
            return {key: convert(item) for key, item in value.items()}
        return [convert(item) for item in value] if isinstance(value, list | tuple) else value

    return convert(asdict(config))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        result |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return result


def without_effect(config: Config) -> tuple[str, ...]:
    """The settings that change nothing for the choices made, as names or prefixes of names."""
    names = list(NO_EFFECT[config.flow])
    has = OBSERVER_PARAMETERS[config.observer.name]
    names += [f"observer.{name}" for names_ in OBSERVER_PARAMETERS.values() for name in names_ if name not in has]
    if config.calib.sampling is Sampling.first:
        names.append("calib.seed")
    if config.calib.batches is None and config.observer.name in ORDERLESS:
        # What all images hold is the same in whatever order these come.
        names += ["calib.seed", "calib.sampling"]
    if config.model.get("checkpoint") or config.model.get("weights"):
        names.append("train")
    return tuple(names)


def params(config: Config, choices: Mapping[str, str], overrides: Mapping[str, Any]) -> dict[str, str]:
    """What was asked, by the names that are typed; `n/a` where it has no effect.

    choices: Hydra's choice by group; overrides: the task's overrides by key. A group's choice is followed by `*`
    where fields of it were overridden.
    """
    values = flat(plain(config))
    result = {}
    for group in GROUPS:
        changed = any(key.lstrip("+~").startswith(f"{group}.") for key in overrides)
        result[group] = f"{choices.get(group, NOT_APPLICABLE)}{'*' if changed else ''}"
    typed = sorted(key.lstrip("+~") for key in overrides)
    names = [*FIELDS, *(name for name in typed if name in values and not _covered(name, RECORDED_ONLY))]
    result |= {name: _text(values[name]) for name in names}
    idle = without_effect(config)
    return {name: NOT_APPLICABLE if _covered(name, idle) else value for name, value in result.items()}


def identity(config: Config) -> dict[str, Any]:
    """What a run's result depends on: the effective settings, without where it is recorded. The same for jobs
    that would compute the same."""
    idle = without_effect(config)
    values = flat(plain(config))
    return {name: value for name, value in values.items() if not _covered(name, (*idle, *RECORDED_ONLY))}


def config_hash(config: Config) -> str:
    """The first 16 hex digits of the sha256 of `identity`."""
    text = json.dumps(identity(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _covered(name: str, prefixes: Collection[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
