"""A job in a process of its own: a crash, memory that runs out or an endless loop ends that job alone, and nothing
leaks from one job into the next.

Jobs are forked from a server process that has imported torch (qexp/launch/fork_preload.py), in some hundredths of a
second. Every process that runs jobs has one such server, multiprocessing's `forkserver`. Linux ends a server with its
owner, and a job with its server, whatever ends them. torch is not imported here.

`begin` starts a job, `listen` handles what any number of them say until one has ended, `outcome` is what it gave or
raised; `run` is all three.
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
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from qexp import errors
from qexp.config.schema import Config
from qexp.launch import progress
from qexp.records import Result
from qexp.system import console, credentials, processes

SERVER = "qexp.launch.fork_preload"
GRACE_SECONDS = 3.0  # how long a job that is told to end may take to clean up
STANDARD_STREAMS = (0, 1, 2)
CRASH = "crash.txt"  # in a job's folder: where its code was when a signal such as SIGSEGV ended it
CRASHES = ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT")

_context = multiprocessing.get_context("forkserver")
_warned: set[str] = set()
# The terminal's lines that the bars of jobs take, counted from the owner's own.
_lines: set[int] = set()


class Elsewhere(Exception):
    """An error as it was printed in another process."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class _Foreign(Exception):
    """An error whose class is of code that need not be imported here: subclasses have its module and name."""

    def __reduce__(self) -> tuple[Callable[..., Exception], tuple[str, ...]]:
        return foreign, (type(self).__module__, type(self).__name__, str(self))


def foreign(module: str, kind: str, message: str) -> Exception:
    """An error of the class `module`.`kind`, which is known by its name alone."""
    made: type[Exception] = type(kind, (_Foreign,), {"__module__": module})
    return made(message)


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
        trace = errors.without_values("".join(traceback.format_exception(error)))
        if isinstance(error, _Terminated):
            return refused("the job's process was ended by SIGTERM.", trace)
        # Of a subclass that code elsewhere made of one of ours, the nearest that is ours.
        kind = next((kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__), type(error))
        ours = kind.__module__ == errors.__name__
        return Failure(kind.__module__, kind.__name__, str(error) if ours else errors.without_values(str(error)), trace)

    def error(self) -> Exception:
        """The same error to be raised here, caused by the one there: ours as what they are, others by their names."""
        ours = self.module == errors.__name__
        error = getattr(errors, self.kind)(self.message) if ours else foreign(self.module, self.kind, self.message)
        error.__cause__ = Elsewhere(self.trace) if self.trace else None
        return error


def refused(sentence: str, trace: str = "") -> Failure:
    """A failure as RunError."""
    return Failure(errors.__name__, errors.RunError.__name__, sentence, trace)


@dataclass(frozen=True)
class Task:
    """What a job's process is told. function: of `experiment`, with its arguments; folder: what is known of a crash is
    put there; environment: its environment variables; levels: of loggers, by name; line: of the terminal, for its bars,
    counted from the owner's own."""

    function: str
    arguments: tuple[Any, ...]
    folder: Path
    environment: dict[str, str]
    cwd: Path
    levels: dict[str, int]
    line: int


@dataclass(eq=False)
class Begun:
    """A job's process, and the connection to it.

    timeout: `job.timeout`; handlers, level: of the root logger when it was begun, for what the job logs; ended: whether
    it has, with `answer`: what it gives, a Failure where it fails.
    """

    task: Task
    process: ForkServerProcess
    channel: Connection
    timeout: float | None
    handlers: list[logging.Handler]
    level: int
    deadline: float = math.inf
    ended: bool = False
    answer: Any = None

    @contextlib.contextmanager
    def own_logging(self) -> Iterator[None]:
        """Whatever is logged meanwhile goes where the logs of this job go, whichever job came after it."""
        root = logging.root
        before, root.handlers = (root.handlers, root.level), self.handlers
        root.setLevel(self.level)
        try:
            yield
        finally:
            root.handlers = before[0]
            root.setLevel(before[1])
            # Hydra closes them when it composes the next job, and a file opens again with the next line.
            for handler in self.handlers:
                if handler not in root.handlers:
                    handler.close()

    def hear(self) -> None:
        """Handle what it says next, or its end."""
        try:
            said = self.channel.recv()
        except (EOFError, OSError):
            self.answered(self.died())
            return
        if isinstance(said, logging.LogRecord):
            with self.own_logging():
                _log(said)
        else:
            self.answered(said)

    def answered(self, answer: Any) -> None:
        self.ended, self.answer = True, answer

    def died(self) -> Failure:
        """What happened to a job that said nothing of its end."""
        self.process.join()
        crash = self.task.folder / CRASH
        where = crash.read_text(errors="replace") if crash.exists() else ""
        return refused(ending(self.process.exitcode or 0), where)

    def terminate(self) -> None:
        """Tell the process to end; `end` waits for it."""
        if not self.channel.closed:
            self.process.terminate()

    def time_out(self) -> None:
        """End a job that has taken too long."""
        self.process.terminate()
        until = time.monotonic() + GRACE_SECONDS
        while not self.ended and self.channel.poll(max(0.0, until - time.monotonic())):
            self.hear()
        where = self.answer.trace if isinstance(self.answer, Failure) else ""
        after = f"{self.timeout:g}"
        self.answered(refused(f"job.timeout={after}: the job was not done after {after} s, and was ended.", where))

    def outcome(self) -> Any:
        """What the job gave; raises what it raised, with its traceback as the cause, and RunError where its process
        ended otherwise or took longer than `job.timeout`. Waits until it has ended."""
        try:
            listen([self])
            self.process.join(GRACE_SECONDS)
        finally:
            self.end()
        if isinstance(self.answer, Failure):
            raise self.answer.error()
        return self.answer

    def end(self) -> None:
        """End the process, if it hasn't, and let go of all that it had."""
        if self.channel.closed:
            return
        _end(self.process)
        self.channel.close()
        _lines.discard(self.task.line)
        with contextlib.suppress(OSError):
            (self.task.folder / CRASH).unlink(missing_ok=True)


def start_server() -> None:
    """Start the process that jobs are forked from, unless there is one; other work can be done until it is ready.

    Raises InputError where there is no folder for temporary files.
    """
    processes.prepare_temporary_folder()
    _context.set_forkserver_preload([SERVER])
    # For Python before 3.13, whose server hears of no other path.
    with _environment(PYTHONPATH=processes.python_path()):
        forkserver.ensure_running()


def run(config: Config, folder: Path) -> Result:
    """`run_experiment` in a process of its own, with this one's environment, working folder and import path; its log
    records and warnings are handled here. Raises as `Begun.outcome`."""
    result: Result = begin(config, folder).outcome()
    return result


def begin(config: Config, folder: Path) -> Begun:
    """Start the process of a job (see `run`), whose result is `outcome`. Raises RunError where none can be started."""
    line = min(set(range(1, len(_lines) + 2)) - _lines) if progress.shown() else 0
    return _begin("run_experiment", (config, folder), folder, config.job.timeout, line)


def listen(jobs: Sequence[Begun], seconds: float = math.inf) -> None:
    """Handle what these jobs say until one of them has ended, or for so many seconds; end those that take too long."""
    until = time.monotonic() + seconds
    while not any(job.ended for job in jobs):
        left = min([until, *(job.deadline for job in jobs)]) - time.monotonic()
        waited_for = [one for job in jobs for one in (job.channel, job.process.sentinel)]
        ready = connection.wait(waited_for, min(max(left, 0.0), 3600.0))
        for job in jobs:
            if job.channel in ready:
                job.hear()
            elif job.process.sentinel in ready:
                job.answered(job.died())
            elif time.monotonic() > job.deadline:
                job.time_out()
        if time.monotonic() > until:
            return


def check_inputs(configs: Sequence[Config]) -> None:
    """`experiment.check_inputs` in a process of its own, as `run`."""
    _call("check_inputs", configs)


def provenance_tags(configs: Sequence[Config]) -> list[dict[str, str]]:
    """`input_checks.provenance_tags` in a process of its own, as `run`."""
    found: list[dict[str, str]] = _call("provenance_tags", configs)
    return found


def _call(function: str, *arguments: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return _begin(function, arguments, Path(folder)).outcome()


def _begin(
    function: str, arguments: tuple[Any, ...], folder: Path, timeout: float | None = None, line: int = 0
) -> Begun:
    task = Task(function, arguments, folder, dict(os.environ), Path.cwd(), _levels(), line)
    start_server()
    channel, other_end = _context.Pipe()
    with _standard_streams() as streams:
        process = _context.Process(target=_work, args=(other_end, streams), name="qexp job")
        begun = Begun(task, process, channel, timeout, list(logging.root.handlers), logging.root.level)
        try:
            with other_end:
                _start(process)
            # Not an argument: if Ctrl-C comes first, the process finds nobody at the other end, and ends.
            with contextlib.suppress(BrokenPipeError):
                channel.send(task)
        except BaseException:
            begun.end()
            raise
    _lines.add(line)
    begun.deadline = time.monotonic() + (math.inf if timeout is None else timeout)
    return begun


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
        with _known_start_method():
            process.start()
    except (OSError, EOFError) as error:
        raise errors.RunError(f"the process that jobs are forked from has ended ({type(error).__name__}).") from error


@contextlib.contextmanager
def _known_start_method() -> Iterator[None]:
    """Every process tells those that it starts how they start others in turn. In a worker of joblib's that is `loky`,
    which a process that has not imported joblib takes for an error: then it is told the system's default."""
    method, known = multiprocessing.get_start_method(allow_none=True), multiprocessing.get_all_start_methods()
    if method is None or method in known:
        yield
        return
    multiprocessing.set_start_method(known[0], force=True)
    try:
        yield
    finally:
        multiprocessing.set_start_method(method, force=True)


def _log(record: logging.LogRecord) -> None:
    """Handle a record of a job here. Warnings are shown once a text, as Python does it within one process."""
    if record.name != "py.warnings":
        logging.getLogger(record.name).handle(record)
    elif record.getMessage() not in _warned:
        _warned.add(record.getMessage())
        print(record.getMessage().rstrip(), file=sys.stderr)


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

    def say(self, what: object) -> None:
        """Send something else than a record; that of another thread must not come between."""
        self.acquire()
        try:
            cast(Connection, self.queue).send(what)
        finally:
            self.release()


def _work(channel: Connection, streams: list[Connection]) -> None:
    """What a job's process does."""
    processes.end_with_parent()
    processes.ignore_terminal()
    try:
        task: Task = channel.recv()
    except EOFError:  # the owner was stopped
        return
    owner = multiprocessing.parent_process()
    if owner is None or not owner.is_alive():  # it ended before Linux was told what to do then
        return
    os.environ.clear()
    os.environ.update(task.environment)
    for number, stream in zip(STANDARD_STREAMS, streams, strict=True):
        os.dup2(stream.fileno(), number)
    console.protect()
    credentials.learn_environment()
    credentials.learn(task.arguments)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  (for a debugger in a user's model)
    tqdm.set_lock(threading.RLock())  # its own holds a semaphore, which a killed process would leave to the system
    # They take the terminal's first lines, so that bars are drawn below the owner's, and those of the job before.
    lines = [tqdm(file=Path(os.devnull).open("w")) for _ in range(task.line)]  # noqa: SIM115, F841
    records = _Sender(channel)  # type: ignore[arg-type]
    _configure_logging(records, task.levels)
    with (task.folder / CRASH).open("w") as crash:
        faulthandler.enable(crash)
        answer = _do(task)
        faulthandler.disable()
    records.say(answer)


def _do(task: Task) -> Any:
    """What the function gives, a Failure where it fails."""
    try:
        signal.signal(signal.SIGTERM, _terminate)
        from qexp.pipeline.input_checks import check_inputs, provenance_tags
        from qexp.pipeline.run import run_experiment

        functions: dict[str, Callable[..., Any]] = {
            "run_experiment": run_experiment,
            "check_inputs": check_inputs,
            "provenance_tags": provenance_tags,
        }
        return functions[task.function](*task.arguments)
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
