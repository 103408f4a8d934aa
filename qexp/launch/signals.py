"""Ctrl-C, SIGTERM and a closed terminal: raised once, so that what is open can be closed."""

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
        super().__init__(number)  # as given, for pickle makes it again from this

    def __str__(self) -> str:
        return signal.Signals(self.args[0]).name


# The signal that this process has received, until the outermost `stoppable` is left.
_received: list[Stop] = []


def _receive(number: int, frame: Any) -> None:
    if _received:
        if number == signal.SIGHUP:  # sent by the shell and by the system; nobody is impatient
            return
        os._exit(128 + number)
    _received.append(Stop(number))
    raise _received[0]


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise Stop once, so that what is open can be closed; the next one leaves at once.

    Contexts may be nested. Stop is what leaves each of them even where the code that the signal hit swallowed it or
    died of it in another way, as OmegaConf does; SystemExit is not touched, for it means that the stop was dealt with.
    SIGHUP that was ignored when this process started, as by nohup, still is. Outside the main thread, where Python
    delivers no signal, nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    stopping = [signal.SIGINT, signal.SIGTERM, *([] if ignored else [signal.SIGHUP])]
    before = {number: signal.signal(number, _receive) for number in stopping}
    try:
        if not _received:  # else it was swallowed before this context
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
        if _receive not in before.values():
            _received.clear()


@contextlib.contextmanager
def until_stopped() -> Iterator[None]:
    """`stoppable`, whose Stop ends the process with how to go on and its exit status."""
    try:
        with stoppable():
            yield
    except Stop as stop:
        print(f"Stopped by {stop}. To run it again:\n  {command()}", file=sys.stderr)
        sys.exit(stop.code)
