"""The sources of qexp and their imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import qexp

PACKAGE = Path(qexp.__file__).parent


def files_of(package: str) -> list[Path]:
    """The sources of a package, or the file of a module beside the packages."""
    folder = PACKAGE / package
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def imported(file: Path) -> Iterator[str]:
    """The packages (or modules) directly within qexp that a file imports, at its top or within functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("qexp."))
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            if node.module == "qexp":
                yield from (alias.name for alias in node.names)
            elif node.module and node.module.startswith("qexp."):
                yield node.module.split(".")[1]
