"""The packages of qexp: each imports only those that stand below it in this list."""

from __future__ import annotations

import ast
from pathlib import Path

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


LIBRARIES = {
    # a library of torch's that is on its way out: the files of qexp that may know it
    "torch.ao": (
        "quantize/flows/eager.py",
        "quantize/flows/fx.py",
        "quantize/flows/dynamic.py",
        "quantize/torch_backend/",
    ),
    "torch.jit": ("runtimes/torchscript.py",),
}
ALIASES = {"torch.quantization": "torch.ao", "torch.nn.quantized": "torch.ao", "torch.nn.intrinsic": "torch.ao"}


def named(file: Path) -> set[str]:
    """The dotted names that a file imports or reads, such as torch.ao.quantization, whatever it calls torch."""
    tree, found = ast.parse(file.read_text()), set[str]()
    short: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            short |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            whole = {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= set(whole.values())
            short |= whole
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            found.add(f"{short.get(first, first)}.{rest}")
    return found


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_of_torch_s_that_is_on_its_way_out_is_known_in_few_files(library: str) -> None:
    for file in sorted(PACKAGE.rglob("*.py")):
        path = str(file.relative_to(PACKAGE))
        names = named(file)
        names |= {name.replace(old, new, 1) for name in names for old, new in ALIASES.items() if name.startswith(old)}
        knows = any(f"{name}.".startswith(f"{library}.") for name in names)
        assert not knows or path.startswith(LIBRARIES[library]), f"{path} knows {library}"


def test_names_are_found_whatever_a_file_calls_torch(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    for text in (
        "import torch as t\nt.ao.quantization",
        "from torch import ao\nao.nn",
        "import torch.ao.nn.quantized as q",
    ):
        source.write_text(text)
        assert any(f"{name}.".startswith("torch.ao.") for name in named(source)), text
    source.write_text("import torch\ntorch.aot.compile\n'torch.ao'")
    assert not any(f"{name}.".startswith("torch.ao.") for name in named(source))
