"""Locks of files in shared folders: signed by their holders, released with them."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import Timeout

from qexp.system import file_lock, machine
from tests.helpers import ROOT

HOLD = """
import sys, time
from pathlib import Path
from qexp.system import file_lock
with file_lock.acquire(Path(sys.argv[1]), "holds it"):
    print(flush=True)
    time.sleep(600)
"""


@contextmanager
def another_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=-1, text=True
    )
    try:
        assert process.stdout
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()


def test_who_waits_says_for_whom_and_has_it_once_the_holder_is_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger=file_lock.log.name)
    monkeypatch.setattr(file_lock, "QUIET_SECONDS", 0.05)
    path = tmp_path / "lock"
    assert file_lock.holder(path) == "another process"
    with another_process(path) as holder:
        name = f"process {holder.pid} on {machine.host()}, boot {machine.boot()[:8]}"
        assert file_lock.holder(path) == name
        with pytest.raises(Timeout):
            file_lock.acquire(path, "holds it", 0.1)
        assert [record.getMessage() for record in caplog.records] == [f"waiting for {name}, which holds it"]
        assert file_lock.holder(path) == name
        holder.send_signal(signal.SIGKILL)
        with file_lock.acquire(path, "holds it", 60):
            assert file_lock.holder(path) == machine.this_process()
    with another_process(path):  # it was released
        pass


def test_others_of_the_group_can_hold_it_too_where_the_umask_says_so(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        with file_lock.acquire(tmp_path / "lock", "holds it"):
            assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o664
    finally:
        os.umask(before)
