"""Locks of files in folders that processes share, of one machine or of several.

The system's `flock`, which ends with its holder, killed or not. The holder signs the file, with its host, since a
number of a process means nothing on another one.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout

from qexp.system import machine, machine_lock

log = logging.getLogger(__name__)

QUIET_SECONDS = 2.0  # of waiting, before it is said
LONGEST = 300  # bytes of a signature


def acquire(path: Path, doing: str, seconds: float = -1) -> AcquireReturnProxy:
    """Hold the lock of the file at `path`, which is made where missing; a context manager releases it.

    A process that waits releases the machine's lock meanwhile, and logs for whom it waits. doing: what the holder does,
    as in "makes this entry"; seconds: to wait, negative for as long as it takes. Raises Timeout, or OSError where the
    folder can't be written.
    """
    lock = FileLock(path)
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        with machine_lock.released():
            held = _wait(lock, path, doing, seconds)
    with suppress(OSError):  # a full disk
        path.write_text(machine.this_process())
    return held


def _wait(lock: FileLock, path: Path, doing: str, seconds: float) -> AcquireReturnProxy:
    patience = QUIET_SECONDS if seconds < 0 else min(QUIET_SECONDS, seconds)
    try:
        return lock.acquire(timeout=patience)
    except Timeout:
        log.info("waiting for %s, which %s", holder(path), doing)
        return lock.acquire(timeout=seconds if seconds < 0 else max(0.0, seconds - patience))


def holder(path: Path) -> str:
    """Who has signed the lock last: its process, host and boot; "another process" where nobody has."""
    with suppress(OSError):
        return signed(os.fsdecode(path.read_bytes()[:LONGEST]))
    return signed("")


def signed(text: str) -> str:
    """Who wrote this signature; "another process" where it is empty."""
    return " ".join(text.split()) or "another process"
