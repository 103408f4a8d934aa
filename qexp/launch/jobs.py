"""A job in a process of its own: a crash, memory that runs out or an endless loop ends that job alone, and nothing
leaks from one job into the next.

Jobs are forked from a server process that has imported torch (qexp/launch/fork_server.py), in some hundredths of a
second. Every process that runs jobs has one such server, multiprocessing's `forkserver`. Linux ends a server with its
owner, and a job with its server, whatever ends them. torch is not imported here.

Of a sweep's jobs (`in_turn`) the next one's process is begun as soon as the current one evaluates. It reads, prepares
and saves meanwhile, and waits until the current one has evaluated and timed; its owner hears of what it does when the
one before has ended.
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
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, cast

from filelock import FileLock
from tqdm import tqdm

from qexp import errors
from qexp.config.schema import Config
from qexp.launch import progress
from qexp.pipeline.turn import Turn
from qexp.records import Result
from qexp.system import console, credentials, processes
from qexp.system import lock as machine

SERVER = "qexp.launch.fork_server"
GRACE_SECONDS = 3.0  # how long a job that is told to end may take to clean up
STANDARD_STREAMS = (0, 1, 2)
CRASH = "crash.txt"  # in a job's folder: where its code was when a signal such as SIGSEGV ended it
CRASHES = ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT")

POLL_SECONDS = 0.02  # between two looks at whether it is a job's turn

_context = multiprocessing.get_context("forkserver")
_warned: set[str] = set()

log = logging.getLogger(__name__)


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
class Order:
    """What a job's process is told. function: of `experiment`, with its arguments; folder: what is known of a crash is
    put there; timeout: `job.timeout`; environment: its environment variables; levels: of loggers, by name; turn: a file
    whose lock is held by the one of the owner's jobs that evaluates; line: of the terminal, for its bars, counted from
    the owner's own."""

    function: str
    arguments: tuple[Any, ...]
    folder: Path
    timeout: float | None
    environment: dict[str, str]
    cwd: Path
    levels: dict[str, int] = field(compare=False)  # libraries give some to loggers whenever they are imported
    turn: Path | None
    line: int = field(compare=False)


class _Share:
    """What a job says when the next one may be begun."""


class _Waiting:
    """What a job says when it is prepared, before it waits for its turn to evaluate."""


class _Alone:
    """What a job asks for before it times, and is told once its owner attends to it and the next one waits."""


@dataclass
class _Begun:
    """A job's process, and the connection to it. said: what it has said and its owner has not attended to yet; waits:
    whether it will do nothing until its turn comes, or has ended."""

    order: Order
    process: ForkServerProcess
    channel: Connection
    said: deque[Any] = field(default_factory=deque)
    waits: bool = False

    def listen(self) -> bool:
        """Take what it says next, for later; False where it has ended."""
        try:
            self.said.append(self.channel.recv())
        except (EOFError, OSError):
            self.waits = True
            return False
        self.waits = isinstance(self.said[-1], _Waiting)
        return True

    def end(self) -> None:
        _end(self.process)
        self.channel.close()
        with contextlib.suppress(OSError):
            (self.order.folder / CRASH).unlink(missing_ok=True)


@dataclass
class _Queue:
    """Jobs that are run one after the other. following: what comes after the job in a folder, None where nothing does;
    turn: see Order; ahead: the job that was begun before its turn."""

    following: Callable[[Path], tuple[Config, Path] | None]
    turn: Path
    ahead: _Begun | None = None

    def begin_after(self, current: Order) -> None:
        following = self.following(current.folder)
        if following is None or self.ahead is not None:
            return
        config, folder = following
        # If it can't be begun now, that is said when its turn comes.
        with contextlib.suppress(OSError, errors.RunError):
            folder.mkdir(parents=True, exist_ok=True)
            self.ahead = _begin(_run_order(config, folder, after=current))
            log.debug("%s is begun while %s evaluates", folder, current.folder)

    def take(self, order: Order) -> _Begun | None:
        """The job that was begun ahead, if it is this one."""
        begun, self.ahead = self.ahead, None
        if begun is None or begun.order == order:
            return begun
        begun.end()
        log.debug("%s is another job than was foreseen; none is begun ahead any more", order.folder)
        self.following = lambda folder: None
        return None


# Of the sweep that this process runs.
_queue: _Queue | None = None


@contextlib.contextmanager
def in_turn(following: Callable[[Path], tuple[Config, Path] | None], turn: Path) -> Iterator[None]:
    """Jobs run within begin before their turn. following: the configuration and folder of the job after the one in a
    folder; turn: a file for their lock, which is removed in the end."""
    global _queue
    _queue = _Queue(following, turn)
    try:
        yield
    finally:
        left, _queue = _queue.ahead, None
        if left is not None:
            left.end()
        turn.unlink(missing_ok=True)


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
    """`experiment.run_job` in a process of its own, with this one's environment, working folder and import path; its
    log records and warnings are handled here.

    Raises what it raised, with its traceback as the cause, and RunError where its process ended otherwise or took
    longer than `job.timeout`.
    """
    order = _run_order(config, folder)
    result: Result = _outcome((_queue.take(order) if _queue is not None else None) or _begin(order))
    return result


def check_inputs(configs: Sequence[Config]) -> None:
    """`experiment.check_inputs` in a process of its own, as `run`."""
    _call("check_inputs", configs)


def described(configs: Sequence[Config]) -> list[dict[str, str]]:
    """`experiment.described` in a process of its own, as `run`."""
    found: list[dict[str, str]] = _call("described", configs)
    return found


def _call(function: str, *arguments: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return _outcome(_begin(_order(function, arguments, Path(folder))))


def _outcome(begun: _Begun) -> Any:
    """What the job gives; raises what it raised."""
    try:
        answer = _answer(begun)
        begun.process.join(GRACE_SECONDS)
    finally:
        begun.end()
    if isinstance(answer, Failure):
        raise answer.error()
    return answer


def _run_order(config: Config, folder: Path, after: Order | None = None) -> Order:
    """after: the job that is being run meanwhile."""
    line = 0 if not progress.shown() else 1 if after is None else 3 - after.line
    turn = _queue.turn if _queue is not None else None
    return _order("run_job", (config, folder), folder, config.job.timeout, turn, line)


def _order(
    function: str,
    arguments: tuple[Any, ...],
    folder: Path,
    timeout: float | None = None,
    turn: Path | None = None,
    line: int = 0,
) -> Order:
    return Order(function, arguments, folder, timeout, dict(os.environ), Path.cwd(), _levels(), turn, line)


def _begin(order: Order) -> _Begun:
    start_server()
    channel, other_end = _context.Pipe()
    with _standard_streams() as streams:
        process = _context.Process(target=_work, args=(other_end, streams), name="qexp job")
        begun = _Begun(order, process, channel)
        try:
            with other_end:
                _start(process)
            # Not an argument: if Ctrl-C comes first, the process finds nobody at the other end, and ends.
            with contextlib.suppress(BrokenPipeError):
                channel.send(order)
        except BaseException:
            begun.end()
            raise
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


def _answer(job: _Begun) -> Any:
    """What the job gives, a Failure where it fails."""
    timeout = job.order.timeout
    ended, answer = _listen(job, timeout)
    if ended:
        return answer
    job.process.terminate()
    _, last = _listen(job, GRACE_SECONDS)
    where = last.trace if isinstance(last, Failure) else ""
    return refused(f"job.timeout={timeout:g}: the job was not done after {timeout:g} s, and was ended.", where)


def _listen(job: _Begun, seconds: float | None) -> tuple[bool, Any]:
    """Whether the job ends within `seconds`, and what it gives or fails with; what it logs is logged here.

    The time that it waits for the next one isn't its own.
    """
    deadline = time.monotonic() + (math.inf if seconds is None else seconds)
    while (left := deadline - time.monotonic()) > 0:
        if not job.said:
            ready = connection.wait([job.channel, job.process.sentinel], min(left, 3600.0))
            if ready and not (job.channel in ready and job.listen()):
                return True, _died(job)
            continue
        said = job.said.popleft()
        if isinstance(said, logging.LogRecord):
            _log(said)
        elif isinstance(said, _Share):
            if _queue is not None:
                _queue.begin_after(job.order)
        elif isinstance(said, _Alone):
            asked = time.monotonic()
            _let_wait(job)
            deadline += time.monotonic() - asked
            with contextlib.suppress(BrokenPipeError):  # it has ended meanwhile, which is found above
                job.channel.send(said)
        elif not isinstance(said, _Waiting):
            return True, said
    return False, None


def _let_wait(job: _Begun) -> None:
    """Return when the job that was begun ahead waits for its turn, or `job` has ended."""
    ahead = _queue.ahead if _queue is not None else None
    while ahead is not None and not ahead.waits:
        if job.process.sentinel in connection.wait([ahead.channel, job.process.sentinel]):
            return
        ahead.listen()  # if it has ended, that is found when its turn comes


def _log(record: logging.LogRecord) -> None:
    """Handle a record of a job here. Warnings are shown once a text, as Python does it within one process."""
    if record.name != "py.warnings":
        logging.getLogger(record.name).handle(record)
    elif record.getMessage() not in _warned:
        _warned.add(record.getMessage())
        print(record.getMessage().rstrip(), file=sys.stderr)


def _died(job: _Begun) -> Failure:
    job.process.join()
    crash = job.order.folder / CRASH
    where = crash.read_text(errors="replace") if crash.exists() else ""
    return refused(ending(job.process.exitcode or 0), where)


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
        """Send something else; another thread's record must not come between."""
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
    console.protect()
    credentials.learn_environment()
    credentials.learn(order.arguments)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  (for a debugger in a user's model)
    tqdm.set_lock(threading.RLock())  # its own holds a semaphore, which a killed process would leave to the system
    # They take the terminal's first lines, so that bars are drawn below the owner's, and those of the job before.
    lines = [tqdm(file=Path(os.devnull).open("w")) for _ in range(order.line)]  # noqa: SIM115, F841
    records = _Sender(channel)  # type: ignore[arg-type]
    _configure_logging(records, order.levels)
    with (order.folder / CRASH).open("w") as crash:
        faulthandler.enable(crash)
        answer = _do(order, channel, records.say)
        faulthandler.disable()
    records.say(answer)


def _turn(file: Path, channel: Connection, say: Callable[[object], None]) -> Turn:
    """The turn of a job in its own process. file: for the lock of its owner's jobs."""
    lock = FileLock(file)

    @contextlib.contextmanager
    def evaluating() -> Iterator[None]:
        say(_Waiting())
        with machine.released():
            held = lock.acquire(poll_interval=POLL_SECONDS)
        with held:
            yield

    def alone() -> None:
        with machine.released():
            say(_Alone())
            channel.recv()

    return Turn(str(file), evaluating, lambda: say(_Share()), alone)


def _do(order: Order, channel: Connection, say: Callable[[object], None]) -> Any:
    """What the function gives, a Failure where it fails."""
    try:
        signal.signal(signal.SIGTERM, _terminate)
        from qexp.pipeline.checks import check_inputs, described
        from qexp.pipeline.run import run_job

        turn = {} if order.turn is None else {"turn": _turn(order.turn, channel, say)}
        functions: dict[str, Callable[..., Any]] = {
            "run_job": run_job,
            "check_inputs": check_inputs,
            "described": described,
        }
        return functions[order.function](*order.arguments, **turn)
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
