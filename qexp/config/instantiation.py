"""`_target_`: from a dotted path and its arguments in the configuration to a Python callable that takes them.

Serves the two open groups, `model` and `dataset`. torch is imported here only if the target itself imports it.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.core.hydra_config import HydraConfig

from qexp.errors import ConfigError, InputError, one_line

# hydra.utils.instantiate's own keys, which may stand beside `_target_`.
_HYDRA_KEYS = frozenset({"_target_", "_args_", "_partial_", "_convert_", "_recursive_"})


def resolve(
    setting: str, spec: Mapping[str, Any], reserved: Collection[str] = (), supplied: Collection[str] = ()
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The callable that `spec["_target_"]` names, and the keyword arguments to call it with.

    setting: where `spec` stands in the configuration (`model`), for messages.
    spec: plain values; a mapping within it that has a `_target_` is called, as hydra.utils.instantiate does
        (with `_args_` and `_partial_`).
    reserved: keys of `spec` that are not arguments; left out.
    supplied: arguments that the caller adds itself when it calls; the signature must take them.
    Raises ConfigError where the path leads nowhere or the signature doesn't take the arguments, InputError where
    importing it fails with an error of its own.
    """
    target = spec.get("_target_")
    found = locate(f"{setting}._target_", target)
    given = {key: value for key, value in spec.items() if key not in _HYDRA_KEYS and key not in reserved}
    args = list(spec.get("_args_") or ())
    positional, keywords = _check_signature(setting, str(target), found, args, given, {*supplied}, {*reserved})
    if spec.get("_recursive_", True):
        positional = [_instantiate(f"{setting}._args_[{i}]", value) for i, value in enumerate(positional)]
        keywords = {key: _instantiate(f"{setting}.{key}", value) for key, value in keywords.items()}
    return (functools.partial(found, *positional) if positional else found), keywords


def takes(target: Callable[..., Any], argument: str) -> bool:
    """True if `target` can be called with the keyword `argument`, or its signature can't be known."""
    parameters = _parameters(target)
    if parameters is None:
        return True
    by_name = parameters.get(argument)
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values()) or (
        by_name is not None and by_name.kind in (by_name.POSITIONAL_OR_KEYWORD, by_name.KEYWORD_ONLY)
    )


def locate(setting: str, path: object) -> Callable[..., Any]:
    """The class, function or classmethod at the dotted `path`, looked up in the current folder too.

    Raises ConfigError where there is none, InputError where importing its module fails with an error of its own.
    """
    if path is None or path == "???":
        raise ConfigError(f"{setting} is not set; give a class or function as package.module.name.")
    if not isinstance(path, str) or not all(part.isidentifier() for part in path.split(".")) or "." not in path:
        raise ConfigError(
            f"{setting}={path} is not a dotted path; write a class or function as package.module.name"
            " (for Net in the file mymodel.py: mymodel.Net)."
        )
    current_folder_first()
    parts = path.split(".")
    module = _import(setting, path, parts[0])
    if module is None:
        raise ConfigError(
            f"{setting}={path}: there is no module {parts[0]}, neither installed nor in {_start_folder()}."
        )
    # As many parts as name modules, but never the last: torchvision has modules and functions of the same name.
    used = 1
    while used < len(parts) - 1 and (found := _import(setting, path, ".".join(parts[: used + 1]))):
        module, used = found, used + 1
    value: Any = module
    for i in range(used, len(parts)):
        value = _attribute(setting, path, ".".join(parts[:i]), value, parts[i])
    return _checked_callable(setting, path, value)


def _start_folder() -> str:
    """The folder in which the command was started, which `hydra.job.chdir=true` leaves."""
    return str(HydraConfig.get().runtime.cwd) if HydraConfig.initialized() else str(Path.cwd())


def current_folder_first() -> None:
    """`python -m` has the current folder on the path, a console script and a worker process have not."""
    folder = _start_folder()
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _import(setting: str, path: str, name: str) -> ModuleType | None:
    """The module `name`, or None where there is none."""
    try:
        return _import_past_torchvision(name)
    except ModuleNotFoundError as error:
        # A module that exists but misses one of its own imports is another matter.
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            return None
        raise InputError(f"{setting}={path}: importing {name} fails with {one_line(error)}.") from error
    except (Exception, SystemExit) as error:
        raise InputError(f"{setting}={path}: importing {name} fails with {one_line(error)}.") from error


def _import_past_torchvision(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    importlib.import_module("qexp.system.torchvision_import")
    return importlib.import_module(name)


def _attribute(setting: str, path: str, owner: str, value: Any, name: str) -> Any:
    try:
        return getattr(value, name)
    except AttributeError:
        pass
    except Exception as error:
        raise InputError(f"{setting}={path}: looking up {owner}.{name} fails with {one_line(error)}.") from error
    if isinstance(value, ModuleType) and _import(setting, path, f"{owner}.{name}") is not None:
        raise ConfigError(f"{setting}={path} is a module; name a class or a function in it.")
    near = difflib.get_close_matches(name, [n for n in dir(value) if not n.startswith("_")], n=3)
    raise ConfigError(f"{setting}={path}: {owner} has no {name}{_did_you_mean(near)}.")


def _checked_callable(setting: str, path: str, value: Any) -> Callable[..., Any]:
    if isinstance(value, ModuleType):
        raise ConfigError(f"{setting}={path} is a module; name a class or a function in it.")
    if not callable(value):
        raise ConfigError(f"{setting}={path} is a {type(value).__name__}; name a class or a function.")
    # An nn.Module or a data set made at import can be called or indexed, but nothing can be built from it.
    if not inspect.isclass(value) and (hasattr(value, "state_dict") or hasattr(value, "__getitem__")):
        raise ConfigError(f"{setting}={path} is an object, made already; name the class or a function that makes it.")
    return value


def _parameters(target: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    try:
        return inspect.signature(target).parameters
    except (TypeError, ValueError):  # some callables written in C have none
        return None


def _check_signature(
    setting: str,
    path: str,
    target: Callable[..., Any],
    args: list[Any],
    given: Mapping[str, Any],
    supplied: set[str],
    reserved: set[str],
) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments for `target`; parameters that are positional-only may be given by name."""
    parameters = _parameters(target)
    if parameters is None:
        return args, dict(given)
    keywords = dict(given)
    args = list(args)
    in_order = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for parameter in in_order[len(args) :]:
        if parameter.kind is not parameter.POSITIONAL_ONLY or parameter.name not in keywords:
            break
        args.append(keywords.pop(parameter.name))
    by_position = {p.name for p in in_order[: len(args)]}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    by_name = [p for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    legal = [p.name for p in by_name if p.name not in by_position]
    takes_text = ", ".join(name for name in legal if name not in supplied | reserved) or "no arguments"
    for key, value in keywords.items():
        if key in supplied:
            raise ConfigError(f"{setting}.{key}={value}: qexp passes {key} to {path} itself; leave it out.")
        if key not in legal and not open_ended:
            near = difflib.get_close_matches(key, legal, n=1)
            raise ConfigError(f"{setting}.{key}={value}: {path} takes {takes_text}{_did_you_mean(near)}.")
    for key in sorted(supplied):
        if key not in legal and not open_ended:
            raise ConfigError(f"{setting}._target_={path} must take the argument {key}, and takes {takes_text}.")
    missing = [
        p.name
        for p in parameters.values()
        if p.default is p.empty
        and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        and p.name not in by_position
        and p.name not in keywords
        and p.name not in supplied
    ]
    if missing == ["self"] or (missing and missing[0] == "self"):
        raise ConfigError(f"{setting}._target_={path} is a method of an object; name a class, function or classmethod.")
    if missing:
        needs = ", ".join(f"{setting}.{name}" for name in missing)
        raise ConfigError(f"{setting}._target_={path} needs {needs}; set it (+{setting}.{missing[0]}=…).")
    return args, keywords


def _instantiate(setting: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        if "_target_" not in value:
            return {key: _instantiate(f"{setting}.{key}", item) for key, item in value.items()}
        found, keywords = resolve(setting, value)
        if value.get("_partial_", False):
            return functools.partial(found, **keywords)
        try:
            return found(**keywords)
        except Exception as error:
            raise InputError(f"{setting}._target_={value['_target_']} fails with {one_line(error)}.") from error
    if isinstance(value, list | tuple):
        return [_instantiate(f"{setting}[{i}]", item) for i, item in enumerate(value)]
    return value


def _did_you_mean(names: list[str]) -> str:
    return f" (did you mean {' or '.join(names)}?)" if names else ""
