"""The packages of qexp: each imports only those that stand below it in this list."""

from __future__ import annotations

import ast

import pytest

from tests.helpers.imports import PACKAGE, files_of, imported

ORDER = [
    "errors",
    "metrics",
    "records",
    "statistics",
    "system",
    "config",
    "data",
    "models",
    "quantize",
    "runtimes",
    "accuracy",
    "latency",
    "tracking",
    "report",
    "pipeline",
    "export",
    "launch",
    "__main__",
]
# The process that jobs are forked from imports all that a job will need, Hydra's door too.
EXCEPTIONS = {("launch/fork_preload.py", "__main__")}


def test_every_file_is_in_a_package_of_the_list() -> None:
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert found - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("package", ORDER)
def test_a_package_imports_only_those_below_it(package: str) -> None:
    allowed = {*ORDER[: ORDER.index(package) + 1], "__version__"}
    beyond = {
        (str(file.relative_to(PACKAGE)), name)
        for file in files_of(package)
        for name in imported(file)
        if name not in allowed
    }
    assert beyond - EXCEPTIONS == set()


@pytest.mark.parametrize(("package", "library"), [("report", "torch"), ("config", "torch"), ("statistics", "torch")])
def test_some_packages_do_without_a_library(package: str, library: str) -> None:
    for file in files_of(package):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert library not in {name.partition(".")[0] for name in names}, file


def test_only_tracking_imports_mlflow() -> None:
    for file in sorted(PACKAGE.rglob("*.py")):
        if file.parent.name != "tracking":
            assert "import mlflow" not in file.read_text(), file
            assert "from mlflow" not in file.read_text(), file
