"""Several jobs of a sweep at a time, begun by a launcher that thinks of one job at a time.

Hydra's own launcher composes a job, calls the task function and waits for it. Between `at_a_time`, the task function
hands its job to `add`, which returns as soon as it may be followed by another; the results come later. There are no
threads: whoever waits, in `add` or at the end, handles what all jobs that run have to say. The machine's lock has them
share the machine, and whoever times have it alone; what is done here between two waits holds that lock too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from typing import Any

from hydra.core.utils import JobReturn, JobStatus

from qexp.launch import job_process
from qexp.launch.job_process import Begun
from qexp.system import machine_lock

# A run around its job: it yields the process that it has begun, and is sent what that gives, or thrown what it raises.
Work = Generator[Begun, Any, Any]

POLL_SECONDS = 0.05  # between two looks at whether a process that times has done so


class Jobs:
    """The jobs of a sweep, `count` of which run at a time."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._running: dict[Begun, tuple[int, Work]] = {}
        self._ended: dict[int, Any] = {}
        self._computing = contextlib.ExitStack()

    def add(self, number: int, work: Work) -> None:
        """Begin a job once fewer than `count` run; what it raises before its process has begun is raised here."""
        ended = self._first_ended() if len(self._running) >= self._count else None
        try:
            self._running[next(work)] = number, work
        finally:
            if ended is not None:
                self._conclude(ended)  # no sooner than the next has begun

    def finish(self) -> None:
        """Wait for all of them."""
        while self._running:
            self._conclude(self._first_ended())
        self._computing.close()

    def stop(self, error: BaseException) -> None:
        """End all of them, as if each had raised `error`."""
        self._computing.close()
        for begun in self._running:
            begun.terminate()
        while self._running:
            _, (_, work) = self._running.popitem()
            with contextlib.suppress(BaseException):
                work.throw(error)

    def complete(self, number: int, returned: JobReturn) -> None:
        """Put what a job gave or raised into what the launcher returned for it."""
        if number in self._ended:
            found = self._ended[number]
            returned.status = JobStatus.FAILED if isinstance(found, Exception) else JobStatus.COMPLETED
            returned.return_value = found

    def _first_ended(self) -> Begun:
        self._computing.close()
        running = list(self._running)
        while True:
            job_process.listen(running)
            try:
                self._computing.enter_context(machine_lock.computing(wait=False))
                return next(begun for begun in running if begun.ended)
            except BlockingIOError:  # one of them may be the one that times
                job_process.listen([begun for begun in running if not begun.ended], POLL_SECONDS)

    def _conclude(self, begun: Begun) -> None:
        number, work = self._running[begun]
        try:
            self._ended[number] = conclude(work, begun)
        except Exception as error:
            self._ended[number] = error
        del self._running[begun]


# Those of the sweep that this process runs, where several run at a time.
_jobs: Jobs | None = None


@contextlib.contextmanager
def at_a_time(count: int) -> Iterator[Jobs]:
    """Meanwhile `perform` begins up to `count` jobs at a time, all of which have ended in the end; an exception ends
    them."""
    global _jobs
    found = Jobs(count)
    _jobs = found if count > 1 else None
    try:
        yield found
        found.finish()
    except BaseException as error:
        found.stop(error)
        raise
    finally:
        _jobs = None


def perform(number: int, work: Work) -> Any:
    """What a job gives, or None where others run beside it; it is known then when `at_a_time` ends.

    number: among those of the sweep.
    """
    if _jobs is not None:
        return _jobs.add(number, work)
    with contextlib.closing(work):  # where this is stopped, the run is, too
        begun = next(work)
        job_process.listen([begun])
        with machine_lock.computing():
            return conclude(work, begun)


def conclude(work: Work, begun: Begun) -> Any:
    """What a run gives whose job has ended, or what it raises."""
    with begun.own_logging():
        try:
            try:
                outcome = begun.outcome()
            except BaseException as error:
                work.throw(error)
            else:
                work.send(outcome)
        except StopIteration as stop:
            return stop.value
    raise AssertionError("a run has one job")
