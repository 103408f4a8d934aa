"""What a sweep owns: every job checked before the first starts, the parent run, the table, signals, the exit status.

A single run goes the same way, as an owner of one job (`single`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict
from tqdm import tqdm

from qexp import compose as _registered  # noqa: F401  (resolvers, in a launcher's process)
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
    if job.config.tracking.parent is not None:
        result = tracked(job, swept=schema.GROUPS)
        print(f"#{job.number + 1}  {table.line(result)}", flush=True)
        return result.metrics.get(job.config.objective)
    with refusals(), stoppable():
        try:
            return single(job)
        except Stop as stop:
            print(f"Stopped by {stop}. To run it again:\n  {command()}", file=sys.stderr)
            sys.exit(stop.code)


def single(job: Job) -> float | None:
    """One run by itself: configuration, tracking server and inputs are checked before it starts."""
    from qexp import experiment, tracking

    schema.check(job.config)
    store = tracking.connect(job.config.tracking, Path(job.config.outputs))
    experiment.check_inputs(job.config)
    row = tracked(job)
    print(f"\n{table.runs([row])}\n")
    print(f"Saved model, predictions and timings: {job.folder}")
    print(tracking.where(store, job.config, job.choices["dataset"], run_id=row.run_id))
    return row.metrics.get(job.config.objective)


def tracked(job: Job, swept: Collection[str] = ()) -> Row:
    """The job as a run in MLflow, which ends as FINISHED, FAILED or KILLED whatever happens."""
    from qexp import experiment, tracking

    schema.check(job.config, swept)
    store = tracking.connect(job.config.tracking, Path(job.config.outputs))
    handle = tracking.start_run(
        store,
        experiment=tracking.experiment_name(job.config.tracking, job.choices["dataset"]),
        name=job.name,
        params=job.params,
        tags=job.tags,
        parent=job.config.tracking.parent,
    )
    try:
        result = experiment.run_job(job.config, job.folder)
        return handle.finish(result)
    except Stop:
        handle.kill()
        raise
    except Exception as error:
        handle.fail(sentence(error), traceback.format_exc())
        raise


def sentence(error: BaseException) -> str:
    """What an error says, in one line; an unforeseen one with its type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, QexpError) else f"{type(error).__name__}: {text}"


@dataclass(frozen=True)
class Planned:
    """A job of a sweep before it is launched: the overrides that compose it, and what they compose to."""

    overrides: list[str]
    job: Job


def own(master: DictConfig, arguments: Sequence[str], loader: Any, launcher: Any, batch_size: int | None) -> Any:
    """Run a sweep: `arguments` are overrides, some of which list several values; every combination is a job.

    All jobs are composed and checked, and the inputs of each distinct one, before the parent run is opened and the
    first job launched. Exits with status 1 where a job failed, 128 + signal where it was stopped.
    """
    with refusals(), stoppable():
        try:
            planned = plan(master, arguments, loader)
            return launch(master, planned, launcher, batch_size)
        except Stop as stop:
            print(f"Stopped by {stop}. To run it again:\n  {command()}", file=sys.stderr)
            sys.exit(stop.code)


def plan(master: DictConfig, arguments: Sequence[str], loader: Any) -> list[Planned]:
    """Every distinct job, composed and checked. Raises ConfigError for the whole sweep where one can't run."""
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(list(arguments))
    for override in overrides:
        if override.is_sweep_override() and override.get_key_element() == "experiment":
            raise ConfigError(
                f"{override.input_line}: an experiment is a sweep by itself, and several can't be swept over; "
                "start them one after the other."
            )
    combinations = BasicSweeper.split_arguments(overrides, None)[0]
    swept = [override.get_key_element().lstrip("+") for override in overrides if override.is_sweep_override()]
    planned: dict[str, Planned] = {}
    refused: dict[str, str] = {}
    for combination in tqdm(combinations, desc="checking jobs", disable=None, leave=False):
        composed = loader.load_sweep_config(master, combination)
        try:
            job = job_from(composed)
            schema.check(job.config, swept)
        except ConfigError as error:
            refused.setdefault(str(error), " ".join(combination))
            continue
        name = " ".join(short(text) for text in combination if _split(text)[0] in swept) or " ".join(map(short, combination))
        planned.setdefault(schema.config_hash(job.config), Planned([*combination, f"tracking.name={quoted(name)}"], job))
    if refused:
        reasons = "\n".join(f"{reason} ({which})" for reason, which in refused.items())
        raise ConfigError(reasons if len(combinations) == 1 else f"{reasons}\nNo job of this sweep was started.")
    if len(planned) < len(combinations):
        same = len(combinations) - len(planned)
        log.warning("%d of %d jobs would compute the same as another one and are not run twice.", same, len(combinations))
    return list(planned.values())


def short(override: str) -> str:
    """An override's value as part of a run's name: the last part of a path, `fusion=true` where a bare word says nothing."""
    key, value = _split(override)
    value = value.strip("'\"")
    if value.lower() in ("true", "false", "null") or value.replace(".", "", 1).isdigit() and not key.startswith("calib"):
        return f"{key.rpartition('.')[2]}={value}"
    return value.rstrip("/").rpartition("/")[2]


def quoted(text: str) -> str:
    """`text` as a quoted value of Hydra's override grammar."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def launch(master: DictConfig, planned: Sequence[Planned], launcher: Any, batch_size: int | None) -> Any:
    """Open the parent run, launch the jobs, close the parent with the table, and exit with 1 where a job failed."""
    from qexp import experiment, tracking

    first = planned[0].job
    folder = Path(master.hydra.sweep.dir).absolute()
    writable(folder)
    store = tracking.connect(first.config.tracking, Path(first.config.outputs))
    distinct = {experiment.inputs_of(item.job.config): item.job.config for item in planned}
    for config in tqdm(distinct.values(), desc="checking inputs", disable=None, leave=False):
        experiment.check_inputs(config)
    OmegaConf.save(master, folder / "multirun.yaml")
    experiments = {tracking.experiment_name(item.job.config.tracking, item.job.choices["dataset"]) for item in planned}
    name = f"{first.choices.get('experiment') or 'sweep'} {folder.name}"
    parent = tracking.open_parent(store, min(experiments), name, {"command": command(), **first.tags})
    jobs = f"{len(planned)} job" + ("s" if len(planned) > 1 else "")
    print(f"{jobs}, in the MLflow experiment {min(experiments)} as children of {name!r}", flush=True)
    failed: list[Row] = []
    status, code = "FINISHED", 0
    returns: list[Any] = []
    try:
        for chunk in BasicSweeper.split_overrides_to_chunks([item.overrides for item in planned], batch_size):
            launched = [[*overrides, f"tracking.parent={parent}"] for overrides in chunk]
            returns.append(launcher.launch(launched, initial_job_idx=sum(map(len, returns))))
    except Stop as stop:
        status, code = "KILLED", stop.code
    except BaseException:
        status, code = "FAILED", 1
        raise
    finally:
        failed = [_unstarted(item) for batch in returns for item in batch if item.status is not JobStatus.COMPLETED]
        rows = tracking.children(store, parent)
        rows += [row for row in failed if row.name not in {known.name for known in rows}]
        text = summary(rows)
        if status == "FINISHED" and any(row.status != "FINISHED" for row in rows):
            status, code = "FAILED", 1
        tracking.close_parent(store, parent, status, text, rows)
        print(f"\n{text}\n")
        print(tracking.where(store, first.config, first.choices["dataset"], parent=parent))
    if code > 1:
        print(f"Stopped; {len(rows)} of {len(planned)} jobs had been started. To go on:\n  {command()}", file=sys.stderr)
    if code:
        sys.exit(code)
    return returns
