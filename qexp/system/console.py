"""Standard output and error on which nothing fails and no credential is seen: what is printed is no reason to lose a
run.

A reader that has gone (`| head -1`), a closed terminal or a full disk ends the printing and not the runs; what an
encoding lacks is spelled in ASCII; a stream that was closed from the start is none.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys

from qexp.system import credentials

STREAMS = {"stdin": 0, "stdout": 1, "stderr": 2}
SPELLED = {
    "→": "->", "×": "x", "±": "+/-", "−": "-", "–": "-", "—": "-", "…": "...", "·": "*", "≥": ">=", "≤": "<=", "µ": "u",
    "é": "e", "’": "'", "“": '"', "”": '"',
}  # fmt: skip

# Whoever read it has left, and knows.
_READER_GONE = (errno.EPIPE, errno.EIO, errno.EBADF)


def _spell(error: UnicodeError) -> tuple[str, int]:
    """In ASCII, what an encoding lacks: as SPELLED, else by its number, as Python writes it in a string."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    spelled = (SPELLED.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in lacking)
    return "".join(spelled), error.end


codecs.register_error("qexp.spell", _spell)


class Stream(io.TextIOWrapper):
    """A standard stream without credentials, which goes on as one to nowhere where it can't be written to any more."""

    def write(self, text: str) -> int:
        try:
            super().write(credentials.masked(text))
        except OSError as error:
            self._end(error)
        return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._end(error)

    def _end(self, error: OSError) -> None:
        if isinstance(error, BlockingIOError):
            raise error
        number = self.fileno()
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), number)
        super().flush()  # what waits would be tried again
        if error.errno not in _READER_GONE and number == STREAMS["stdout"]:
            print(f"standard output can't be written to ({error.strerror}): the runs go on without.", file=sys.stderr)


def protect() -> None:
    """From now on standard output and error of this process are such streams, and none is closed."""
    for name, number in STREAMS.items():
        try:
            os.fstat(number)
        except OSError:  # the next file that is opened would take its place
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
        stream = getattr(sys, name)
        if name == "stdin" or (stream is not None and type(stream) is not io.TextIOWrapper):
            continue  # somebody else's, or such a stream already
        if stream is not None:
            stream.flush()
        setattr(sys, name, _over(number, stream))


def _over(number: int, stream: io.TextIOWrapper | None) -> Stream:
    """The stream of this number. stream: Python's own, None where it was closed."""
    binary = io.open(number, "wb", closefd=False)  # noqa: UP020, SIM115
    by_line = number == STREAMS["stderr"] or getattr(stream, "line_buffering", False)
    at_once = getattr(stream, "write_through", False)
    encoding = stream.encoding if stream is not None else "utf-8"
    return Stream(binary, encoding=encoding, errors="qexp.spell", line_buffering=by_line or at_once)
