"""The jobs of a sweep, composed, checked and named before the first starts."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig
from tqdm import tqdm

from qexp.config import identity, validation
from qexp.config.composition import Composer, combinations, quoted, spelled
from qexp.config.schema import FlowName
from qexp.errors import ConfigError
from qexp.launch import rerun
from qexp.launch.callback import refuse_credentials
from qexp.launch.job import SET_BY_SWEEP, Job, job_from, split
from qexp.system import credentials

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Planned:
    """A job of a sweep before it is launched: the overrides that compose it, the composed job, and its name."""

    overrides: list[str]
    job: Job
    name: str


def exclude_from_dirname(master: DictConfig) -> None:
    """Exclude the settings that a sweep gives to its jobs from Hydra's `override_dirname`, beside the user's own
    exclusions, since nobody typed them."""
    excluded = list(master.hydra.job.config.override_dirname.exclude_keys)
    if not set(SET_BY_SWEEP) <= set(excluded):
        keys = spelled([*excluded, *SET_BY_SWEEP])
        master.hydra.overrides.hydra.append(f"hydra.job.config.override_dirname.exclude_keys={keys}")


def may_be_pt2e(master: DictConfig, overrides: Sequence[str]) -> bool:
    """True where jobs of a sweep may be of flow=pt2e, by its overrides as they were typed: none is composed yet."""
    swept = [one for one in overrides if one.startswith("flow=")]
    return any(flow in one for one in swept or [master.flow] for flow in FlowName if flow.packages)


def sweep_overrides(composer: Composer, params: Sequence[str], typed: Sequence[str]) -> list[Override]:
    """A sweep's overrides: its own (`params`) and those of the command line, which replace its own of the same setting.

    Raises ConfigError where several experiments are swept over.
    """
    given = composer.parse(typed)
    own = [one for one in composer.parse(params) if not any(composer.replaces(other, one) for other in given)]
    for override in (*own, *given):
        if override.is_sweep_override() and override.key_or_group == "experiment":
            raise ConfigError(
                f"{override.input_line}: an experiment is a sweep by itself, and several can't be swept over; "
                "start them one after the other."
            )
    return [*own, *given]


def checked(composer: Composer, combination: Sequence[str], swept: Collection[str]) -> Job:
    """The job that these overrides describe. swept: the settings that the sweep varies. Raises ConfigError."""
    composed = composer(combination)
    job = job_from(composed)
    validation.check(job.config, swept)
    rerun.check(job)
    if credentials.masked_tree(list(combination)) != list(combination):
        refuse_credentials(composer.subfolder(combination, 0), "hydra.sweep.subdir")
    return job


def plan(composer: Composer, params: Sequence[str], typed: Sequence[str]) -> list[Planned]:
    """Every distinct job, composed and checked.

    params: the sweep's own overrides; typed: those of the command line, which replace the sweep's own of the same
    setting. Raises ConfigError for the whole sweep where one job can't run.
    """
    overrides = sweep_overrides(composer, params, typed)
    swept = [override.key_or_group for override in overrides if override.is_sweep_override()]
    places = [
        place
        for place, override in enumerate(overrides)
        if override.is_sweep_override() and not any(composer.replaces(o, override) for o in overrides[place + 1 :])
    ]
    found: dict[str, tuple[list[str], Job]] = {}
    refused: dict[str, str] = {}
    all_combinations = combinations(overrides)
    for combination in tqdm(all_combinations, desc="checking jobs", disable=None, leave=False):
        try:
            job = checked(composer, combination, swept)
        except ConfigError as error:
            refused.setdefault(str(error), " ".join(combination))
            continue
        found.setdefault(identity.config_hash(job.config), (combination, job))
    if refused:
        reasons = "\n".join(f"{reason} ({which})" for reason, which in refused.items())
        raise ConfigError(reasons if len(all_combinations) == 1 else f"{reasons}\nNo job of this sweep was started.")
    if len(found) < len(all_combinations):
        same = len(all_combinations) - len(found)
        log.warning(
            "%d of %d jobs would compute the same as another and are not run twice.", same, len(all_combinations)
        )
    masked = [credentials.masked_tree(combination) for combination, _ in found.values()]
    distinguishing = [[combination[place] for place in places] or of_result(combination) for combination in masked]
    return [
        Planned([*combination, f"tracking.name={quoted(name)}"], job, name)
        for (combination, job), name in zip(found.values(), names(distinguishing), strict=True)
    ]


def of_result(overrides: Sequence[str]) -> list[str]:
    """The overrides that a result depends on, which name the only job of a sweep; all where there is none."""
    return [override for override in overrides if not identity.is_recorded_only(split(override)[0])] or [*overrides]


def names(distinguishing: Sequence[Sequence[str]]) -> list[str]:
    """A unique name for each job of a sweep. distinguishing: for each, the overrides in which it differs."""
    short_names = [plain(" ".join(map(short, overrides))) for overrides in distinguishing]
    counts = Counter(short_names)
    return [
        name if counts[name] == 1 else plain(" ".join(overrides))
        for name, overrides in zip(short_names, distinguishing, strict=True)
    ]


def plain(text: str) -> str:
    """`text` without characters that OmegaConf reads as an interpolation or an escape."""
    return text.replace("\\", "/").replace("$", "")


def short(override: str) -> str:
    """An override as part of a run's name: its value (a path's last part); `fusion=true` for a boolean or number."""
    key, value = split(override)
    value = value.strip("'\"")
    if value.lower() in ("true", "false", "null") or value.replace(".", "", 1).isdigit():
        return f"{key.rpartition('.')[2]}={value}"
    return value.rstrip("/").rpartition("/")[2]
