"""Cache keys name the code that their entries depend on: all of it, and no more."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from qexp.config import code_digest
from tests.helpers.imports import PACKAGE, files_of, imported


def keys() -> Iterator[tuple[str, tuple[str, ...]]]:
    """The package of each call of `code_digest.of`, and the names in it."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "code_digest.of":
                yield file.relative_to(PACKAGE).parts[0], tuple(ast.literal_eval(name) for name in node.args)


KEYS = sorted(set(keys()))


def closure(package: str) -> set[str]:
    """A package and all that it imports, directly or not, by the syntax trees of its files."""
    found: set[str] = set()
    todo = [package]
    while todo:
        if (name := todo.pop()) not in found:
            found.add(name)
            todo += [other for file in files_of(name) for other in imported(file) if other != "__version__"]
    return found


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the sources that digests are made of, to change."""
    shutil.copytree(PACKAGE, tmp_path / "qexp", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code_digest, "ROOT", tmp_path / "qexp")
    yield tmp_path / "qexp"
    forget()


def forget() -> None:
    for remembered in (code_digest.of, code_digest.code_hash, code_digest.with_imports, code_digest._files):
        remembered.cache_clear()


def digests() -> dict[tuple[str, ...], str]:
    forget()
    return {names: code_digest.of(*names) for _, names in KEYS}


def comment(file: Path) -> None:
    file.write_text(f"{file.read_text()}\n# a remark\n")


def test_there_are_keys() -> None:
    assert len(KEYS) >= 5


@pytest.mark.parametrize("package", sorted({path.stem for path in PACKAGE.glob("[a-z]*")}))
def test_what_a_package_imports_is_found_as_its_syntax_tree_tells(package: str) -> None:
    assert code_digest.with_imports(package) == closure(package)


@pytest.mark.parametrize(("package", "names"), KEYS)
def test_a_key_covers_the_code_that_makes_its_entry(package: str, names: tuple[str, ...]) -> None:
    packages = [name for name in names if "." not in name]
    covered = code_digest.with_imports(*packages)
    assert not covered & {"tracking", "report", "pipeline", "launch"}
    if packages and package != "pipeline":
        assert covered >= closure(package)
    for name in names:
        if packages and "." in name:
            beneath = set(imported(PACKAGE / f"{name.replace('.', '/')}.py")) - {name.partition(".")[0]}
            assert covered >= beneath


@pytest.mark.parametrize("file", ["report/charts.py", "tracking/store.py", "launch/job_process.py"])
def test_a_comment_where_runs_are_launched_recorded_or_shown_changes_no_key(copied: Path, file: str) -> None:
    before, results = digests(), code_digest.code_hash()
    comment(copied / file)
    assert digests() == before
    assert code_digest.code_hash() == results


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("data/builtin.py", lambda names: True),
        ("data/loading.py", lambda names: "data.builtin" not in names),
        ("quantize/flows/fx.py", lambda names: "data.builtin" not in names),
        ("runtimes/torchscript.py", lambda names: bool({"runtimes", "latency"} & {*names})),
        ("accuracy/prediction_key.py", lambda names: "accuracy" in names),
        ("latency/protocol.py", lambda names: "latency" in names),
        ("pipeline/evaluate.py", lambda names: "pipeline.evaluate" in names),
    ],
)
def test_a_change_of_code_changes_the_keys_of_what_it_computes(copied: Path, file: str, changed) -> None:
    before, results = digests(), code_digest.code_hash()
    comment(copied / file)
    after = digests()
    assert {names for names in after if after[names] != before[names]} == {n for n in before if changed(n)}
    assert code_digest.code_hash() != results


def test_a_key_can_t_name_what_there_is_not() -> None:
    with pytest.raises(ValueError, match=r"qexp has no pipeline\.nothing"):
        code_digest.of("pipeline.nothing")
