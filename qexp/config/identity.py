"""Configurations as plain values: to be saved, as the params of a run, and as the identity of its result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from enum import StrEnum
from typing import Any

from qexp.config.schema import ActivationObserver, Config, Sampling
from qexp.system import credentials

NOT_APPLICABLE = "n/a"
# Observers whose range doesn't depend on the order of the images.
ORDERLESS = frozenset(ActivationObserver) - {ActivationObserver.moving_average, ActivationObserver.histogram}
GROUPS = ("model", "dataset", "train", "qconfig", "observer", "calib", "latency")
# The settings that tell runs apart most often, in the order of the tables.
FIELDS = (
    "qconfig.weight.granularity",
    "qconfig.weight.scheme",
    "qconfig.weight.bits",
    "qconfig.weight.observer",
    "qconfig.activation.scheme",
    "qconfig.activation.bits",
    "qconfig.overflow",
    "qconfig.range_after_clamp",
    "qconfig.placement",
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
    "runtimes",
    "seed",
)
# What is said of a run, and changes nothing in its result.
RECORDED_ONLY = (
    "tracking", "job", "cache", "sweep", "study", "resume", "racing", "rerun", "objective", "report", "outputs",
)  # fmt: skip
# What a run is called: made of masked settings, it may hold a mask.
LABELS = ("tracking.name", "study")


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
    names = sorted(config.flow.ignores)
    has = config.observer.name.parameters
    others = [name for observer in ActivationObserver for name in observer.parameters if name not in has]
    names += [f"observer.{name}" for name in others]
    if config.calib.sampling is Sampling.first:
        names.append("calib.seed")
    if config.calib.batches is None and config.observer.name in ORDERLESS:
        # What all images hold is the same in whatever order these come.
        names += ["calib.seed", "calib.sampling"]
    if config.model.get("checkpoint") or config.model.get("weights"):
        names.append("train")
    if config.qconfig.simulated:  # no kernels execute it, so none are guarded, timed or probed
        names += ["latency", "per_layer", "qconfig.overflow", "saturation"]
    return tuple(names)


def params(config: Config, choices: Mapping[str, str], overrides: Mapping[str, Any]) -> dict[str, str]:
    """A run's params, by the names that are typed: the groups' choices, then every setting that a result depends on.
    `n/a` where it has no effect.

    choices: Hydra's choice by group; overrides: the task's overrides by key. A group's choice is followed by `*`
    where fields of it were overridden.
    """
    result = {}
    for group in GROUPS:
        changed = any(key.lstrip("+~").startswith(f"{group}.") for key in overrides)
        result[group] = f"{choices.get(group, NOT_APPLICABLE)}{'*' if changed else ''}"
    settings = {name: value for name, value in flat(plain(config)).items() if not _covered(name, RECORDED_ONLY)}
    result |= {name: _text(settings[name]) for name in dict.fromkeys((*FIELDS, *settings))}
    idle = without_effect(config)
    return {name: NOT_APPLICABLE if _covered(name, idle) else value for name, value in result.items()}


def identity(config: Config) -> dict[str, Any]:
    """The settings that a run's result depends on: the effective ones, without those of where it is recorded. Equal for
    jobs that would compute the same."""
    idle = without_effect(config)
    values = flat(plain(config))
    return {name: value for name, value in values.items() if not _covered(name, (*idle, *RECORDED_ONLY))}


def is_recorded_only(name: str) -> bool:
    """True for a setting of where a run is recorded, which changes nothing in its result."""
    return _covered(name, RECORDED_ONLY)


def config_hash(config: Config) -> str:
    """The first 16 hex digits of the sha256 of `identity`."""
    text = json.dumps(identity(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def raced_for(config: Config) -> str:
    """The question that racing stops a run by, as text."""
    report = config.report
    margin = config.dataset["margin"] if report.margin is None else report.margin
    asked = {"margin": margin, "runtime": report.runtime, "batch_size": report.batch_size, "threads": report.threads}
    return " ".join(f"{name}={_text(value)}" for name, value in asked.items())


def _covered(name: str, prefixes: Collection[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def texts(tree: Mapping[str, Any]) -> dict[str, str]:
    """Nested plain values as one mapping of texts, as params have them."""
    return {name: _text(value) for name, value in flat(tree).items()}


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
