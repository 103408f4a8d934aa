"""A job in a process of its own: a crash, memory that runs out or an endless loop ends that job alone, and nothing
leaks from one job into the next.

Jobs are forked, in some hundredths of a second, from a server process that has imported torch (`fork_preload`). Every
process that runs jobs has one such server, multiprocessing's `forkserver`. Linux ends a server with its owner, and a
job with its server, whatever ends them. torch is not imported here.

`start` starts a job's process, `listen` handles the messages of any number of them until one has ended, and
`JobProcess.outcome` returns or raises what the job did.
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
from qexp.config.schema import Config, RuntimeName
from qexp.launch import progress
from qexp.system import console, credentials, processes

SERVER, SERVER_PT2E = "qexp.launch.fork_preload", "qexp.launch.fork_preload_pt2e"
GRACE_SECONDS = 3.0  # how long a job that is told to end may take to clean up
STANDARD_STREAMS = (0, 1, 2)
CRASH = "crash.txt"  # in a job's folder: where its code was when a signal such as SIGSEGV ended it
CRASHES = ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT")

_context = multiprocessing.get_context("forkserver")
_warned: set[str] = set()
# The terminal's lines that jobs' bars take, counted from the owner's own.
_lines: set[int] = set()


class RemoteTraceback(Exception):
    """The traceback of an error in another process, as text: the cause of the error that is raised here."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class _NamedError(Exception):
    """Stands for an error of a class that need not be importable here; subclasses have that class's module and name."""

    def __reduce__(self) -> tuple[Callable[..., Exception], tuple[str, ...]]:
        return named_error, (type(self).__module__, type(self).__name__, str(self))


def named_error(module: str, kind: str, message: str) -> Exception:
    """An error that stands for one of the class `module`.`kind`, without importing it."""
    made: type[Exception] = type(kind, (_NamedError,), {"__module__": module})
    return made(message)


class _Terminated(BaseException):
    """SIGTERM in a job's process, as an exception, so that what is open is closed on the way out."""


@dataclass(frozen=True)
class Failure:
    """An error of a job: the module and name of its class, its message, and its traceback as text (may be empty)."""

    module: str
    kind: str
    message: str
    trace: str

    @staticmethod
    def of(error: BaseException) -> Failure:
        trace = errors.without_values("".join(traceback.format_exception(error)))
        if isinstance(error, _Terminated):
            return run_failure("the job's process was ended by SIGTERM.", trace)
        # Of a subclass that a user's code made of one of qexp's errors, the nearest class of qexp.
        kind = next((kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__), type(error))
        ours = kind.__module__ == errors.__name__
        return Failure(kind.__module__, kind.__name__, str(error) if ours else errors.without_values(str(error)), trace)

    def error(self) -> Exception:
        """The same error to be raised here: qexp's own by their classes, others by their names (see `named_error`)."""
        ours = self.module == errors.__name__
        error = getattr(errors, self.kind)(self.message) if ours else named_error(self.module, self.kind, self.message)
        error.__cause__ = RemoteTraceback(self.trace) if self.trace else None
        return error


def run_failure(sentence: str, trace: str = "") -> Failure:
    """A failure that is raised as RunError."""
    return Failure(errors.__name__, errors.RunError.__name__, sentence, trace)


@dataclass(frozen=True)
class Task:
    """The message that tells a job's process what to do.

    function: one of those in `_do`, called with `arguments`; folder: where the traceback of a crash is written;
    environment: environment variables; cwd: the working folder; levels: of loggers, by name; line: the terminal's line
    for the job's bars, counted from the owner's own.
    """

    function: str
    arguments: tuple[Any, ...]
    folder: Path
    environment: dict[str, str]
    cwd: Path
    levels: dict[str, int]
    line: int


@dataclass(eq=False)
class JobProcess:
    """A job's process and the connection to it.

    timeout: `job.timeout`, in seconds; handlers, level: of the root logger when the process was started, used for what
    the job logs; deadline: of the monotonic clock; ended: True once the job has ended, with `returned`: the function's
    return value, or a Failure.
    """

    task: Task
    process: ForkServerProcess
    channel: Connection
    timeout: float | None
    handlers: list[logging.Handler]
    level: int
    deadline: float = math.inf
    ended: bool = False
    returned: Any = None

    @contextlib.contextmanager
    def own_logging(self) -> Iterator[None]:
        """Send what is logged within the context to this job's handlers, though other jobs were started since."""
        root = logging.root
        before, root.handlers = (root.handlers, root.level), self.handlers
        root.setLevel(self.level)
        try:
            yield
        finally:
            root.handlers = before[0]
            root.setLevel(before[1])
            # Hydra closes them when it composes the next job, and a log file is opened again by the next line.
            for handler in self.handlers:
                if handler not in root.handlers:
                    handler.close()

    def receive(self) -> None:
        """Handle the process's next message: a log record, or the job's result; or its end without one."""
        try:
            message = self.channel.recv()
        except (EOFError, OSError):
            self.complete(self.unexplained_end())
            return
        if isinstance(message, logging.LogRecord):
            with self.own_logging():
                _log(message)
        else:
            self.complete(message)

    def complete(self, returned: Any) -> None:
        self.ended, self.returned = True, returned

    def unexplained_end(self) -> Failure:
        """The failure of a job whose process ended without a message."""
        self.process.join()
        crash = self.task.folder / CRASH
        where = crash.read_text(errors="replace") if crash.exists() else ""
        return run_failure(exit_sentence(self.process.exitcode or 0, where), where)

    def terminate(self) -> None:
        """Send SIGTERM to the process; `end` waits for it."""
        if not self.channel.closed:
            self.process.terminate()

    def time_out(self) -> None:
        """End a job that has run longer than its timeout."""
        self.process.terminate()
        until = time.monotonic() + GRACE_SECONDS
        while not self.ended and self.channel.poll(max(0.0, until - time.monotonic())):
            self.receive()
        where = self.returned.trace if isinstance(self.returned, Failure) else ""
        after = f"{self.timeout:g}"
        self.complete(run_failure(f"job.timeout={after}: the job was not done after {after} s, and was ended.", where))

    def outcome(self) -> Any:
        """Wait for the job's end and return its result, or raise its error, with its traceback as the cause.

        Raises RunError where the process ended without a message or ran longer than `job.timeout`.
        """
        try:
            listen([self])
            self.process.join(GRACE_SECONDS)
        finally:
            self.end()
        if isinstance(self.returned, Failure):
            raise self.returned.error()
        return self.returned

    def end(self) -> None:
        """End the process, if it runs, and release all that it had."""
        if self.channel.closed:
            return
        _end(self.process)
        self.channel.close()
        _lines.discard(self.task.line)
        with contextlib.suppress(OSError):
            (self.task.folder / CRASH).unlink(missing_ok=True)


def start_server(pt2e: bool = False) -> None:
    """Start the process that jobs are forked from, unless it runs, without waiting until it is ready.

    pt2e: True where jobs of flow=pt2e are to come, whose imports take seconds. Raises InputError where there is no
    folder for temporary files.
    """
    processes.prepare_temporary_folder()
    _context.set_forkserver_preload([SERVER, SERVER_PT2E] if pt2e else [SERVER])
    # Python before 3.13 tells its server of no other import path.
    with _environment(PYTHONPATH=processes.python_path()):
        forkserver.ensure_running()


def start(config: Config, folder: Path) -> JobProcess:
    """Start `run_experiment` in a process of its own, with this one's environment, working folder and import path.

    Its log records and warnings are handled in this process, and its result is the `outcome`. Raises RunError where no
    process can be started.
    """
    start_server(pt2e=bool(config.flow.packages))
    line = min(set(range(1, len(_lines) + 2)) - _lines) if progress.shown() else 0
    return _start_child("run_experiment", (config, folder), folder, config.job.timeout, line)


def listen(jobs: Sequence[JobProcess], seconds: float = math.inf) -> None:
    """Handle the messages of these jobs until one has ended, or for so many seconds; end those past their deadlines."""
    until = time.monotonic() + seconds
    while not any(job.ended for job in jobs):
        left = min([until, *(job.deadline for job in jobs)]) - time.monotonic()
        waited_for = [one for job in jobs for one in (job.channel, job.process.sentinel)]
        ready = connection.wait(waited_for, min(max(left, 0.0), 3600.0))
        for job in jobs:
            if job.channel in ready:
                job.receive()
            elif job.process.sentinel in ready:
                job.complete(job.unexplained_end())
            elif time.monotonic() > job.deadline:
                job.time_out()
        if time.monotonic() > until:
            return


def check_inputs_in_child(configs: Sequence[Config]) -> None:
    """Call `pipeline.input_checks.check_inputs` in a process of its own."""
    _call_in_child("check_inputs", configs)


def provenance_tags_in_child(configs: Sequence[Config]) -> list[dict[str, str]]:
    """Call `pipeline.input_checks.provenance_tags` in a process of its own."""
    found: list[dict[str, str]] = _call_in_child("provenance_tags", configs)
    return found


def _call_in_child(function: str, *arguments: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return _start_child(function, arguments, Path(folder)).outcome()


def _start_child(
    function: str, arguments: tuple[Any, ...], folder: Path, timeout: float | None = None, line: int = 0
) -> JobProcess:
    task = Task(function, arguments, folder, dict(os.environ), Path.cwd(), _levels(), line)
    start_server()
    channel, other_end = _context.Pipe()
    with _standard_streams() as streams:
        process = _context.Process(target=_main, args=(other_end, streams), name="qexp job")
        job = JobProcess(task, process, channel, timeout, list(logging.root.handlers), logging.root.level)
        try:
            with other_end:
                _fork(process)
            # Sent rather than an argument: after Ctrl-C the process finds the channel closed, and ends.
            with contextlib.suppress(BrokenPipeError):
                channel.send(task)
        except BaseException:
            job.end()
            raise
    _lines.add(line)
    job.deadline = time.monotonic() + (math.inf if timeout is None else timeout)
    return job


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set environment variables within the context."""
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
    """Copies of this process's standard input, output and error, in a form that can be passed to another process."""
    with contextlib.ExitStack() as opened:
        yield [opened.enter_context(Connection(_copy(number))) for number in STANDARD_STREAMS]


def _copy(descriptor: int) -> int:
    try:
        return os.dup(descriptor)
    except OSError:  # it is closed
        return os.open(os.devnull, os.O_RDWR)


def _levels() -> dict[str, int]:
    """The levels that were set on loggers, by name; the root's name is empty."""
    loggers = logging.root.manager.loggerDict.items()
    given = {name: logger.level for name, logger in loggers if isinstance(logger, logging.Logger) and logger.level}
    return {"": logging.root.level, **given}


def _fork(process: ForkServerProcess) -> None:
    try:
        with _known_start_method():
            process.start()
    except (OSError, EOFError) as error:
        raise errors.RunError(f"the process that jobs are forked from has ended ({type(error).__name__}).") from error


@contextlib.contextmanager
def _known_start_method() -> Iterator[None]:
    """Within the context, the default start method is one that multiprocessing itself knows.

    A process passes its start method to those that it starts. In a worker of joblib's that is `loky`, which is an error
    in a process that has not imported joblib.
    """
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
    """Handle a job's log record in this process. Each warning is shown once, as Python does within one process."""
    if record.name != "py.warnings":
        logging.getLogger(record.name).handle(record)
    elif record.getMessage() not in _warned:
        _warned.add(record.getMessage())
        print(record.getMessage().rstrip(), file=sys.stderr)


def exit_sentence(code: int, where: str = "") -> str:
    """Say in a sentence how a process ended. code: its exit status, or minus the number of a signal; where: the
    traceback of a crash, which names the runtime in whose code it was."""
    if code >= 0:
        return f"the job's process ended with exit status {code} before the job was done."
    name = signal.Signals(-code).name
    if name == "SIGKILL":
        return (
            "the job's process was killed (SIGKILL), as Linux does when memory runs out; with less of it, "
            "evaluate.batch_size and calib.batch_size can be smaller."
        )
    if name not in CRASHES:
        return f"the job's process was ended by {name}."
    crashed = f"the job's process was ended by {name}, a crash in compiled code"
    runtime = next((one for one in RuntimeName if one.packages and f"/qexp/runtimes/{one}.py" in where), None)
    return f"{crashed} that {runtime} called: take {runtime} out of runtimes." if runtime else f"{crashed}."


def _end(process: ForkServerProcess) -> None:
    """End the process, if it runs: by SIGTERM, after which it can clean up, and then by SIGKILL."""
    if process.is_alive():
        process.terminate()
        process.join(GRACE_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    process.close()


# --------------------------------------------------------------------------------------------- in the job's process


class _Sender(logging.handlers.QueueHandler):
    """Sends log records, each with its message formatted, through a connection."""

    def enqueue(self, record: logging.LogRecord) -> None:
        cast(Connection, self.queue).send(record)

    def send(self, message: object) -> None:
        """Send a message that is no record, while no other thread sends one."""
        self.acquire()
        try:
            cast(Connection, self.queue).send(message)
        finally:
            self.release()


def _main(channel: Connection, streams: list[Connection]) -> None:
    """Receive a Task in a job's process, do it, and send its result."""
    processes.end_with_parent()
    processes.ignore_terminal_signals()
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
    # These take the terminal's first lines, so that the job's bars are drawn below the owner's and other jobs'.
    lines = [tqdm(file=Path(os.devnull).open("w")) for _ in range(task.line)]  # noqa: SIM115, F841
    records = _Sender(channel)  # type: ignore[arg-type]
    _configure_logging(records, task.levels)
    with (task.folder / CRASH).open("w") as crash:
        faulthandler.enable(crash)
        returned = _do(task)
        faulthandler.disable()
    records.send(returned)


def _do(task: Task) -> Any:
    """Call the task's function and return its result, or a Failure where it raises."""
    try:
        _end_by_signal()
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


def _end_by_signal() -> None:
    """Raise _Terminated on SIGTERM, in a finalizer's place after it: Python would print it there and go on."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.unraisablehook = _again_if_terminated


def _again_if_terminated(ignored: sys.UnraisableHookArgs) -> None:
    if issubclass(ignored.exc_type, _Terminated):
        threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGTERM)).start()
    else:
        sys.__unraisablehook__(ignored)


def _terminate(number: int, frame: Any) -> None:
    raise _Terminated


def _configure_logging(handler: logging.Handler, levels: dict[str, int]) -> None:
    logging.root.handlers = [handler]
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.WARNING)
