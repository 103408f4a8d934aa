"""Digests of the files that a run depends on: its weights, and the code of qexp and of the user.

Computed without running any of that code, and without torch.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sysconfig
from contextlib import suppress
from functools import cache
from pathlib import Path

import qexp
from qexp.config import identity
from qexp.config.instantiation import current_folder_first
from qexp.config.schema import Config

ROOT = Path(qexp.__file__).parent
# Code that starts, records and shows runs doesn't change their results.
NOT_IN_RESULTS = ("__init__", "__main__", "launch", "report", "tracking")
# `import qexp.a`, `from qexp.a import b`; `from qexp import a, b`, or in parentheses over several lines
_IMPORT = re.compile(r"^[ \t]*(?:from|import) +qexp(?:\.(\w+)| +import +(?:\(([^)]+)|([\w ,]+)))", re.MULTILINE)


def tags(config: Config) -> dict[str, str]:
    """The provenance tags of a run that are known before it starts."""
    return {
        "config_hash": identity.config_hash(config),
        "code_hash": code_hash(str(config.model["_target_"]), str(config.dataset["_target_"])),
        "checkpoint_digest": checkpoint_digest(config),
    }


@cache
def code_hash(*targets: str) -> str:
    """16 hex digits over the code that a result depends on: qexp but for how runs are launched, recorded and shown, and
    the user's code that the `_target_`s depend on."""
    packages = sorted(path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file())
    results = [file for package in packages if package not in NOT_IN_RESULTS for file in _files(package)]
    return _digest(tuple(results), tuple(dict.fromkeys(path for target in targets for path in files_of(target))))


@cache
def of(*names: str) -> str:
    """16 hex digits over the sources of parts of qexp: packages, with all the packages that they import, and single
    modules by their dotted names (`data.builtin`), by themselves.

    A cache key states by it which code its entry depends on.
    """
    if unknown := [name for name in names if not _files(name)]:
        raise ValueError(f"qexp has no {unknown[0]}")
    parts = with_imports(*(name for name in names if "." not in name)) | {name for name in names if "." in name}
    return _digest(tuple(file for part in sorted(parts) for file in _files(part)), ())


@cache
def with_imports(*packages: str) -> frozenset[str]:
    """These packages of qexp (or modules beside its packages) and all that they import, directly or through others."""
    found: set[str] = set()
    todo = list(packages)
    while todo:
        package = todo.pop()
        if package not in found:
            found.add(package)
            todo += [name for file in _files(package) for name in _packages_imported(file.read_bytes())]
    return frozenset(found)


def _packages_imported(source: bytes) -> set[str]:
    """The packages of qexp that a module imports. Found by a pattern: to parse all of qexp takes half a second."""
    found: set[str] = set()
    for direct, *listed in _IMPORT.findall(source.decode()):
        found |= {direct} if direct else {*re.findall(r"\w+", " ".join(listed))}
    return {name for name in found if _files(name)}


@cache
def _files(name: str) -> tuple[Path, ...]:
    """The files of a package or module of qexp; none where there is no such."""
    path = ROOT.joinpath(*name.split("."))
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    return tuple(file for file in files if file.is_file())


def _digest(own: tuple[Path, ...], others: tuple[Path, ...]) -> str:
    """16 hex digits over files of qexp, by their places in it, and of others, by their names."""
    digest = hashlib.sha256()
    for path in own:
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    for path in others:
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
    """True if a file or folder belongs to Python itself or an installed package, not to a user's project."""
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
