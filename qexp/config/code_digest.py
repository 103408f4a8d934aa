"""What a run is made from, as far as files tell: its settings, its weights, and the code of qexp and of its user.

Found without running any of that code, and without torch.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sysconfig
from contextlib import suppress
from functools import cache
from pathlib import Path

import qexp
from qexp.config import identity
from qexp.config.instantiation import current_folder_first
from qexp.config.schema import Config


def tags(config: Config) -> dict[str, str]:
    """What is known of a run before it has begun."""
    return {
        "config_hash": identity.config_hash(config),
        "code_hash": code_hash(str(config.model["_target_"]), str(config.dataset["_target_"])),
        "checkpoint_digest": checkpoint_digest(config),
    }


@cache
def code_hash(*targets: str) -> str:
    """16 hex digits over the sources of qexp, and of what the `_target_`s depend on."""
    here = Path(qexp.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(here.rglob("*.py")):
        digest.update(str(path.relative_to(here)).encode() + b"\0" + path.read_bytes())
    for path in dict.fromkeys(path for target in targets for path in files_of(target)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def checkpoint_digest(config: Config) -> str:
    """16 hex digits over the file that the weights come from; `n/a` where there is none."""
    path = Path(config.model.get("checkpoint") or "")
    if not path.is_file():
        return identity.NOT_APPLICABLE
    state = path.stat()
    return _file_digest(path, state.st_mtime_ns, state.st_size)


@cache
def _file_digest(path: Path, changed: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def files_of(target: str) -> list[Path]:
    """The Python files that `target` (a dotted path) depends on: its module, or the whole of its package, and, as far
    as it is not installed, the same of every module that these import, wherever in them they do.

    Empty for qexp's own targets, whose sources are known, and where there is no such module.
    """
    current_folder_first()
    found: dict[str, list[Path]] = {}
    todo = [target.partition(".")[0]]
    while todo:
        name = todo.pop()
        if name in found or name == "qexp":
            continue
        places = _places(name)
        own = [place for place in places if not installed(place)]
        # An installed package counts where the target itself is in it.
        found[name] = [file for place in (own if found else places) for file in _within(place)]
        if own:
            todo += sorted({imported for file in found[name] for imported in _imports(file)})
    return sorted({file for files in found.values() for file in files})


def _places(name: str) -> list[Path]:
    """The file of a top-level module, or the folders of a package."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # ValueError: a module without a spec, such as __main__
        return []
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        return [Path(folder) for folder in spec.submodule_search_locations]
    return [Path(spec.origin)] if spec.has_location and spec.origin and spec.origin.endswith(".py") else []


def _within(place: Path) -> list[Path]:
    """A file, or those in a folder and not hidden: a package may be a project's folder, with its environment in it."""
    if place.is_file():
        return [place]
    files = sorted(place.rglob("*.py"))
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(place).parts)]


def installed(place: Path) -> bool:
    """Whether a file or folder is of Python itself or of an installed package, and not of a user's project."""
    # By name too: a virtual environment may see the packages of the Python that it was made from.
    roots = (sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    return bool({"site-packages", "dist-packages"} & {*place.parts}) or any(map(place.is_relative_to, roots))


def _imports(file: Path) -> set[str]:
    """Top-level names of the modules that a file imports; relative imports stay within its package."""
    names: set[str] = set()
    with suppress(SyntaxError, ValueError):  # whoever imports it is told
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names
