"""The machine's lock: shared by whatever computes, held alone by what times.

    with machine_lock.computing():      # a job; each batch within it is a slice, marked by another `computing()`
        with machine_lock.released():   # while it waits for something else, such as another process's lock
    with machine_lock.timing():         # nobody else computes meanwhile

One lock for all users of the machine, made of two files and the system's `flock`, which it drops when a process ends,
killed or not. Whoever wants to compute passes the gate (holds the first file for a moment) to share the second; whoever
wants to time keeps the gate shut from then on, so that it has the second to itself when the slices that have begun are
over. Both kinds queue at the gate, so neither can keep the other out.
"""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds that timing waits for a slice to end
POLL = 0.005  # seconds between two looks at whether it has


@dataclass(frozen=True)
class _Files:
    """Descriptors of the open files."""

    gate: int
    shared: int


class _Mine(threading.local):
    """What the thread holds: the files where it computes, `alone` where it times."""

    files: _Files | None = None
    alone: bool = False


class MachineLock:
    """A lock of the files `qexp-machine.gate` and `qexp-machine.lock` in `folder`, which are made where missing.

    patience: seconds after which timing no longer waits for a process that neither ends its slice nor dies, such as one
    that was stopped with Ctrl-Z.
    """

    def __init__(self, folder: Path, patience: float = PATIENCE) -> None:
        self._gate, self._shared, self._patience = folder / "qexp-machine.gate", folder / "qexp-machine.lock", patience
        self._mine, self._said = _Mine(), False
        os.register_at_fork(after_in_child=self._forget)  # the parent's is not the child's

    def _forget(self) -> None:
        self._mine = _Mine()

    @contextmanager
    def computing(self, wait: bool = True) -> Iterator[None]:
        """Share the machine with others that compute. Within another `computing` of the thread it begins a new slice:
        who waits to time does so first. Within `timing` it does nothing.

        wait: False to raise BlockingIOError where the gate is shut, which a slice within another always waits for.
        """
        if self._mine.alone:
            yield
        elif self._mine.files is not None:
            fcntl.flock(self._mine.files.shared, fcntl.LOCK_UN)
            self._share(self._mine.files)
            yield
        else:
            with self._opened() as files:
                self._share(files, wait)
                self._mine.files = files
                try:
                    yield
                finally:
                    self._mine.files = None

    @contextmanager
    def released(self) -> Iterator[None]:
        """Hold nothing meanwhile where the thread computes: what it waits for may be in the hands of a process that
        can't go on before somebody has timed."""
        files = self._mine.files
        if files is None:
            yield
            return
        self._mine.files = None
        fcntl.flock(files.shared, fcntl.LOCK_UN)
        try:
            yield
        except Exception:
            self._take_back(files)
            raise
        self._take_back(files)  # not where the process is being ended, which can't wait

    def _take_back(self, files: _Files) -> None:
        self._share(files)
        self._mine.files = files

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Have the machine alone: nobody who follows this lock computes or times meanwhile."""
        with self.released(), self._opened() as files:
            self._pass(files.gate)
            self._sign(files.gate, str(os.getpid()))
            self._until_alone(files.shared)
            self._mine.alone = True
            try:
                yield
            finally:
                self._mine.alone = False
                self._sign(files.gate, "")

    def _sign(self, gate: int, holder: str) -> None:
        with suppress(OSError):  # another user's file, open for reading only
            os.ftruncate(gate, 0)
            os.pwrite(gate, holder.encode(), 0)

    @contextmanager
    def _opened(self) -> Iterator[_Files]:
        gate = _open(self._gate)
        shared = _open(self._shared)
        try:
            yield _Files(gate, shared)
        finally:
            for descriptor in (shared, gate):
                # Not by closing alone: a child forked meanwhile holds a copy of the descriptor, and with it the lock.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
                os.close(descriptor)

    def _share(self, files: _Files, wait: bool = True) -> None:
        try:
            if wait:
                self._pass(files.gate)
            else:
                fcntl.flock(files.gate, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(files.shared, fcntl.LOCK_SH)
        finally:
            fcntl.flock(files.gate, fcntl.LOCK_UN)

    def _pass(self, gate: int) -> None:
        try:
            fcntl.flock(gate, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(gate, 32, 0).decode(errors="replace").strip()
            if holder and not self._said:  # else it is somebody on the way through
                self._said = True
                log.info("waiting for another process to have timed (%s names it)", self._gate)
            fcntl.flock(gate, fcntl.LOCK_EX)

    def _until_alone(self, shared: int) -> None:
        deadline = time.monotonic() + self._patience
        while True:
            try:
                fcntl.flock(shared, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    said = "a process has computed for %g s without a pause, or was stopped; timing begins beside it."
                    log.warning(said, self._patience)
                    return
                time.sleep(POLL)


def _open(path: Path) -> int:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        # Without O_CREAT first: in a sticky folder such as /tmp Linux refuses O_CREAT on another user's file.
        return os.open(path, os.O_RDWR | flags)
    except PermissionError:
        return os.open(path, os.O_RDONLY | flags)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
        with suppress(PermissionError):  # another process has just made it
            os.fchmod(descriptor, 0o666)  # for other users, whatever the umask
        return descriptor


# One for the whole machine, whatever TMPDIR is.
MACHINE = MachineLock(Path("/tmp") if Path("/tmp").is_dir() else Path(tempfile.gettempdir()))
computing, released, timing = MACHINE.computing, MACHINE.released, MACHINE.timing
