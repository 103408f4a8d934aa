"""What Hydra needs to know before it can compose a configuration: where conf/ is, the schema, the resolvers; and what
it composes, for one job or for many.

Importing it registers them, in whichever process a launcher runs a job.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from qexp.config import GROUPS, Config
from qexp.errors import ConfigError

_HERE = Path(__file__).resolve().parent
# Inside the package in a wheel, beside it in a checkout.
CONF = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf"


def by_engine(engine: str, choices: dict[str, Any], otherwise: Any) -> Any:
    """`choices` at `engine`, for settings whose default depends on it."""
    return choices.get(str(engine), otherwise)


OmegaConf.register_new_resolver("qexp.by_engine", by_engine, replace=True)
# Two runs that start in the same second must not share a folder.
OmegaConf.register_new_resolver("qexp.hex", lambda: secrets.token_hex(2), use_cache=True, replace=True)
ConfigStore.instance().store(name="schema", node=Config)


def check_choices(arguments: Sequence[str]) -> None:
    """Raise ConfigError where a group is given a number, a truth value or null, of which Hydra makes a traceback.

    arguments: of the command line.
    """
    for argument in arguments:
        group, _, given = argument.partition("=")
        if not given or group not in (*GROUPS, "experiment"):
            continue
        try:
            value = OverridesParser.create().parse_override(argument).value()
        except HydraException:
            continue  # which Hydra says in a sentence
        values = value.list if isinstance(value, ChoiceSweep) else [value]
        if any(isinstance(one, int | float | None | RangeSweep) for one in values):
            names = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
            raise ConfigError(
                f"{argument}: {group} is chosen by name, of {', '.join(names)}; a single one of its settings is given "
                f"as {group}.NAME=VALUE."
            )


@dataclass(frozen=True, eq=False)
class Composition:
    """What Hydra composed. task: the settings; hydra: its own node; overrides: those of the settings, as given."""

    task: DictConfig
    hydra: DictConfig
    overrides: tuple[str, ...]

    @staticmethod
    def of(composed: DictConfig) -> Composition:
        """The two parts of a configuration that has the node `hydra`."""
        task = copy.copy(composed)
        # Not OmegaConf.masked_copy: it forgets the types of the settings.
        with open_dict(task):
            del task["hydra"]
        # As they were typed: to iterate over them would put values in place of ${...}.
        given: Any = OmegaConf.to_container(composed.hydra.overrides.task)
        return Composition(task, composed.hydra, tuple(given))


class Composer:
    """Composes the jobs of a sweep.

    Hydra takes 0.2 s for each. Here, jobs that choose the same groups share one composition, and the values that they
    override are set in a copy of it, as Hydra does it: when all groups are in place, in the order in which they are
    given. loader: Hydra's.
    """

    def __init__(self, master: DictConfig, loader: Any) -> None:
        self._master, self._loader = master, loader
        self._parser = OverridesParser.create(config_loader=loader)
        self._shared: dict[tuple[str, ...], Composition] = {}

    def __call__(self, arguments: Sequence[str]) -> Composition:
        """What Hydra composes of these overrides, none of which lists several values. Raises Hydra's own errors."""
        overrides = self.parse(arguments)
        choices = tuple(str(override.input_line) for override in overrides if not self._sets_value(override))
        if choices not in self._shared:
            self._shared[choices] = Composition.of(self._loader.load_sweep_config(self._master, list(choices)))
        shared = self._shared[choices]
        task = copy.deepcopy(shared.task)
        ConfigLoaderImpl._apply_overrides_to_config([o for o in overrides if self._sets_value(o)], task)
        given = tuple(str(override.input_line) for override in overrides if not override.is_hydra_override())
        return Composition(task, shared.hydra, given)

    def parse(self, arguments: Sequence[str]) -> list[Override]:
        """Overrides, which may list several values. Raises Hydra's own errors."""
        parsed: list[Override] = self._parser.parse_overrides(list(arguments))
        return parsed

    def _sets_value(self, override: Override) -> bool:
        if override.is_hydra_override():
            return False
        return isinstance(override.value(), dict) or not self._loader.repository.group_exists(override.key_or_group)
