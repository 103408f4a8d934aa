"""The machine's lock: shared for computing, exclusive for timing, fair to both, released when a process ends."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from qexp.system import machine_lock
from qexp.system.machine import boot, host
from qexp.system.machine_lock import MachineLock

HOLD = """
import sys
from pathlib import Path
from qexp.system.machine_lock import MachineLock
with getattr(MachineLock(Path(sys.argv[1])), sys.argv[2])():
    print("held", flush=True)
    sys.stdin.read()
"""
# Computes in slices of a hundredth of a second, and says when each began and ended, until its input is closed.
SLICES = """
import sys, threading, time
from pathlib import Path
from qexp.system.machine_lock import MachineLock
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set())).start()
machine, found = MachineLock(Path(sys.argv[1])), []
print("started", flush=True)
with machine.computing():
    while not ended.is_set():
        with machine.computing():
            began = time.monotonic()
            time.sleep(0.01)
            found.append(f"{began} {time.monotonic()}")
print(*found, sep="\\n")
"""
# Waits for the lock; says that it was interrupted, and if so whether it has as many open files as before.
INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from qexp.system.machine_lock import MachineLock
def interrupt(number, frame):
    raise InterruptedError
signal.signal(signal.SIGTERM, interrupt)
before = len(os.listdir("/proc/self/fd"))
try:
    print("waiting", flush=True)
    with getattr(MachineLock(Path(sys.argv[1])), sys.argv[2])():
        print("held")
except InterruptedError:
    print("interrupted")
print(len(os.listdir("/proc/self/fd")) == before)
"""


@contextmanager
def another_process(program: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A process that runs `program` and has printed its first line."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def is_free(path: Path, operation: int = fcntl.LOCK_EX) -> bool:
    """True if the file can be locked with these flags."""
    with path.open() as file:
        try:
            fcntl.flock(file, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def gate(folder: Path) -> Path:
    return folder / "qexp-machine.gate"


def shared(folder: Path) -> Path:
    return folder / "qexp-machine.lock"


def test_computing_is_shared_and_timing_is_not(tmp_path: Path) -> None:
    machine = MachineLock(tmp_path / "folder")
    with machine.computing(), another_process(HOLD, tmp_path / "folder", "computing"):
        assert is_free(shared(tmp_path / "folder"), fcntl.LOCK_SH)
        assert not is_free(shared(tmp_path / "folder"))
        assert is_free(gate(tmp_path / "folder"))
    with machine.timing():
        assert not is_free(shared(tmp_path / "folder"), fcntl.LOCK_SH)
        assert not is_free(gate(tmp_path / "folder"))
    assert is_free(shared(tmp_path / "folder"))
    assert is_free(gate(tmp_path / "folder"))


def test_whoever_times_waits_for_the_slices_started_and_nobody_computes_meanwhile(tmp_path: Path) -> None:
    """Two processes and a pool of threads compute without a pause."""
    machine, ended, mine = MachineLock(tmp_path), threading.Event(), []

    def work(_: int) -> None:
        while not ended.is_set():
            with machine.computing():
                began = time.monotonic()
                time.sleep(0.01)
                mine.append((began, time.monotonic()))

    timed = []
    with another_process(SLICES, tmp_path) as one, another_process(SLICES, tmp_path) as other:
        with ThreadPoolExecutor(2) as pool:
            computing = [pool.submit(work, number) for number in range(2)]
            for _ in range(5):
                asked = time.monotonic()
                with machine.timing():
                    began = time.monotonic()
                    time.sleep(0.05)
                    timed.append((asked, began, time.monotonic()))
                patience = time.monotonic() + 60
                while not any(began > timed[-1][2] for began, _ in list(mine)):
                    assert time.monotonic() < patience, "nobody computes after the timing"
                    time.sleep(0.01)
            ended.set()
            for future in computing:
                future.result()
        slices = list(mine)
        for process in (one, other):
            found = process.communicate()[0].split()
            slices += [(float(began), float(until)) for began, until in zip(found[::2], found[1::2], strict=True)]
    for asked, began, until in timed:
        # A second of slices of each of the four at the most.
        assert len([one for one in slices if asked < one[0] < began]) < 4 * 1 / 0.01
        assert not [one for one in slices if one[1] > began and one[0] < until]


def test_who_computes_gets_in_between_those_who_time_without_a_pause(tmp_path: Path) -> None:
    machine, ended, timed = MachineLock(tmp_path), threading.Event(), []

    def time_on() -> None:
        while not ended.is_set():
            with machine.timing():
                time.sleep(0.02)
                timed.append(time.monotonic())

    with ThreadPoolExecutor(2) as pool:
        timing = [pool.submit(time_on) for _ in range(2)]
        waited = []
        for _ in range(10):
            before = len(timed)
            with machine.computing():
                waited.append(len(timed) - before)
        ended.set()
        for future in timing:
            future.result()
    assert timed
    assert max(waited) < 2 / 0.02  # two seconds of timings


def test_a_slice_within_another_lets_the_clock_in_and_one_within_timing_is_none(tmp_path: Path) -> None:
    machine, order = MachineLock(tmp_path), []

    def measure() -> None:
        with machine.timing():
            order.append("timed")

    with machine.computing():
        thread = threading.Thread(target=measure)
        thread.start()
        while is_free(gate(tmp_path)):
            time.sleep(0.001)
        order.append("first slice")
        with machine.computing():
            order.append("second slice")
    thread.join()
    assert order == ["first slice", "timed", "second slice"]
    with machine.timing(), machine.computing(), machine.released():
        assert not is_free(shared(tmp_path), fcntl.LOCK_SH)
    with machine.computing():
        with machine.timing():
            assert not is_free(shared(tmp_path), fcntl.LOCK_SH)
        assert is_free(shared(tmp_path), fcntl.LOCK_SH)
        assert not is_free(shared(tmp_path))


def test_the_share_of_time_that_a_process_waits_is_told(tmp_path: Path) -> None:
    """It waits while another times for 0.4 s, and computes for as long; what it times by itself is no wait."""
    machine = MachineLock(tmp_path)
    with another_process(HOLD, tmp_path, "timing") as other, machine.wait_share() as share:
        threading.Timer(0.4, other.kill).start()
        with machine.computing():
            assert share() > 0.9
            time.sleep(0.4)
            assert 0.35 < share() < 0.65
        with machine.timing():
            time.sleep(0.4)
        assert 0.2 < share() < 0.45


def test_what_waits_for_something_else_holds_nothing(tmp_path: Path) -> None:
    machine = MachineLock(tmp_path)
    with machine.released():
        pass
    with machine.computing():
        with machine.released():
            assert is_free(shared(tmp_path))
            with machine.computing():
                assert not is_free(shared(tmp_path))
            assert is_free(shared(tmp_path))
        assert not is_free(shared(tmp_path))
        with pytest.raises(KeyError), machine.released():
            raise KeyError
        assert not is_free(shared(tmp_path))
    assert is_free(shared(tmp_path))


@pytest.mark.parametrize("way", ["computing", "timing"])
def test_the_lock_survives_its_killed_holder(tmp_path: Path, way: str) -> None:
    with another_process(HOLD, tmp_path, way) as holder:
        assert not is_free(shared(tmp_path))
        holder.send_signal(signal.SIGKILL)
        assert holder.wait(timeout=60) == -signal.SIGKILL
        with MachineLock(tmp_path).timing():
            assert shared(tmp_path).exists()


def test_it_is_said_once_that_another_process_times(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=machine_lock.log.name)
    machine, signed = MachineLock(tmp_path), []
    for way in ("timing", "timing", "computing"):
        with another_process(HOLD, tmp_path, way) as holder:
            if way == "timing":
                signature = gate(tmp_path).read_text()
                assert signature == f"process {holder.pid} on {host()}, boot {boot()[:8]}"
                signed.append(signature)
                with pytest.raises(BlockingIOError), machine.computing(wait=False):
                    pytest.fail("somebody times")
                threading.Timer(0.2, holder.kill).start()
            with machine.computing():
                pass
    assert [record.getMessage() for record in caplog.records] == [f"waiting until {signed[0]} has timed"]


def test_who_was_stopped_while_it_computes_does_not_keep_the_clock_waiting_for_ever(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with another_process(HOLD, tmp_path, "computing") as holder:
        holder.send_signal(signal.SIGSTOP)
        with MachineLock(tmp_path, patience=0.1).timing():
            assert not is_free(gate(tmp_path))
    assert "timing begins beside it" in caplog.text


@pytest.mark.parametrize("way", ["computing", "timing"])
def test_the_lock_is_free_after_an_error(tmp_path: Path, way: str) -> None:
    machine = MachineLock(tmp_path)
    hold: AbstractContextManager[None] = getattr(machine, way)()
    with pytest.raises(KeyError), hold:
        raise KeyError
    assert is_free(shared(tmp_path))
    assert is_free(gate(tmp_path))
    with machine.timing():
        pass


@pytest.mark.parametrize("way", ["computing", "timing"])
def test_a_signal_ends_the_wait(tmp_path: Path, way: str) -> None:
    """The exception of a signal's handler leaves the wait and releases the lock."""
    with (
        another_process(HOLD, tmp_path, "timing"),
        another_process(INTERRUPTED, tmp_path, way) as waiting,
    ):
        time.sleep(0.1)  # so that it most likely waits; it must end by the signal in any case
        waiting.send_signal(signal.SIGTERM)
        assert waiting.stdout is not None
        assert waiting.stdout.read() == "interrupted\nTrue\n"
    assert is_free(gate(tmp_path))
    assert is_free(shared(tmp_path))


def test_files_that_cannot_be_written_lock_all_the_same(tmp_path: Path) -> None:
    for path in (gate(tmp_path), shared(tmp_path)):
        path.touch()
        path.chmod(0o444)
    with MachineLock(tmp_path).timing():
        assert not is_free(shared(tmp_path))
        assert not is_free(gate(tmp_path))
    assert is_free(shared(tmp_path))


def test_files_are_for_all_users_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        with MachineLock(tmp_path).timing():
            pass
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (gate(tmp_path), shared(tmp_path))] == [0o666, 0o666]


@pytest.mark.parametrize("way", ["computing", "timing"])
def test_a_child_that_was_forked_meanwhile_does_not_keep_the_lock(tmp_path: Path, way: str) -> None:
    machine = MachineLock(tmp_path)
    with getattr(machine, way)():
        child = os.fork()
        if child == 0:
            signal.pause()
    try:
        assert is_free(shared(tmp_path))
        assert is_free(gate(tmp_path))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_one_lock_for_the_machine_whatever_the_folder_for_temporary_files_is(tmp_path: Path) -> None:
    code = "from qexp.system import machine_lock; print(machine_lock.MACHINE._gate)"
    said = [
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
        for env in ({**os.environ}, {**os.environ, "TMPDIR": str(tmp_path)})
    ]
    assert said == [f"{machine_lock.MACHINE._gate}\n"] * 2
