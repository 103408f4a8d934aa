"""The folders that runs write their files into: none writes into another's, whichever sweep it is of."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from qexp.errors import ConfigError

RESULT = "predictions.npz"  # what a run writes first of its result (`run_files.written`)


def writable(folder: Path) -> None:
    """Make `folder`, or raise ConfigError: Hydra would end in a traceback."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        reason = f"the output folder {folder} can't be made: {error.strerror}"
        raise ConfigError(f"{reason}; set outputs=another/folder.") from error


def check_free(setting: str, folder: Path, pattern: str = RESULT) -> None:
    """Raise ConfigError where a finished run's files are in `folder`. setting: what names it; pattern: of where they
    would be in it."""
    if any(folder.glob(pattern)):
        raise ConfigError(
            f"{setting}={folder}: a finished run's files are there, and would be written over; give another folder."
        )


def hold(folder: Path) -> int | None:
    """Keep other runs out of `folder` until this process ends, or raise ConfigError where one is in it.

    The descriptor that holds it; None where the file system knows no locks.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ConfigError(f"hydra.run.dir={folder}: another run is writing there; give another folder.") from error
    except OSError:
        return None
    return descriptor


def claim(sweep: Path, wanted: Sequence[str]) -> list[str]:
    """Make a folder for each job of a sweep, of the name that is wanted within `sweep` or else the next that is free.

    The names that they have. Raises ConfigError where one can't be made; none is left then.
    """
    claimed: list[str] = []
    for name in wanted:
        try:
            claimed.append(_first_free(sweep, name))
        except OSError as error:
            leave(sweep, claimed)
            raise ConfigError(
                f"hydra.sweep.subdir: the folder {name} of a job can't be made ({error.strerror}); give another "
                "template, as ${hydra.job.num}."
            ) from error
    return claimed


def leave(sweep: Path, claimed: Sequence[str]) -> None:
    """Remove those of the folders that no job has written into."""
    for name in claimed:
        with contextlib.suppress(OSError):
            for folder in itertools.takewhile(lambda one: one != sweep, (sweep / name, *(sweep / name).parents)):
                folder.rmdir()


def save_beside(path: Path, text: str) -> None:
    """Write a new file: at `path`, or beside the one that is there."""
    for name in _names(path.stem):
        with contextlib.suppress(FileExistsError), path.with_stem(name).open("x", encoding="utf-8") as file:
            file.write(text)
            return


def _first_free(sweep: Path, wanted: str) -> str:
    """Making a folder is what tells whether it is free: two sweeps may look at the same time."""
    if Path(os.path.normpath(sweep / wanted)) == Path(os.path.normpath(sweep)):
        wanted = "0"  # a job's folder is within the sweep's
    for name in _names(wanted):
        with contextlib.suppress(FileExistsError):
            (sweep / name).parent.mkdir(parents=True, exist_ok=True)
            (sweep / name).mkdir()
            return name
    raise AssertionError("unreachable")


def _names(wanted: str) -> Iterator[str]:
    """`wanted`, and what stands in for it where it is taken: numbers go on, other names get one."""
    if wanted.isdecimal():
        return map(str, itertools.count(int(wanted)))
    return itertools.chain([wanted], (f"{wanted}-{number}" for number in itertools.count(2)))
