"""Several jobs of a sweep at a time, started by a launcher that knows of one job at a time.

Hydra's own launcher composes a job, calls the task function and waits for it. Within `at_a_time`, the task function
passes its job to `add`, which returns as soon as another job may follow; the results come later. There are no threads:
`add`, and `finish` at the end, handle the messages of all running jobs. The machine's lock has jobs share the machine,
and one that times have it alone; what this process does between two waits holds that lock too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from typing import Any

from hydra.core.utils import JobReturn, JobStatus

from qexp.launch import job_process
from qexp.launch.job_process import JobProcess
from qexp.system import machine_lock

# An MLflow run around a job: yields the process that it has started, and is sent that job's result or thrown its error.
TrackedJob = Generator[JobProcess, Any, Any]

POLL_SECONDS = 0.05  # between two looks at whether a process still times


class RunningJobs:
    """The jobs of a sweep, `count` of which run at a time."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._running: dict[JobProcess, tuple[int, TrackedJob]] = {}
        self._ended: dict[int, Any] = {}
        self._computing = contextlib.ExitStack()

    def add(self, number: int, tracked: TrackedJob) -> None:
        """Start a job once fewer than `count` run. Raises what it raises before its process has started."""
        ended = self._first_ended() if len(self._running) >= self._count else None
        try:
            self._running[next(tracked)] = number, tracked
        finally:
            if ended is not None:
                self._conclude(ended)  # only once the next has started

    def finish(self) -> None:
        """Wait for all jobs to end."""
        while self._running:
            self._conclude(self._first_ended())
        self._computing.close()

    def stop(self, error: BaseException) -> None:
        """End all jobs, as if each had raised `error`."""
        self._computing.close()
        for job in self._running:
            job.terminate()
        while self._running:
            _, (_, tracked) = self._running.popitem()
            with contextlib.suppress(BaseException):
                tracked.throw(error)

    def complete(self, number: int, returned: JobReturn) -> None:
        """Put a job's objective or error into what the launcher returned for it."""
        if number in self._ended:
            found = self._ended[number]
            returned.status = JobStatus.FAILED if isinstance(found, Exception) else JobStatus.COMPLETED
            returned.return_value = found

    def _first_ended(self) -> JobProcess:
        self._computing.close()
        running = list(self._running)
        while True:
            job_process.listen(running)
            try:
                self._computing.enter_context(machine_lock.computing(wait=False))
                return next(job for job in running if job.ended)
            except BlockingIOError:  # one of them may be the one that times
                job_process.listen([job for job in running if not job.ended], POLL_SECONDS)

    def _conclude(self, job: JobProcess) -> None:
        number, tracked = self._running[job]
        try:
            self._ended[number] = conclude(tracked, job)
        except Exception as error:
            self._ended[number] = error
        del self._running[job]


# Set where this process runs several jobs of a sweep at a time.
_jobs: RunningJobs | None = None


@contextlib.contextmanager
def at_a_time(count: int) -> Iterator[RunningJobs]:
    """Let `perform` run up to `count` jobs at a time within the context, which waits for all of them at its end.

    An exception ends them all.
    """
    global _jobs
    found = RunningJobs(count)
    _jobs = found if count > 1 else None
    try:
        yield found
        found.finish()
    except BaseException as error:
        found.stop(error)
        raise
    finally:
        _jobs = None


def perform(number: int, tracked: TrackedJob) -> Any:
    """Run a job and return its result; within `at_a_time`, start it and return None, since the result comes later.

    number: of the job in its sweep.
    """
    if _jobs is not None:
        return _jobs.add(number, tracked)
    with contextlib.closing(tracked):  # where this is stopped, so is the run
        job = next(tracked)
        job_process.listen([job])
        with machine_lock.computing():
            return conclude(tracked, job)


def conclude(tracked: TrackedJob, job: JobProcess) -> Any:
    """Return the result of a run whose job has ended, or raise its error."""
    with job.own_logging():
        try:
            try:
                outcome = job.outcome()
            except BaseException as error:
                tracked.throw(error)
            else:
                tracked.send(outcome)
        except StopIteration as stop:
            return stop.value
    raise AssertionError("a run has one job")
