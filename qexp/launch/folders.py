"""The folders that runs write their files into; no run writes into another's folder."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from qexp.errors import ConfigError

RESULT = "predictions.npz"  # the first file that a run writes of its result (`run_files.written`)


def make_writable(folder: Path) -> None:
    """Make `folder`, or raise ConfigError where it can't be written to, for which Hydra prints a traceback."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        reason = f"the output folder {folder} can't be made: {error.strerror}"
        raise ConfigError(f"{reason}; set outputs=another/folder.") from error


def check_free(setting: str, folder: Path, pattern: str = RESULT) -> None:
    """Raise ConfigError where `folder` has a finished run's files.

    setting: the one that names the folder; pattern: a glob of such files in it.
    """
    if any(folder.glob(pattern)):
        raise ConfigError(
            f"{setting}={folder}: a finished run's files are there, and would be written over; give another folder."
        )


def hold(folder: Path) -> int | None:
    """Keep other runs out of `folder` until this process ends, or raise ConfigError where one is in it.

    Returns the descriptor that holds the lock, or None where the file system has no locks.
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
    """Make a folder within `sweep` for each job, by the name that is wanted or the next that is free.

    Returns their names. Raises ConfigError where one can't be made, and leaves none then.
    """
    claimed: list[str] = []
    for name in wanted:
        try:
            claimed.append(_first_free(sweep, name))
        except OSError as error:
            remove_unused(sweep, claimed)
            raise ConfigError(
                f"hydra.sweep.subdir: the folder {name} of a job can't be made ({error.strerror}); give another "
                "template, as ${hydra.job.num}."
            ) from error
    return claimed


def remove_unused(sweep: Path, claimed: Sequence[str]) -> None:
    """Remove the claimed folders that no job has written into."""
    for name in claimed:
        with contextlib.suppress(OSError):
            for folder in itertools.takewhile(lambda one: one != sweep, (sweep / name, *(sweep / name).parents)):
                folder.rmdir()


def save_beside(path: Path, text: str) -> None:
    """Write a new file at `path`, or by the next free name where there is a file already."""
    for name in _names(path.stem):
        with contextlib.suppress(FileExistsError), path.with_stem(name).open("x", encoding="utf-8") as file:
            file.write(text)
            return


def _first_free(sweep: Path, wanted: str) -> str:
    """Make the folder, or the next that is free, and return its name.

    Only making a folder tells that it is free, since two sweeps may look at the same time.
    """
    if Path(os.path.normpath(sweep / wanted)) == Path(os.path.normpath(sweep)):
        wanted = "0"  # a job's folder is within the sweep's
    for name in _names(wanted):
        with contextlib.suppress(FileExistsError):
            (sweep / name).parent.mkdir(parents=True, exist_ok=True)
            (sweep / name).mkdir()
            return name
    raise AssertionError("unreachable")


def _names(wanted: str) -> Iterator[str]:
    """`wanted`, then the names to try where it is taken: the next numbers, or the name with a number after it."""
    if wanted.isdecimal():
        return map(str, itertools.count(int(wanted)))
    return itertools.chain([wanted], (f"{wanted}-{number}" for number in itertools.count(2)))
