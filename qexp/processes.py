"""What processes that qexp starts have in common: they end with the one that started them, and find the same code."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)


def end_with_parent() -> None:
    """From now on Linux kills this process when its parent (strictly, the thread that started it) ends, however."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def python_path() -> str:
    """Where this process finds code, for PYTHONPATH."""
    return os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
