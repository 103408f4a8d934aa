"""The machine's lock: shared by every process that computes, held alone by one that times.

    with machine_lock.computing():      # a job; each batch within it is a slice, marked by another `computing()`
        with machine_lock.released():   # while it waits for something else, such as another process's lock
    with machine_lock.timing():         # no other process computes meanwhile

One lock for all users of the machine, made of two files and the system's `flock`, which is released when a process
ends, killed or not. To compute, a process holds the first file (the gate) for a moment and then shares the second. To
time, it keeps the gate locked, so that it has the second to itself as soon as the slices that have started are over.
Both kinds queue at the gate, so neither can keep the other out.
"""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qexp.system import machine

log = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds that timing waits for a slice to end
POLL = 0.005  # seconds between two attempts


@dataclass(frozen=True)
class _Files:
    """Descriptors of the two open files."""

    gate: int
    shared: int


class _Held(threading.local):
    """The state of one thread. files: open while it computes, else None; alone: True while it times; waited: the
    seconds for which it has waited so far."""

    files: _Files | None = None
    alone: bool = False
    waited: float = 0.0


class MachineLock:
    """A lock of the files `qexp-machine.gate` and `qexp-machine.lock` in `folder`, which are made where missing.

    patience: seconds after which timing stops waiting for a process that neither ends its slice nor dies, such as one
    that was suspended by Ctrl-Z.
    """

    def __init__(self, folder: Path, patience: float = PATIENCE) -> None:
        self._gate, self._shared, self._patience = folder / "qexp-machine.gate", folder / "qexp-machine.lock", patience
        self._held, self._logged = _Held(), False
        os.register_at_fork(after_in_child=self._forget)  # a child holds none of its parent's locks

    def _forget(self) -> None:
        self._held = _Held()

    @contextmanager
    def computing(self, wait: bool = True) -> Iterator[None]:
        """Share the machine with other processes that compute.

        Within another `computing` of the thread this starts a new slice: a process that waits to time does so first.
        Within `timing` it does nothing. wait: False to raise BlockingIOError where the gate is locked; a slice within
        another always waits.
        """
        if self._held.alone:
            yield
        elif self._held.files is not None:
            fcntl.flock(self._held.files.shared, fcntl.LOCK_UN)
            self._share(self._held.files)
            yield
        else:
            with self._opened() as files:
                self._share(files, wait)
                self._held.files = files
                try:
                    yield
                finally:
                    self._held.files = None

    @contextmanager
    def released(self) -> Iterator[None]:
        """Release the lock within the context, if the thread holds it for computing.

        Needed around any wait for another process, which may itself be waiting for one that times.
        """
        files = self._held.files
        if files is None:
            yield
            return
        self._held.files = None
        fcntl.flock(files.shared, fcntl.LOCK_UN)
        try:
            yield
        except Exception:
            self._take_back(files)
            raise
        self._take_back(files)  # not on KeyboardInterrupt and the like: a process that is being ended can't wait

    def _take_back(self, files: _Files) -> None:
        self._share(files)
        self._held.files = files

    @contextmanager
    def wait_share(self) -> Iterator[Callable[[], float]]:
        """Yield a function that returns the share of the time since then for which this thread has waited here."""
        started, before = time.monotonic(), self._held.waited
        yield lambda: (self._held.waited - before) / max(time.monotonic() - started, 1e-9)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self._held.waited += time.monotonic() - started

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Have the machine alone: no other process that uses this lock computes or times meanwhile."""
        with self.released(), self._opened() as files:
            with self._waiting():
                self._pass(files.gate)
                self._sign(files.gate, machine.this_process())
                self._until_alone(files.shared)
            self._held.alone = True
            try:
                yield
            finally:
                self._held.alone = False
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
                # Closing is not enough: a child forked meanwhile has a copy of the descriptor, and with it the lock.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
                os.close(descriptor)

    def _share(self, files: _Files, wait: bool = True) -> None:
        with self._waiting():
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
            holder = os.pread(gate, 300, 0).decode(errors="replace").strip()
            if holder and not self._logged:  # else a process is only passing the gate
                self._logged = True
                log.info("waiting until %s has timed", holder)
            fcntl.flock(gate, fcntl.LOCK_EX)

    def _until_alone(self, shared: int) -> None:
        deadline = time.monotonic() + self._patience
        while True:
            try:
                fcntl.flock(shared, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    message = (
                        "a process has computed for %g s without a pause, or was stopped; timing begins beside it."
                    )
                    log.warning(message, self._patience)
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
        with suppress(PermissionError):  # another process has just created it
            os.fchmod(descriptor, 0o666)  # for other users, whatever the umask
        return descriptor


# The same for all processes of the machine, whatever TMPDIR is.
MACHINE = MachineLock(Path("/tmp") if Path("/tmp").is_dir() else Path(tempfile.gettempdir()))
computing, released, timing, wait_share = MACHINE.computing, MACHINE.released, MACHINE.timing, MACHINE.wait_share
