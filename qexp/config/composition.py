"""Composition of configurations by Hydra, for one job or for many.

Importing this module registers conf/, the schema and the resolvers, in whichever process a launcher runs a job.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import re
import secrets
import shlex
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

import qexp
from qexp.config import identity
from qexp.config.conversion import runtimes
from qexp.config.identity import GROUPS
from qexp.config.schema import Config, ExportCommand, ReportCommand
from qexp.errors import ConfigError
from qexp.system import credentials

_HERE = Path(qexp.__file__).resolve().parent
# Inside the package in a wheel, beside it in a checkout.
CONF = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf"


def by_engine(engine: str, choices: dict[str, Any], otherwise: Any) -> Any:
    """`choices` at `engine`, for settings whose default depends on it."""
    return choices.get(str(engine), otherwise)


# conf/hydra/launcher has configurations by the names that launchers give their own, which check them: that is meant.
warnings.filterwarnings("ignore", r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")
OmegaConf.register_new_resolver("qexp.by_engine", by_engine, replace=True)
# Two runs that start in the same second must not share a folder.
OmegaConf.register_new_resolver("qexp.hex", lambda: secrets.token_hex(2), use_cache=True, replace=True)
ConfigStore.instance().store(name="schema", node=Config)
ConfigStore.instance().store(name="report_schema", node=ReportCommand)
ConfigStore.instance().store(name="export_schema", node=ExportCommand)


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


_MEANT_AS_GRAMMAR = re.compile(
    r"\s*([\[{'\"]|(bool|choice|extend_list|float|glob|int|interval|json_str|range|shuffle|sort|str|tag)\()"
)


def check_quotes(arguments: Sequence[str]) -> None:
    """Raise ConfigError where a value has signs that Hydra takes for its own, with the value in quotes.

    arguments: of the command line. Lists, mappings and functions of Hydra's grammar are left to Hydra.
    """
    sweeps = not {"-m", "--multirun"}.isdisjoint(arguments)
    for argument in arguments:
        key, _, value = argument.partition("=")
        if not value or argument.startswith("-") or _MEANT_AS_GRAMMAR.match(value):
            continue
        reason, parts = _misread(value), value.split(",") if sweeps else [value]
        in_quotes = {part: QuotedString(part, Quote.double).with_quotes() for part in parts if _misread(part)}
        if not reason or any(map(_misread, in_quotes.values())):
            continue
        shown = shlex.quote(f"{key}={','.join(in_quotes.get(part, part) for part in parts)}")
        raise ConfigError(
            f"{without_password(argument)}: Hydra takes a sign in it for its own ({reason}); put the value into "
            f"quotes, and those into the shell's: {without_password(shown)}"
        )


def _misread(value: str) -> str:
    """The reason why Hydra's grammar doesn't accept an override's value; empty where it does."""
    try:
        OverridesParser.create().parse_override(f"key={value}")
    except HydraException as error:
        return str(error).splitlines()[0]
    return ""


def without_password(text: str) -> str:
    """The text without the credentials in its URLs."""
    return re.sub(r"//[^/@\s]*@", "//***@", text)


@dataclass(frozen=True, eq=False)
class Composition:
    """A configuration composed by Hydra. task: the settings; hydra: its own node; overrides: of settings, as given."""

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


@contextlib.contextmanager
def known(hydra: DictConfig) -> Iterator[None]:
    """Hydra's node as what `${hydra:…}` is looked up in, also before Hydra itself makes it so."""
    instance: Any = HydraConfig.instance()
    before, instance.cfg = instance.cfg, SimpleNamespace(hydra=hydra)
    try:
        yield
    finally:
        instance.cfg = before


def combinations(overrides: Sequence[Override]) -> list[list[str]]:
    """Every combination of the values that overrides list, the last one's going round fastest: each time all of the
    overrides in the order in which they were given, with one value each.

    None is left out where a later one has the same key: Hydra applies them one after the other, and some add to what
    there is. Raises ConfigError where one lists nothing, or values that can't be listed.
    """
    return [list(one) for one in itertools.product(*map(each, overrides))]


def each(override: Override) -> list[str]:
    """An override of one value for each that this one lists. Raises ConfigError where they can't be listed."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    key = override.get_key_element()
    if not override.is_discrete_sweep():
        raise ConfigError(
            f"{override.input_line}: an interval can't be gone through value by value; list some, as in "
            f"{key}=choice(…) or {key}=range(…), or search it with hydra/sweeper=qexp_optuna."
        )
    try:
        values = list(override.sweep_iterator())
    except (HydraException, ValueError, ArithmeticError) as error:
        raise ConfigError(f"{override.input_line} can't be gone through: {error}.") from error
    if not values:
        raise ConfigError(f"{override.input_line} lists no value; give one or more, as in {key}=VALUE,VALUE.")
    return [f"{key}={value if _is_read_as(value, value) else spelled(value)}" for value in values]


def spelled(value: Any) -> str:
    """A value as it is written in an override, from which Hydra reads the same value again."""
    if isinstance(value, list):
        return f"[{','.join(map(spelled, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{spelled(key)}:{spelled(item)}' for key, item in value.items())}}}"
    text = Override._get_value_element_as_str(value)
    # Hydra escapes, which is not enough for a text such as null, 1 or it's.
    return quoted(value) if isinstance(value, str) and not _is_read_as(text, value) else text


def quoted(text: str) -> str:
    """A text in quotes as Hydra reads them, for the value of an override."""
    return QuotedString(text, Quote.single).with_quotes()


def _is_read_as(text: Any, value: Any) -> bool:
    """True if Hydra reads this text, as the whole value of an override, as this one."""
    if not isinstance(text, str):
        return False
    try:
        read = OverridesParser.create().parse_override(f"key={text}")
    except HydraException:
        return False
    return not read.is_sweep_override() and isinstance(read._value, str) and read._value == value


def as_yaml(composed: Any) -> str:
    """Return a composed configuration as YAML, interpolations as they are and without credentials."""
    plain = OmegaConf.to_container(OmegaConf.create(composed), enum_to_str=True)
    return str(OmegaConf.to_yaml(OmegaConf.create(credentials.masked_tree(plain))))


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
        """Compose these overrides, none of which lists several values. Raises Hydra's own errors."""
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

    def replaces(self, later: Override, earlier: Override) -> bool:
        """True if `later` overrides everything that `earlier` sets or chooses."""
        same = later.get_key_element() == earlier.get_key_element()
        return same and not any(isinstance(value, dict) for one in (later, earlier) for value in _values(one))

    def subfolder(self, arguments: Sequence[str], number: int) -> str:
        """Hydra's folder, within the sweep's, for the job with these overrides. number: the job's."""
        template: Any = OmegaConf.to_container(self._master.hydra.sweep, resolve=False)
        if template["subdir"] == "${hydra.job.num}":  # Hydra's own, and nothing has to be composed
            return str(number)
        composed = self(arguments)
        whole = composed.task
        with open_dict(whole):
            whole.hydra = copy.deepcopy(composed.hydra)
        with open_dict(whole.hydra):
            job = whole.hydra.job
            job.id = job.num = number
            overrides = [override for override in self.parse(arguments) if not override.is_hydra_override()]
            job.override_dirname = get_overrides_dirname(overrides, **job.config.override_dirname)
        with known(whole.hydra):
            return str(OmegaConf.select(whole, "hydra.sweep.subdir"))

    @cached_property
    def _repository(self) -> Any:
        """Hydra's repository of groups, in conf/ and in folders that hydra.searchpath adds."""
        hydra = self._master.hydra
        of_hydra = OmegaConf.to_container(hydra.overrides.hydra)
        return self._loader._parse_overrides_and_create_caching_repo(hydra.job.config_name, of_hydra)[1]

    def _sets_value(self, override: Override) -> bool:
        if override.is_hydra_override() or override.key_or_group == "hydra":
            return False
        return isinstance(override.value(), dict) or not self._repository.group_exists(override.key_or_group)


def _values(override: Override) -> list[Any]:
    value = override.value()
    return value.list if isinstance(value, ChoiceSweep) else [value]


@cache
def defaults() -> dict[str, str]:
    """The params of a run without overrides, as far as conf/ writes them down as plain values: the groups' choices, the
    fields of these, and the other settings."""
    whole = _plain(CONF / "config.yaml")
    choices = {name: choice for entry in whole["defaults"] if isinstance(entry, dict) for name, choice in entry.items()}
    params = identity.texts({**whole, "runtimes": runtimes(whole["runtimes"])})
    for group in GROUPS:
        params |= {group: str(choices[group])} | identity.texts(
            {group: _plain(CONF / group / f"{choices[group]}.yaml")}
        )
    return {name: text for name, text in params.items() if "${" not in text}


def _plain(path: Path) -> dict[str, Any]:
    found: Any = OmegaConf.to_container(OmegaConf.load(path))
    return dict(found)
