"""Masking of credentials in everything that is written, logged or printed.

A credential is recognised by its place: the password in the address of a server or database, or the value of a
parameter, setting or environment variable of such a name. Values found in such places (`learn`) are remembered, and are
masked where they stand alone too, as in another library's error. In memory settings are as they were given; they are
masked on the way out: in files (`identity.plain`, Hydra's), in logs (`keep_out_of_logs`), on the terminal
(`console.Stream`), and in MLflow (`tracking`).
"""

from __future__ import annotations

import logging
import os
import re
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

MASK = "***"

_NAME = r"""(?:
    [\w\-]*(?:password|passwd|passphrase|secret|api[_\-]?key|access[_\-]?key|secret[_\-]?key|private[_\-]?key
             |account[_\-]?key|connection[_\-]?string|odbc_connect|x-amz-credential|x-amz-signature|x-goog-signature)
    |(?:[\w\-]*[_\-])?(?:access|api|auth|bearer|hf|hub|id|oauth|sas|secret|security|session|refresh|tracking)[_\-]?token
    |token|pwd|sig
)"""  # as the last part of a setting's name; a class_token is a model's
_SETTING = re.compile(_NAME, re.VERBOSE | re.IGNORECASE)
_VARIABLE = re.compile(rf"{_NAME}|\w*_(?:token|pat)", re.VERBOSE | re.IGNORECASE)
_NO_SECRETS = ("PWD", "OLDPWD")  # the shell's working folders

# The password of an address; it may hold a slash, as SQLAlchemy reads it, and a port is none.
_ADDRESS = re.compile(
    r"""(?P<before>\b[a-z][\w+.\-]*:/{1,3}[^\s/:@?#'"<>]*:)
        (?!\d{1,5}(?:[/?#\s'"]|$))
        (?P<secret>[^\s/?#'"<>]*|[^\s@'"<>]*)(?=@)""",
    re.VERBOSE | re.IGNORECASE,
)
# A token in place of a name, as https://TOKEN@host.
_BARE = re.compile(r"""(?P<before>\b(?:\w+\+)?https?://)(?P<secret>[^\s/:@?#'"<>]+)(?=@)""", re.IGNORECASE)
# name=value, as in a query, an override or a driver's parameters.
_ASSIGNED = re.compile(
    rf"""(?P<before>(?<![\w\-]){_NAME}=)(?P<secret>'[^']*'|"[^"]*"|(?!\$\{{)[^\s&;,'"}}\])]+)""",
    re.VERBOSE | re.IGNORECASE,
)
# name: value, as in YAML, JSON and Hydra's {name: value}.
_MAPPED = re.compile(
    rf"""(?P<before>(?:^\s*|[{{,]\s*|["']){_NAME}["']?:[ ]*)
        (?P<secret>'[^']*'|"[^"]*"|(?!null\b|\$\{{)[^\s,'"{{}}\[\]]+)""",
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
# Each with a cheap pattern that a text must match to hold one, since the patterns themselves are slow.
_PLACES = (
    (re.compile("@"), (_ADDRESS, _BARE)),
    (
        re.compile("pass|secret|key|string|connect|credential|signature|token|pwd|sig", re.IGNORECASE),
        (_ASSIGNED, _MAPPED),
    ),
)
# An address that is the whole value of a setting: its password may hold any character.
_WHOLE = re.compile(r"""['"]?[a-z][\w+.\-]*:/{1,3}[^/:@]*:(?P<secret>.+)@""", re.IGNORECASE | re.DOTALL)

_known: set[str] = set()


def is_credential(name: str) -> bool:
    """True if a setting of this (dotted) name holds a credential."""
    return _SETTING.fullmatch(name.rpartition(".")[2]) is not None


def masked(text: str) -> str:
    """`text` with every credential replaced by MASK."""
    for hint, places in _PLACES:
        if hint.search(text):
            for place in places:
                text = place.sub(lambda found: found["before"] + MASK, text)
    for secret in _known:
        if secret in text:
            text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", lambda _: MASK, text)
    return text


def masked_tree(value: Any, name: str = "") -> Any:
    """Nested mappings and lists with every credential replaced by MASK. name: of the setting that has this value."""
    if isinstance(value, Mapping):
        return {key: masked_tree(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked_tree(item, name) for item in value]
    if isinstance(value, str):
        key, _, given = value.partition("=")
        if (
            given and is_credential(key.lstrip("+~")) and not given.startswith("${")
        ):  # an override, however it is quoted
            return f"{key}={MASK}"
        return MASK if value and is_credential(name) and not value.startswith("${") else masked(value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return MASK if number and is_credential(name) else value


def learn(value: Any, name: str = "") -> None:
    """Remember the credentials in settings: mappings, lists, dataclasses, or a text such as an address or override."""
    if is_dataclass(value) and not isinstance(value, type):
        learn(asdict(value))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            learn(item, str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            learn(item, name)
    elif isinstance(value, str):
        key, _, given = value.partition("=")
        secrets = [value] if is_credential(name) else [given] if is_credential(key.lstrip("+~")) else []
        _known.update(form for secret in [*secrets, *_in(value)] for form in _forms(secret) if _is_telling(form))


def learn_environment() -> None:
    """Remember the credentials in this process's environment variables."""
    for name, value in os.environ.items():
        if name not in _NO_SECRETS:
            learn(value, "password" if _VARIABLE.fullmatch(name) else "")


def _in(text: str) -> Iterator[str]:
    for _, places in _PLACES:
        for place in places:
            yield from (found["secret"] for found in place.finditer(text))
    whole = _WHOLE.match(text) or _WHOLE.match(text.partition("=")[2])
    if whole:
        yield whole["secret"]


def _forms(secret: str) -> Sequence[str]:
    bare = secret.strip("'\"")
    return bare, urllib.parse.unquote(bare), urllib.parse.quote(bare, safe="")


def _is_telling(secret: str) -> bool:
    """True if a credential can be masked wherever it stands: a short word or number may mean something else."""
    plain = secret.isalpha() or secret.isdigit()
    return secret != MASK and not secret.startswith("${") and len(secret) >= (12 if plain else 6)


class Formatter(logging.Formatter):
    """Formats records as another formatter does, with credentials masked."""

    def __init__(self, lines: logging.Formatter) -> None:
        super().__init__()
        self.lines = lines

    def format(self, record: logging.LogRecord) -> str:
        return masked(self.lines.format(record))


def keep_out_of_logs() -> None:
    """Mask credentials in what the root logger's handlers write from now on, whoever configured them."""
    for handler in logging.root.handlers:
        if not isinstance(handler.formatter, Formatter):
            handler.setFormatter(Formatter(handler.formatter or logging.Formatter()))
