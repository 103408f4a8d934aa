"""A composed configuration as a job: typed, with its folder, its name, its params and its tags."""

from __future__ import annotations

import secrets
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from qexp.config import conversion, identity
from qexp.config.composition import Composition, known
from qexp.config.schema import Config
from qexp.system import credentials

SET_BY_SWEEP = ("tracking.name", "tracking.parent", "sweep")  # settings that a sweep gives to its jobs


@dataclass(frozen=True)
class Job:
    """A composed configuration, typed, with what Hydra knows of its composition.

    choices: of each config group; overrides: values as text, by the setting's name; number: in its sweep, from 0;
    alone: True for a job outside of a sweep; hydra_files: the folder where Hydra writes what it composed, None where it
    doesn't; foreign: True for a job of another sweeper than qexp's, whose jobs aren't known beforehand.
    """

    config: Config
    choices: dict[str, str]
    overrides: dict[str, str]
    folder: Path
    cwd: Path
    number: int = 0
    alone: bool = True
    hydra_files: Path | None = None
    foreign: bool = False

    @property
    def params(self) -> dict[str, str]:
        return identity.params(self.config, self.choices, self.overrides)

    @property
    def name(self) -> str:
        """`tracking.name`, or the settings that distinguish runs; with a number where another sweeper made the job."""
        p = self.params
        batches = "all" if self.config.calib.batches is None else p["calib.batches"]
        name = self.config.tracking.name or " ".join([p["model"], p["dataset"], p["qconfig"], p["observer"], batches])
        return f"{name} #{self.number + 1}" if self.foreign else name


def job_from(composed: Composition) -> Job:
    """The job that a composition describes. Raises ConfigError."""
    hydra = composed.hydra
    with known(hydra):
        config = conversion.from_hydra(composed.task, hydra.runtime.cwd)
    choices = {group: str(choice) for group, choice in hydra.runtime.choices.items() if "/" not in group}
    number = OmegaConf.select(hydra, "job.num", throw_on_missing=False) or 0
    overrides = _given(composed.overrides)
    alone = hydra.mode is not RunMode.MULTIRUN
    folder, cwd = Path(OmegaConf.select(hydra, "runtime.output_dir") or ""), Path(hydra.runtime.cwd)
    foreign = not alone and not is_ours(hydra)
    return Job(config, choices, overrides, folder, cwd, number, alone, hydra_files(folder, hydra), foreign)


def new_sweep() -> str:
    """A random identifier for a new sweep."""
    return secrets.token_hex(8)


def is_ours(hydra: DictConfig) -> bool:
    """True if Hydra's sweeper is qexp's."""
    return str(OmegaConf.select(hydra, "sweeper._target_")).startswith("hydra_plugins.qexp_sweeper.")


def hydra_files(folder: Path, hydra: DictConfig) -> Path:
    """The folder within a job's folder that has the composed configuration."""
    return folder / (hydra.output_subdir or ".hydra")


def _given(overrides: Sequence[str]) -> dict[str, str]:
    """The values that overrides set, as text, by the settings' names. None of the overrides lists several values."""
    given: dict[str, str] = {}
    for override in overrides:
        key, value = split(override)
        if value.lstrip().startswith("{"):
            tree: Any = OverridesParser.create().parse_override(override).value()
            given |= {name: str(item) for name, item in identity.flat({key: tree}).items()}
        else:
            given[key] = value
    return given


def split(override: str) -> tuple[str, str]:
    """The setting's name and the value of an override."""
    key, _, value = override.partition("=")
    return key.lstrip("+~"), value


def command() -> str:
    """The shell command that repeats this process, with its credentials masked."""
    return shlex.join(["python", "-m", "qexp", *credentials.masked_tree(sys.argv[1:])])


def tags(job: Job) -> dict[str, str]:
    """A run's tags that are known before it has computed anything."""
    given = {
        "study": job.config.study,
        "sweep_id": job.config.sweep,
        "experiment": job.choices.get("experiment"),
        "command": command(),
        "rerun_of": job.config.rerun,
    }
    return {name: value for name, value in given.items() if value not in (None, "None", "null")}
