"""The networks that a benchmark measures: its own, or those of a file that the environment names."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NETWORKS = "QEXP_BENCH_NETWORKS"
"""A file with a network on each line: a name, and the settings of an ordinary run, quoted as in a shell; # begins a
comment."""


@dataclass(frozen=True)
class Network:
    """A network with its data, as settings of `python -m qexp`."""

    name: str
    settings: tuple[str, ...]


def chosen(built_in: Sequence[Network]) -> Sequence[Network]:
    """The networks of the file that QEXP_BENCH_NETWORKS names; the built-in ones where it names none.

    Ends the benchmark where the file can't be read or names no network.
    """
    path = os.environ.get(NETWORKS)
    if not path:
        return built_in
    try:
        lines = [shlex.split(line, comments=True) for line in Path(path).read_text().splitlines()]
    except (OSError, ValueError) as error:
        sys.exit(f"{NETWORKS}={path} can't be read ({error}): give a file with a name and settings on each line.")
    found = [Network(line[0], tuple(line[1:])) for line in lines if line]
    if not found or len({network.name for network in found}) < len(found):
        sys.exit(f"{NETWORKS}={path} must name one network or more, each once: a name and settings on each line.")
    return found
