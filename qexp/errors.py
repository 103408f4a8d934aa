"""The errors with which qexp refuses or ends a run; Hydra prints each as its sentence, without a traceback.

The text of other libraries' exceptions may contain a whole tensor: it becomes part of a message only through
`first_line`, `one_line` or `without_values`.
"""

import re
from itertools import groupby

from hydra.errors import CompactHydraException


class QexpError(CompactHydraException):
    """One clear sentence that names the setting, its value and what is allowed."""


class ConfigError(QexpError):
    """The configuration can't work, whatever the inputs are: raised before any work."""


class InputError(QexpError):
    """A checkpoint, data set, model or server doesn't match the configuration: raised before a run starts."""


class RunError(QexpError):
    """A started run can't be finished, or its result can't be trusted: it ends as FAILED."""


class NotFinite(RunError):
    """The model returns NaN or infinity, for at least one image."""


# ----------------------------------------------------------------------------- messages of other libraries' errors

_WORD = re.compile(r"(?:(?!\\n)[^\s,;\[\]()])+")
_NUMBER = re.compile(r"(?=\D*\d)[-+.e\d]+|[-+]?(?:nan|inf)")
_VALUE = re.compile(r"(?<![\w.])(tensor|array)\(")
_SHAPE = 8  # up to so many whole numbers may be a shape; more, or any with a point, are values of a tensor


def without_values(text: str) -> str:
    """The text of another library's error without the values of tensors and arrays, however they are printed."""
    told, start = [], 0
    for found in _VALUE.finditer(text):
        if found.start() >= start:
            told.append(f"{text[start : found.start()]}{found[1]}(…)")
            start = _closing(text, found.end())
    return _without_rows("".join([*told, text[start:]]))


def _without_rows(text: str) -> str:
    """The text without rows of numbers that can't be a shape."""
    told, start = [], 0
    for are_numbers, group in groupby(_WORD.finditer(text), lambda word: bool(_NUMBER.fullmatch(word[0]))):
        row = list(group)
        whole = all(word[0].lstrip("-").isdigit() for word in row)
        if are_numbers and len(row) > (_SHAPE if whole else 1):
            told.append(f"{text[start : row[0].start()]}…")
            start = row[-1].end()
    return "".join([*told, text[start:]])


def _closing(text: str, start: int) -> int:
    """The position after the parenthesis that closes the one before `start`; the end where the text was cut."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place + 1
    return len(text)


def first_line(error: BaseException, limit: int = 160) -> str:
    """The first line of another library's error, without values and a final full stop, cut at `limit` characters; its
    type where it has no text."""
    lines = without_values(str(error)).strip().splitlines()
    return lines[0][:limit].rstrip(".") if lines else type(error).__name__


def one_line(error: BaseException, limit: int = 300) -> str:
    """Type and message of another library's error on one line, without values, cut at `limit` characters."""
    text = " ".join(f"{type(error).__name__}: {without_values(str(error))}".split()).rstrip(":. ")
    return text if len(text) <= limit else text[: limit - 1] + "…"
