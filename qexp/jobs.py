"""A job in a process of its own: a crash, memory that runs out or an endless loop ends that job alone, and nothing
leaks from one job into the next.

Jobs are forked from a server process that has imported torch (qexp/server.py), in some hundredths of a second. Every
process that runs jobs has one such server, multiprocessing's `forkserver`. Linux ends a server with its owner, and a
job with its server, whatever ends them. torch is not imported here.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import logging.handlers
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from qexp import errors, processes, progress
from qexp.config import Config
from qexp.results import Result

SERVER = "qexp.server"
GRACE_SECONDS = 3.0  # how long a job that is told to end may take to clean up
STANDARD_STREAMS = (0, 1, 2)
CRASH = "crash.txt"  # in a job's folder: where its code was when a signal such as SIGSEGV ended it
CRASHES = ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT")

_context = multiprocessing.get_context("forkserver")
_warned: set[str] = set()


class Elsewhere(Exception):
    """An error as it was printed in another process."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class _Terminated(BaseException):
    """SIGTERM in a job's process: what is open is closed on the way out."""


@dataclass(frozen=True)
class Failure:
    """What a job raised: the module and name of its class, its text, and its traceback as text (perhaps empty)."""

    module: str
    kind: str
    message: str
    trace: str

    @staticmethod
    def of(error: BaseException) -> Failure:
        trace = "".join(traceback.format_exception(error))
        if isinstance(error, _Terminated):
            return refused("the job's process was ended by SIGTERM.", trace)
        return Failure(type(error).__module__, type(error).__name__, str(error), trace)

    def error(self) -> Exception:
        """The same error to be raised here, caused by the one there: ours as what they are, others by their names.

        Their own classes may be of code that is not imported here.
        """
        ours = self.module == errors.__name__
        kind = getattr(errors, self.kind) if ours else type(self.kind, (Exception,), {"__module__": self.module})
        error: Exception = kind(self.message)
        error.__cause__ = Elsewhere(self.trace) if self.trace else None
        return error


def refused(sentence: str, trace: str = "") -> Failure:
    """A failure as RunError."""
    return Failure(errors.__name__, errors.RunError.__name__, sentence, trace)


@dataclass(frozen=True)
class Order:
    """What a job's process is told. environment: its environment variables; levels: of loggers, by name; below: whether
    its bars are drawn below one of its owner's."""

    config: Config
    folder: Path
    environment: dict[str, str]
    levels: dict[str, int]
    below: bool


def start_server() -> None:
    """Start the process that jobs are forked from, unless there is one; other work can be done until it is ready."""
    _context.set_forkserver_preload([SERVER])
    # For Python before 3.13, whose server hears of no other path.
    with _environment(PYTHONPATH=processes.python_path()):
        forkserver.ensure_running()


def run(config: Config, folder: Path) -> Result:
    """`experiment.run_job` in a process of its own, with this one's environment, working folder and import path; its
    log records and warnings are handled here.

    Raises what it raised, with its traceback as the cause, and RunError where its process ended otherwise or took
    longer than `job.timeout`.
    """
    start_server()
    order = Order(config, folder, dict(os.environ), _levels(), progress.shown())
    channel, other_end = _context.Pipe()
    with channel, _standard_streams() as streams:
        process = _context.Process(target=_work, args=(other_end, streams), name="qexp job")
        try:
            with other_end:
                _start(process)
            # Not an argument: if Ctrl-C comes first, the process finds nobody at the other end, and ends.
            with contextlib.suppress(BrokenPipeError):  # it has ended already: what it ended with is said below
                channel.send(order)
            answer = _answer(process, channel, order)
            process.join(GRACE_SECONDS)
        finally:
            _end(process)
            (folder / CRASH).unlink(missing_ok=True)
    if isinstance(answer, Failure):
        raise answer.error()
    return answer


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Environment variables for as long as the context lasts."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _standard_streams() -> Iterator[list[Connection]]:
    """Standard input, output and error of this process as they are now, in a form that can be handed on."""
    with contextlib.ExitStack() as opened:
        yield [opened.enter_context(Connection(_copy(number))) for number in STANDARD_STREAMS]


def _copy(descriptor: int) -> int:
    try:
        return os.dup(descriptor)
    except OSError:  # it is closed
        return os.open(os.devnull, os.O_RDWR)


def _levels() -> dict[str, int]:
    """The levels that loggers have been given; the root's name is empty."""
    loggers = logging.root.manager.loggerDict.items()
    given = {name: logger.level for name, logger in loggers if isinstance(logger, logging.Logger) and logger.level}
    return {"": logging.root.level, **given}


def _start(process: ForkServerProcess) -> None:
    try:
        process.start()
    except (OSError, EOFError) as error:
        raise errors.RunError(f"the process that jobs are forked from has ended ({type(error).__name__}).") from error


def _answer(process: ForkServerProcess, channel: Connection, order: Order) -> Result | Failure:
    timeout = order.config.job.timeout
    answer = _listen(process, channel, order, timeout)
    if answer is not None:
        return answer
    process.terminate()
    last = _listen(process, channel, order, GRACE_SECONDS)
    where = last.trace if isinstance(last, Failure) else ""
    return refused(f"job.timeout={timeout:g}: the job was not done after {timeout:g} s, and was ended.", where)


def _listen(
    process: ForkServerProcess, channel: Connection, order: Order, seconds: float | None
) -> Result | Failure | None:
    """What the job gives or fails with, None where it does neither within `seconds`; what it logs is logged here."""
    deadline = time.monotonic() + (math.inf if seconds is None else seconds)
    while (left := deadline - time.monotonic()) > 0:
        ready = connection.wait([channel, process.sentinel], min(left, 3600.0))
        if channel in ready:
            try:
                said: Any = channel.recv()
            except (EOFError, OSError):
                return _died(process, order)
            if not isinstance(said, logging.LogRecord):
                return said
            _log(said)
        elif ready:
            return _died(process, order)
    return None


def _log(record: logging.LogRecord) -> None:
    """Handle a record of a job here. Warnings are shown once a text, as Python does it within one process."""
    if record.name != "py.warnings":
        logging.getLogger(record.name).handle(record)
    elif record.getMessage() not in _warned:
        _warned.add(record.getMessage())
        print(record.getMessage().rstrip(), file=sys.stderr)


def _died(process: ForkServerProcess, order: Order) -> Failure:
    process.join()
    crash = order.folder / CRASH
    where = crash.read_text(errors="replace") if crash.exists() else ""
    return refused(ending(process.exitcode or 0), where)


def ending(code: int) -> str:
    """What happened to a process that said nothing, in a sentence. code: exit status, or minus a signal's number."""
    if code >= 0:
        return f"the job's process ended with exit status {code} before the job was done."
    name = signal.Signals(-code).name
    if name == "SIGKILL":
        return (
            "the job's process was killed (SIGKILL), as Linux does when memory runs out; with less of it, "
            "evaluate.batch_size and calib.batch_size can be smaller."
        )
    return f"the job's process was ended by {name}{', a crash in compiled code' if name in CRASHES else ''}."


def _end(process: ForkServerProcess) -> None:
    """End the process, if it has been started and hasn't ended: SIGTERM, for it to clean up, and SIGKILL after that."""
    if process.is_alive():
        process.terminate()
        process.join(GRACE_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    process.close()


# --------------------------------------------------------------------------------------------- in the job's process


class _Sender(logging.handlers.QueueHandler):
    """Sends each record, its text complete, through a connection."""

    def enqueue(self, record: logging.LogRecord) -> None:
        cast(Connection, self.queue).send(record)


def _work(channel: Connection, streams: list[Connection]) -> None:
    """What a job's process does."""
    processes.end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        order: Order = channel.recv()
    except EOFError:  # the owner was stopped
        return
    owner = multiprocessing.parent_process()
    if owner is None or not owner.is_alive():  # it ended before Linux was told what to do then
        return
    os.environ.clear()
    os.environ.update(order.environment)
    for number, stream in zip(STANDARD_STREAMS, streams, strict=True):
        os.dup2(stream.fileno(), number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  (for a debugger in a user's model)
    tqdm.set_lock(threading.RLock())  # its own holds a semaphore, which a killed process would leave to the system
    # Takes the terminal's first line, so that bars are drawn below the owner's.
    first_line = tqdm(file=Path(os.devnull).open("w")) if order.below else None  # noqa: SIM115, F841
    records = _Sender(channel)  # type: ignore[arg-type]
    _configure_logging(records, order.levels)
    with (order.folder / CRASH).open("w") as crash:
        faulthandler.enable(crash)
        answer = _do(order)
        faulthandler.disable()
    records.acquire()  # another thread's record must not come between
    channel.send(answer)
    records.release()


def _do(order: Order) -> Result | Failure:
    try:
        signal.signal(signal.SIGTERM, _terminate)
        from qexp import experiment

        return experiment.run_job(order.config, order.folder)
    except BaseException as error:
        return Failure.of(error)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(number: int, frame: Any) -> None:
    raise _Terminated


def _configure_logging(handler: logging.Handler, levels: dict[str, int]) -> None:
    logging.root.handlers = [handler]
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.WARNING)
