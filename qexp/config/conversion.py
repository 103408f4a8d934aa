"""Conversion of Hydra's DictConfig, or of a saved configuration, to a typed Config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from qexp.config import identity
from qexp.config.schema import Config, ExportCommand, ReportCommand, RuntimeName
from qexp.errors import ConfigError
from qexp.system import credentials


def from_hydra(composed: Any, cwd: str) -> Config:
    """The composed DictConfig as typed, plain values; relative paths are taken against `cwd`, where the user typed.

    Raises ConfigError where a value that has no default is missing.
    """
    config: Config = _typed(composed, Config)
    config.runtimes = runtimes(config.runtimes, config.qconfig.simulated)
    config.latency.enabled = config.latency.enabled and not config.qconfig.simulated
    config.outputs = absolute(config.outputs, cwd)
    if config.cache.folder is not None:
        config.cache.folder = absolute(config.cache.folder, cwd)
    for group, key in ((config.model, "checkpoint"), (config.dataset, "root")):
        if isinstance(group.get(key), str):
            group[key] = absolute(group[key], cwd)
    credentials.learn(config)
    return config


def report_from_hydra(composed: Any, cwd: str) -> ReportCommand:
    """As `from_hydra`, for the settings of `python -m qexp.report`."""
    command: ReportCommand = _typed(composed, ReportCommand)
    command.outputs = absolute(command.outputs, cwd)
    credentials.learn(command)
    return command


def export_from_hydra(composed: Any, cwd: str) -> ExportCommand:
    """As `from_hydra`, for the settings of `python -m qexp.export`."""
    command: ExportCommand = _typed(composed, ExportCommand)
    command.outputs = absolute(command.outputs, cwd)
    command.folder = None if command.folder is None else absolute(command.folder, cwd)
    credentials.learn(command)
    return command


def _typed(composed: Any, schema: type[Any]) -> Any:
    """The composed DictConfig as an object of a dataclass of the schema."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from qexp.config.error_messages import renamed_setting, unresolved

    try:
        missing = sorted(str(key) for key in OmegaConf.missing_keys(composed))
        missing += [one.name for one in fields(schema) if one.name not in composed]
        if missing:
            raise ConfigError(f"{missing[0]} has no value: give one, as in {missing[0]}=...")
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(unresolved(error)) from error
    for name, allowed in _unknown(config):
        raise ConfigError(renamed_setting(name) or f"{name} is no setting; there are {', '.join(allowed)}.")
    return config


def _unknown(settings: Any, parent: str = "") -> Iterator[tuple[str, list[str]]]:
    """Settings added with + that don't exist, each with the names of those that do."""
    known = [one.name for one in fields(settings)]
    for name, value in vars(settings).items():
        if name not in known:
            yield f"{parent}{name}", [f"{parent}{other}" for other in known]
        elif is_dataclass(value):
            yield from _unknown(value, f"{parent}{name}.")


def from_plain(values: Mapping[str, Any]) -> Config:
    """The configuration of nested plain values, as `identity.exact` returns them.

    Raises ConfigError where an older version wrote them, and a setting has another name now.
    """
    from omegaconf import OmegaConf

    from qexp.config.error_messages import renamed_setting

    for said in map(renamed_setting, identity.flat(values)):
        if said:
            raise ConfigError(said)
    config: Config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), dict(values)))  # type: ignore[assignment]
    config.runtimes = runtimes(config.runtimes, config.qconfig.simulated)
    return config


def runtimes(asked: Any, simulated: bool = False) -> list[RuntimeName]:
    """The runtimes of the setting `runtimes`: auto, or a list of names. Raises ConfigError for anything else.

    simulated: as in `QConfig`.
    """
    if asked == "auto":
        return [one for one in RuntimeName if one.simulates] if simulated else RuntimeName.auto()
    names = asked if isinstance(asked, list) else [asked]
    if not isinstance(asked, list) or not set(map(str, names)) <= set(RuntimeName):
        shown = f"[{','.join(map(str, names))}]" if isinstance(asked, list) else asked
        raise ConfigError(
            f"runtimes={shown}: must be auto, or a list of {', '.join(RuntimeName)}, as in [torchscript]."
        )
    return [RuntimeName(str(name)) for name in names]


def absolute(path: str, cwd: str) -> str:
    """`path` with `~` expanded, against `cwd` where it is relative."""
    return str(Path(cwd, Path(path).expanduser()).absolute())
