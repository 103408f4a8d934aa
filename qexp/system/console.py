"""Standard output and error that never fail a run and never show a credential.

A reader that has gone (`| head -1`), a closed terminal or a full disk ends the printing and not the runs; characters
that an encoding lacks are written in ASCII; a stream that was closed from the start becomes one to nowhere.
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

# The reader has left, and needs no message.
_READER_GONE = (errno.EPIPE, errno.EIO, errno.EBADF)


def _spell(error: UnicodeError) -> tuple[str, int]:
    """Write characters that an encoding lacks as SPELLED has them, else as Python escapes them in a string."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    spelled = (SPELLED.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in lacking)
    return "".join(spelled), error.end


codecs.register_error("qexp.spell", _spell)


class Stream(io.TextIOWrapper):
    """A standard stream that masks credentials, and that writes to nowhere once writing has failed."""

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
        super().flush()  # discards the buffer, which would otherwise be written again
        if error.errno not in _READER_GONE and number == STREAMS["stdout"]:
            print(f"standard output can't be written to ({error.strerror}): the runs go on without.", file=sys.stderr)


def protect() -> None:
    """Replace this process's standard output and error by such streams; open those that were closed."""
    for name, number in STREAMS.items():
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened would get its number
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
        stream = getattr(sys, name)
        if name == "stdin" or (stream is not None and type(stream) is not io.TextIOWrapper):
            continue  # another library's, or such a stream already
        if stream is not None:
            stream.flush()
        setattr(sys, name, _over(number, stream))


def _over(number: int, stream: io.TextIOWrapper | None) -> Stream:
    """A Stream on descriptor `number`. stream: Python's own, None where it was closed."""
    binary = io.open(number, "wb", closefd=False)  # noqa: UP020, SIM115
    by_line = number == STREAMS["stderr"] or getattr(stream, "line_buffering", False)
    at_once = getattr(stream, "write_through", False)
    encoding = stream.encoding if stream is not None else "utf-8"
    return Stream(binary, encoding=encoding, errors="qexp.spell", line_buffering=by_line or at_once)
