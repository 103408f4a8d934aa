"""Messages for errors in the configuration: a sentence and exit status 1 instead of Hydra's or OmegaConf's
traceback."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Iterator

from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from qexp.errors import QexpError

# Former names of settings, and their names today.
RENAMED = {"latency.runtimes": "runtimes", "job.ahead": "job.at_a_time"}


def renamed_setting(setting: str) -> str:
    """A sentence for a setting that has another name now; empty for others."""
    today = RENAMED.get(setting)
    return f"{setting} is now {today}: use {today}=... in its place." if today else ""


@contextlib.contextmanager
def exit_with_message() -> Iterator[None]:
    """Print the message of an error that has one (see `message_for`) and exit with status 1; with HYDRA_FULL_ERROR=1
    print its traceback."""
    try:
        yield
    except Exception as error:
        sentence = message_for(error)
        if sentence is None:
            raise
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            traceback.print_exc()
        else:
            print(sentence, file=sys.stderr)
        sys.exit(1)


def message_for(error: Exception) -> str | None:
    """A sentence for the user about an error in the configuration; None for other errors."""
    if isinstance(error, QexpError):
        return str(error)
    if said := renamed_setting(_unknown_key(error)):
        return said
    if isinstance(error, OmegaConfBaseException):
        return unresolved(error)
    if isinstance(error, RuntimeError):
        return _missing_launcher(error)
    return _bad_default(error) if isinstance(error, ValueError) else None


def _missing_launcher(error: RuntimeError) -> str | None:
    """A sentence about a launcher whose package is not installed; None for other errors."""
    found = re.search(r"Unknown plugin class : '(hydra_plugins\.hydra_(\w+)_launcher)\.", str(error))
    if not found:
        return None
    return (
        f"hydra/launcher: {found[1]} is not installed; install it by pip install 'qexp[{found[2]}]', or leave out "
        "hydra/launcher: job.at_a_time jobs then run at a time on this machine."
    )


def _unknown_key(error: BaseException | None) -> str:
    """The setting that OmegaConf doesn't know, where that caused an error of Hydra's; else empty."""
    while error is not None:
        if isinstance(error, ConfigAttributeError | ConfigKeyError):
            return error.full_key or ""
        error = error.__cause__ or error.__context__
    return ""


def unresolved(error: OmegaConfBaseException) -> str:
    """A sentence: the setting without a value, what is missing, and what to do."""
    setting, reason = error.full_key or "the configuration", str(error).partition("\n")[0].rstrip(".")
    variable = re.search(r"Environment variable '(.+?)' not found", reason)
    if variable:
        instead = f"${{oc.env:{variable[1]},VALUE}}"
        return (
            f"{setting}: the environment variable {variable[1]} is not set; set it, or say what holds without it: "
            f"{instead}."
        )
    key = re.search(r"Interpolation key '(.+?)' not found", reason)
    if key:
        return f"{setting}: ${{{key[1]}}} is no setting; `python -m qexp --cfg job` lists all of them."
    resolver = re.search(r"Unsupported interpolation type (.+)", reason)
    if resolver:
        return f"{setting}: ${{{resolver[1]}:…}} is unknown; a variable of the environment is ${{oc.env:NAME}}."
    return f"{setting} can't be resolved: {reason}."


def _bad_default(error: ValueError) -> str | None:
    """A sentence about a choice in a defaults list that YAML doesn't read as text; Hydra names its type, but not the
    file. None for other errors."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        known = frame.f_locals
        if frame.f_code.co_name == "_create_defaults_list" and {"config_path", "item"} <= known.keys():
            item = str(known["item"]).strip("{}").replace("'", "")
            return (
                f"{known['config_path']}: `{item}` in its defaults list is no choice, which is a text, and YAML reads "
                'off, on, yes, no, true, false and numbers as values; write it in quotes, as "off".'
            )
    return None
