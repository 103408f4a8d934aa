"""Sockets between processes have paths that are short enough, whatever TMPDIR is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

# The longest path of a socket, as the system itself has it, is 107 bytes; multiprocessing's names take 32 of them.
MOST = 75

MEET = """
import logging, multiprocessing, sys, tempfile
from multiprocessing import forkserver, util
from multiprocessing.connection import Client, Listener
from qexp.system import processes

def meet(_):
    with Listener(family="AF_UNIX") as listener, Client(listener.address) as client:
        return util.get_temp_dir()

if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
    processes.prepare_temporary_folder()
    forkserver.ensure_running()
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        print(tempfile.gettempdir(), meet(0), *pool.map(meet, [0]), sep="\\n")
"""


def meeting(folder: Path, tmpdir: str) -> tuple[list[str], str]:
    """Output of a process with this TMPDIR: warnings, folder of temporary files, socket shared with its child."""
    (folder / "meet.py").write_text(MEET)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": tmpdir}
    done = subprocess.run(
        [sys.executable, "meet.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    return done.stdout.splitlines(), done.stderr


def long_folder(size: int, letter: str = "x") -> str:
    """A folder whose path has this many bytes."""
    folder = Path("/tmp") / f"qexp-{os.getpid()}"
    rest = size - len(os.fsencode(folder)) - 1
    name = letter * (rest // len(letter.encode())) + "y" * (rest % len(letter.encode()))
    (folder / name).mkdir(parents=True)
    return str(folder / name)


@pytest.mark.parametrize(
    ("size", "letter", "short"),
    [
        (MOST, "x", False),
        (MOST + 1, "x", True),
        (140, "x", True),
        (MOST, "é", False),
        (MOST + 1, "é", True),
    ],
)
def test_processes_meet_in_a_folder_whose_path_is_short_enough(
    tmp_path: Path, request: pytest.FixtureRequest, size: int, letter: str, short: bool
) -> None:
    folder = long_folder(size, letter)
    request.addfinalizer(lambda: [Path(folder).rmdir(), Path(folder).parent.rmdir()])
    said, err = meeting(tmp_path, folder)
    assert err == ""
    temporary, *places = said
    assert temporary == folder  # other files still go where they were asked to
    parents = {str(Path(place).parent) for place in places}
    assert parents == ({"/tmp"} if short else {folder})
    assert not any(Path(place).exists() for place in places)


def test_a_tmpdir_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    said, err = meeting(tmp_path, str(tmp_path / "missing"))
    assert err == ""
    warning, temporary, *_ = said
    missing = f"TMPDIR={tmp_path}/missing is no folder that can be written to"
    assert warning == f"{missing}; temporary files go to {temporary}."
    assert Path(temporary).is_dir()


NONE = """
import tempfile
from qexp.system import processes
processes.SHORT_FOLDERS = ("/proc",)
tempfile.tempdir = "/" + 200 * "x"
processes.prepare_temporary_folder()
"""


def test_where_no_folder_is_short_enough_it_is_said_how_short_it_must_be() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TMPDIR", None)
    done = subprocess.run([sys.executable, "-c", NONE], env=environment, capture_output=True, text=True, timeout=60)
    assert "InputError: TMPDIR=/xxx" in done.stderr
    assert f"at most {MOST} bytes" in done.stderr
