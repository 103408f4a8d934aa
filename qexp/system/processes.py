"""Processes that qexp starts: they end with their parent, find the same code, and connect by sockets whose paths are
short enough."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import tempfile
from contextlib import suppress
from functools import cache
from multiprocessing import util
from pathlib import Path

from qexp.errors import InputError

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)
SOCKET_PATH = 107 if sys.platform == "linux" else 103  # bytes that the path of a socket may have, unix(7)
SOCKET_NAME = "/pymp-12345678/listener-12345678"  # what multiprocessing adds to the folder for temporary files
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


def end_with_parent() -> None:
    """Have Linux kill this process when its parent (strictly, the thread that started it) ends, however it ends."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def ignore_terminal_signals() -> None:
    """A terminal sends Ctrl-C, and its end, to all of its processes; what follows is their owner's business."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def python_path() -> str:
    """This process's import path, as a value of PYTHONPATH."""
    return os.pathsep.join(path or str(Path.cwd()) for path in sys.path)


@cache
def prepare_temporary_folder() -> None:
    """Check that there is a folder for temporary files, and log a warning where it isn't the one that TMPDIR names.

    Where the paths of multiprocessing's sockets would be too long in it, they are put elsewhere. Raises InputError
    without such a folder.
    """
    try:
        used = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise InputError("there is no folder for temporary files; set TMPDIR to one that can be written to.") from error
    asked = os.environ.get("TMPDIR")
    if asked and os.path.abspath(asked) != used:  # noqa: PTH100  (as tempfile does, links are not followed)
        log.warning("TMPDIR=%s is no folder that can be written to; temporary files go to %s.", asked, used)
    if len(os.fsencode(used + SOCKET_NAME)) > SOCKET_PATH:
        _shorten_sockets(used)


def _shorten_sockets(used: str) -> None:
    """Put multiprocessing's sockets in a folder with a short path. used: the folder where other temporary files go."""
    before = tempfile.tempdir
    for folder in SHORT_FOLDERS:
        tempfile.tempdir = folder
        try:
            util.get_temp_dir()  # made once in a process, passed to its children, and removed when it ends
            return
        except OSError:
            continue
        finally:
            tempfile.tempdir = before
    most = SOCKET_PATH - len(SOCKET_NAME)
    raise InputError(
        f"TMPDIR={used} is too long for the sockets that processes meet at, and none of {', '.join(SHORT_FOLDERS)} can "
        f"be written to; set TMPDIR to a folder whose path has at most {most} bytes."
    )
