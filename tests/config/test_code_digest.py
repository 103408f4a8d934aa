"""Cache keys name the code that their entries depend on: all of it, and no more."""

from __future__ import annotations

import ast
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qexp.config import code_digest, identity
from qexp.config.schema import Config
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


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a user's code: a module, one beside it, a package imported within a function, and others."""
    monkeypatch.syspath_prepend(str(tmp_path))
    files = {
        "usernet.py": "import torch\nfrom userwidth import WIDTH\n\ndef make():\n    import userpackage.deep\n",
        "userwidth.py": "WIDTH = 8\n",
        "userpackage/__init__.py": "",
        "userpackage/deep/__init__.py": "from . import sibling\n",
        "userpackage/deep/sibling.py": "",
        "userpackage/.venv/ignored.py": "",
        "unrelated.py": "",
        "README.md": "a commit to this changes nothing",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    yield tmp_path
    code_digest.code_hash.cache_clear()


def test_the_files_of_a_target_are_its_own_and_what_they_import_but_nothing_installed(user: Path) -> None:
    found = [str(file.relative_to(user)) for file in code_digest.files_of("usernet.make")]
    assert found == [
        "usernet.py", "userpackage/__init__.py", "userpackage/deep/__init__.py", "userpackage/deep/sibling.py",
        "userwidth.py",
    ]  # fmt: skip
    assert "usernet" not in sys.modules  # nothing was run
    assert code_digest.files_of("qexp.models.architectures.tiny") == []
    assert code_digest.files_of("nosuchmodule.make") == []
    installed = code_digest.files_of("filelock.FileLock")
    assert installed
    assert all("filelock" in file.parts for file in installed)


@pytest.mark.parametrize(
    ("file", "text", "counts"),
    [
        ("usernet.py", "def make(): pass\n", True),
        ("userwidth.py", "WIDTH = 16\n", True),
        ("userpackage/deep/sibling.py", "x = 1\n", True),
        ("userpackage/deep/sibling.py", "def broken(\n", True),
        ("unrelated.py", "x = 1\n", False),
        ("README.md", "other words", False),
    ],
)
def test_the_code_s_hash_changes_with_the_user_s_code_and_with_nothing_else(
    user: Path, file: str, text: str, counts: bool
) -> None:
    before, without = code_digest.code_hash("usernet.make", "qexp.data.builtin.digits"), code_digest.code_hash()
    (user / file).write_text(text)
    code_digest.code_hash.cache_clear()
    assert (code_digest.code_hash("usernet.make", "qexp.data.builtin.digits") != before) is counts
    assert code_digest.code_hash() == without != before
    assert code_digest.code_hash("qexp.models.architectures.tiny", "qexp.data.builtin.digits") == without


def test_the_checkpoint_counts_by_its_content(composed: Callable[..., Config], tmp_path: Path) -> None:
    config = composed(f"model.checkpoint={tmp_path / 'net.pt'}")
    digests = [code_digest.checkpoint_digest(config)]
    for content in (b"a", b"b"):
        (tmp_path / "net.pt").write_bytes(content)
        os.utime(tmp_path / "net.pt", ns=(len(digests), len(digests)))
        digests.append(code_digest.checkpoint_digest(config))
    assert digests[0] == identity.NOT_APPLICABLE
    assert len(set(digests)) == 3
