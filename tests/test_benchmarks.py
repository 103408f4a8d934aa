"""Each benchmark runs: on its smallest size, to its end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import BENCHMARKS
from benchmarks.networks import NETWORKS, Network, chosen
from tests.helpers import ROOT


def run(*arguments: str | Path, size: str = "smallest") -> str:
    """The text that `python -m` prints with these arguments."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "QEXP_BENCH_SIZE": size}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_a_benchmark_runs_to_its_end(name: str) -> None:
    lines = run("benchmarks", name).splitlines()
    assert lines[3] == name
    assert len(lines) > 4


@pytest.mark.slow
def test_a_record_is_the_same_twice(tmp_path: Path) -> None:
    run("benchmarks.freeze", tmp_path / "before.json", "--only", "default")
    said = run("benchmarks.freeze", tmp_path / "after.json", "--only", "default", "--against", tmp_path / "before.json")
    assert said == "1 runs recorded the same\n"


def test_networks_are_those_of_the_file_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built_in = [Network("tiny", ("model=tiny",))]
    assert chosen(built_in) is built_in
    file = tmp_path / "networks.txt"
    monkeypatch.setenv(NETWORKS, str(file))
    file.write_text("# mine\n\na model=tiny 'dataset.mean=[0.1, 0.2]' # so\nb\n")
    assert chosen(built_in) == [Network("a", ("model=tiny", "dataset.mean=[0.1, 0.2]")), Network("b", ())]
    for text, message in (
        ("a x=1\na y=2\n", "each once"),
        ("# none\n", "one network or more"),
        ("a 'x", "can't be read"),
    ):
        file.write_text(text)
        with pytest.raises(SystemExit, match=message):
            chosen(built_in)
    monkeypatch.setenv(NETWORKS, str(tmp_path / "missing.txt"))
    with pytest.raises(SystemExit, match=r"missing\.txt can't be read"):
        chosen(built_in)
