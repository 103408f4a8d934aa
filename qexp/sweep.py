"""What a sweep owns: every job checked before the first starts, the parent run, the table, signals, the exit status.

A single run goes the same way, as an owner of one job (`single`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import secrets
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from qexp import config as schema
from qexp.config import Config
from qexp.errors import ConfigError, QexpError

log = logging.getLogger(__name__)


class Stop(BaseException):
    """Ctrl-C or SIGTERM; `code` is the exit status, 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        self.code = 128 + number
        super().__init__(signal.Signals(number).name)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGINT and SIGTERM raise Stop once, so that what is open can be closed; the next one leaves at once."""

    def stop(number: int, frame: Any) -> None:
        for again in handlers:
            signal.signal(again, lambda number, frame: os._exit(128 + number))
        raise Stop(number)

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Job:
    """A composed configuration, typed and checked, with what Hydra knows of how it came about."""

    config: Config
    choices: dict[str, str]
    overrides: dict[str, str]
    folder: Path

    @property
    def params(self) -> dict[str, str]:
        return schema.params(self.config, self.choices, self.overrides)

    @property
    def name(self) -> str:
        """What was given, else the settings that tell one run from another."""
        p = self.params
        return self.config.tracking.name or " ".join(
            [p["model"], p["dataset"], p["qconfig"], p["observer"], p["calib.batches"]]
        )


def job_from(composed: DictConfig) -> Job:
    """The job that a composition with its `hydra` node describes. Raises ConfigError."""
    hydra = composed.hydra
    with open_dict(composed):
        task = OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"])
    config = schema.from_hydra(task, hydra.runtime.cwd)
    choices = {group: str(choice) for group, choice in hydra.runtime.choices.items() if "/" not in group}
    return Job(config, choices, dict(_split(text) for text in hydra.overrides.task), Path(hydra.runtime.output_dir or ""))


def _split(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.lstrip("+~"), value


class Door(Callback):
    """Refuses a single run before Hydra makes a folder for it."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with refusals():
            schema.check(job_from(config).config)
            writable(Path(config.hydra.run.dir))


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """A QexpError ends the process with its sentence and status 1; with HYDRA_FULL_ERROR=1 it goes on as it is."""
    try:
        yield
    except QexpError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            traceback.print_exc()
        else:
            print(error, file=sys.stderr)
        sys.exit(1)


def writable(folder: Path) -> None:
    """Make `folder`, or raise ConfigError: Hydra would end in a traceback."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise ConfigError(f"the output folder {folder} can't be made: {error.strerror}; set outputs=another/folder.") from error


class Once(logging.Filter):
    """Lets each sentence through once: what all jobs of a sweep share is said by the first."""

    said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if record.levelno >= logging.WARNING or message not in Once.said:
            Once.said.add(message)
            return True
        return False


def command() -> str:
    """The shell line that repeats this."""
    return shlex.join(["python", "-m", "qexp", *sys.argv[1:]])


def run(job: Job) -> float | None:
    """Hydra's task: one run, tracked; by itself, or as one of a sweep's jobs. Returns the objective."""
    sweep = job.config.tracking.parent is not None
    if sweep:
        return tracked(job).get(job.config.objective)
    with refusals(), stoppable():
        try:
            return single(job)
        except Stop as stop:
            print(f"Stopped. To start again:\n  {command()}", file=sys.stderr)
            sys.exit(stop.code)


def single(job: Job) -> float | None:
    """One run by itself: the configuration, the inputs and the tracking server are checked before it starts."""
    from qexp import experiment, table, tracking

    schema.check(job.config)
    store = tracking.connect(job.config.tracking, Path(job.config.outputs))
    experiment.check_inputs(job.config)
    metrics = tracked(job)
    rows = [row for row in tracking.rows(store, job.config, folder=job.folder)]
    print(table.runs(rows))
    return metrics.get(job.config.objective)
