"""Ctrl-C, SIGTERM and a closed terminal as an exception that is raised once, so that what is open can be closed."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from qexp.launch.job import command


class Stop(BaseException):
    """Ctrl-C, SIGTERM or SIGHUP (a closed terminal); `code` is the exit status, 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        self.code = 128 + number
        super().__init__(number)  # pickle passes these arguments to the constructor again

    def __str__(self) -> str:
        return signal.Signals(self.args[0]).name


# The signal that this process has received, until the outermost `stoppable` is left.
_received: list[Stop] = []


def _receive(number: int, frame: Any) -> None:
    if _received:
        if number == signal.SIGHUP:  # sent by both the shell and the system, not by an impatient user
            return
        os._exit(128 + number)
    _received.append(Stop(number))
    raise _received[0]


def _ignore_stops(ignored: sys.UnraisableHookArgs) -> None:
    # One that was raised in a finalizer, where Python prints it and goes on: the contexts raise it again.
    if not isinstance(ignored.exc_value, Stop):
        sys.__unraisablehook__(ignored)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Raise Stop on the first SIGINT, SIGTERM or SIGHUP, so that what is open can be closed; exit at once on the next.

    Contexts may be nested. Each raises Stop at its end even where the interrupted code swallowed it or raised another
    error instead, as OmegaConf does; SystemExit passes, since it means that the stop was handled. SIGHUP that was
    ignored when this process started, as by nohup, stays ignored. Outside the main thread, where Python delivers no
    signal, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    stopping = [signal.SIGINT, signal.SIGTERM, *([] if ignored else [signal.SIGHUP])]
    before = {number: signal.signal(number, _receive) for number in stopping}
    hook, sys.unraisablehook = sys.unraisablehook, _ignore_stops
    try:
        if not _received:  # else it was swallowed before this context was entered
            yield
        if _received:
            raise _received[0]
    except (Stop, SystemExit):
        raise
    except BaseException as error:
        if _received:
            raise _received[0] from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook
        if _receive not in before.values():
            _received.clear()


@contextlib.contextmanager
def until_stopped() -> Iterator[None]:
    """As `stoppable`, but Stop ends the process with its exit status, after the command to run it again was printed."""
    try:
        with stoppable():
            yield
    except Stop as stop:
        print(f"Stopped by {stop}. To run it again:\n  {command()}", file=sys.stderr)
        sys.exit(stop.code)
