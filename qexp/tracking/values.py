"""Names, params, tags and files in the form that MLflow takes."""

from __future__ import annotations

import getpass
import json
import math
import os
import posixpath
import re
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import psutil

from qexp.system import credentials, machine
from qexp.system.credentials import masked

T = TypeVar("T")


SWEEP_TAG = "qexp.sweep"  # of a sweep's own run, which others are children of
PARAM_LENGTH = 6000  # MLflow cuts longer values without a word
LONG_PARAMS = "long_params.json"
TAG_LENGTH = 5000  # what servers of all versions take
NAME_LENGTH = 250


def with_legal_names(values: Mapping[str, T]) -> dict[str, T]:
    """The same values under names that MLflow takes: one bad character would fail the whole batch."""
    named: dict[str, T] = {}
    for name, value in values.items():
        legal = re.sub(r"[^\w./\- :]", "_", name)
        legal = posixpath.normpath(legal).strip("/")[:NAME_LENGTH] or "_"
        legal = re.sub(r"^\.+", "_", legal)
        unique, number = legal, 2
        while unique in named:
            unique, number = f"{legal[: NAME_LENGTH - 5]}_{number}", number + 1
        named[unique] = value
    return named


def cut_params(params: Mapping[str, str]) -> dict[str, str]:
    """Params as MLflow holds them."""
    return {name: _cut(masked(value), PARAM_LENGTH, LONG_PARAMS) for name, value in with_legal_names(params).items()}


def long_params(params: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The params that MLflow can't hold, as an artifact."""
    long = {name: value for name, value in params.items() if len(value) > PARAM_LENGTH}
    return {LONG_PARAMS: long} if long else {}


def _cut(value: str, length: int, where: str = "") -> str:
    if len(value) <= length:
        return value
    note = f"... ({len(value)} characters{', all in ' + where if where else ''})"
    return value[: length - len(note)] + note


def write_artifact(path: Path, content: Path | str | Mapping[str, Any] | Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Path):
        if content.is_dir():
            shutil.copytree(content, path)
            return
        try:
            os.link(content, path)  # large files need not be copied twice
        except OSError:
            shutil.copyfile(content, path)
    elif isinstance(content, str):
        path.write_text(masked(content), encoding="utf-8", errors="backslashreplace")
    else:
        # What is not finite becomes null: browsers refuse NaN in JSON.
        written = credentials.masked_tree(json_value(content))
        path.write_text(json.dumps(written, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def json_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return json_value(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def system_tags(tags: Mapping[str, str], description: str | None) -> dict[str, str]:
    """The tags that MLflow's fluent API sets and its UI shows, and those of the process, for `close_orphans`."""
    system = {"mlflow.user": user(), "mlflow.source.name": "qexp", "mlflow.source.type": "LOCAL"}
    process = psutil.Process()
    system |= {
        "host": machine.host(),
        "boot": machine.boot(),
        "pid": str(process.pid),
        "pid_started": f"{machine.since_boot(process):.2f}",
    }
    if tags.get("git_sha"):
        system["mlflow.source.git.commit"] = tags["git_sha"]
    if description:
        system["mlflow.note.content"] = description
    return system


def cut_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {name: _cut(masked(value), TAG_LENGTH) for name, value in with_legal_names(tags).items()}


def requirement(package: str) -> str:
    return f"{package}=={version(package).split('+')[0]}"  # 2.13.0+cpu is on no index


def user() -> str:
    try:
        return os.environ.get("MLFLOW_TRACKING_USERNAME") or getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container whose user id has no name
        return "unknown"
