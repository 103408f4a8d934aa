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

GIVEN = ("tracking.name", "tracking.parent", "sweep")  # to its jobs, by a sweep


@dataclass(frozen=True)
class Job:
    """A composed configuration, typed and checked, with what Hydra knows of how it came about.

    number: among a sweep's jobs, from 0; alone: whether it is none of a sweep's; hydra_files: the folder in which Hydra
    writes down what it composed, None where it doesn't; foreign: whether the sweep is another sweeper's than qexp's,
    which doesn't tell its jobs beforehand.
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
        """What was given, else the settings that tell one run from another; where it is one of several that nobody has
        compared, with its number."""
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
    """An identity for a sweep that begins."""
    return secrets.token_hex(8)


def is_ours(hydra: DictConfig) -> bool:
    """Whether Hydra's sweeper is qexp's."""
    return str(OmegaConf.select(hydra, "sweeper._target_")).startswith("hydra_plugins.qexp_sweeper.")


def hydra_files(folder: Path, hydra: DictConfig) -> Path:
    """Where in a job's folder it is written down what Hydra composed."""
    return folder / (hydra.output_subdir or ".hydra")


def _given(overrides: Sequence[str]) -> dict[str, str]:
    """What overrides set, by the names of the settings, as text; none of them lists several values."""
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
    key, _, value = override.partition("=")
    return key.lstrip("+~"), value


def command() -> str:
    """The shell line that repeats this, but for credentials."""
    return shlex.join(["python", "-m", "qexp", *credentials.masked_tree(sys.argv[1:])])


def tags(job: Job) -> dict[str, str]:
    """What a run is known by before it has computed anything."""
    given = {
        "study": job.config.study,
        "experiment": job.choices.get("experiment"),
        "command": command(),
        "rerun_of": job.config.rerun,
    }
    return {name: value for name, value in given.items() if value not in (None, "None", "null")}
