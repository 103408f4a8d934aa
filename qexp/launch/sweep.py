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
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from qexp.config import code_digest, schema
from qexp.config.composition import Composer, Composition, as_yaml, combinations, known, quoted, spelled
from qexp.config.refusals import refusals
from qexp.config.schema import Config, LogModel
from qexp.errors import ConfigError
from qexp.launch import folders, jobs, progress, resume, trials
from qexp.records import Row
from qexp.report import effects, tables
from qexp.system import console, credentials

if TYPE_CHECKING:
    from qexp.tracking.run import Run
    from qexp.tracking.store import Store

log = logging.getLogger(__name__)

GIVEN = ("tracking.name", "tracking.parent")  # to its jobs, by a sweep


class Stop(BaseException):
    """Ctrl-C, SIGTERM or SIGHUP (a closed terminal); `code` is the exit status, 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        self.code = 128 + number
        super().__init__(number)  # as given, for pickle makes it again from this

    def __str__(self) -> str:
        return signal.Signals(self.args[0]).name


# The signal that this process has received, until the outermost `stoppable` is left.
_received: list[Stop] = []


def _receive(number: int, frame: Any) -> None:
    if _received:
        if number == signal.SIGHUP:  # sent by the shell and by the system; nobody is impatient
            return
        os._exit(128 + number)
    _received.append(Stop(number))
    raise _received[0]


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise Stop once, so that what is open can be closed; the next one leaves at once.

    Contexts may be nested. Stop is what leaves each of them even where the code that the signal hit swallowed it or
    died of it in another way, as OmegaConf does; SystemExit is not touched, for it means that the stop was dealt with.
    SIGHUP that was ignored when this process started, as by nohup, still is. Outside the main thread, where Python
    delivers no signal, nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    stopping = [signal.SIGINT, signal.SIGTERM, *([] if ignored else [signal.SIGHUP])]
    before = {number: signal.signal(number, _receive) for number in stopping}
    try:
        if not _received:  # else it was swallowed before this context
            yield
        if _received:
            raise _received[0]
    except (Stop, SystemExit):
        raise
    except BaseException as error:
        if _received:
            raise _received[0] from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if _receive not in before.values():
            _received.clear()


@contextlib.contextmanager
def until_stopped() -> Iterator[None]:
    """`stoppable`, whose Stop ends the process with how to go on and its exit status."""
    try:
        with stoppable():
            yield
    except Stop as stop:
        print(f"Stopped by {stop}. To run it again:\n  {command()}", file=sys.stderr)
        sys.exit(stop.code)


@dataclass(frozen=True)
class Job:
    """A composed configuration, typed and checked, with what Hydra knows of how it came about.

    number: among a sweep's jobs, from 0; alone: whether it is none of a sweep's; hydra_files: the folder in which Hydra
    writes down what it composed, None where it doesn't; foreign: whether the sweep is another sweeper's than qexp's,
    which doesn't tell its jobs beforehand.
    """

    config: Config
    choices: dict[str, str]
    overrides: dict[str, str]
    folder: Path
    cwd: Path
    number: int = 0
    alone: bool = True
    hydra_files: Path | None = None
    foreign: bool = False

    @property
    def params(self) -> dict[str, str]:
        return schema.params(self.config, self.choices, self.overrides)

    @property
    def name(self) -> str:
        """What was given, else the settings that tell one run from another; where it is one of several that nobody has
        compared, with its number."""
        p = self.params
        batches = "all" if self.config.calib.batches is None else p["calib.batches"]
        name = self.config.tracking.name or " ".join([p["model"], p["dataset"], p["qconfig"], p["observer"], batches])
        return f"{name} #{self.number + 1}" if self.foreign else name


def job_from(composed: Composition) -> Job:
    """The job that a composition describes. Raises ConfigError."""
    hydra = composed.hydra
    with known(hydra):
        config = schema.from_hydra(composed.task, hydra.runtime.cwd)
    choices = {group: str(choice) for group, choice in hydra.runtime.choices.items() if "/" not in group}
    number = OmegaConf.select(hydra, "job.num", throw_on_missing=False) or 0
    overrides = _given(composed.overrides)
    alone = hydra.mode is not RunMode.MULTIRUN
    folder, cwd = Path(OmegaConf.select(hydra, "runtime.output_dir") or ""), Path(hydra.runtime.cwd)
    foreign = not alone and not is_ours(hydra)
    return Job(config, choices, overrides, folder, cwd, number, alone, hydra_files(folder, hydra), foreign)


def is_ours(hydra: DictConfig) -> bool:
    """Whether Hydra's sweeper is qexp's."""
    return str(OmegaConf.select(hydra, "sweeper._target_")).startswith("hydra_plugins.qexp_sweeper.")


def hydra_files(folder: Path, hydra: DictConfig) -> Path:
    """Where in a job's folder it is written down what Hydra composed."""
    return folder / (hydra.output_subdir or ".hydra")


def _given(overrides: Sequence[str]) -> dict[str, str]:
    """What overrides set, by the names of the settings, as text; none of them lists several values."""
    given: dict[str, str] = {}
    for override in overrides:
        key, value = _split(override)
        if value.lstrip().startswith("{"):
            tree: Any = OverridesParser.create().parse_override(override).value()
            given |= {name: str(item) for name, item in schema.flat({key: tree}).items()}
        else:
            given[key] = value
    return given


def _split(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.lstrip("+~"), value


class Door(Callback):
    """Refuses a single run before Hydra makes a folder for it, writes down what Hydra composed as Hydra does, but for
    credentials, and lets go of what Hydra would keep of each job."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with refusals():
            job = job_from(Composition.of(config))
            schema.check(job.config)
            resume.check(job)
            folder = Path(config.hydra.run.dir)
            without_credentials(str(folder), "hydra.run.dir")
            folders.writable(folder)
            folders.hold(folder)
            folders.check_free("hydra.run.dir", folder)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if not is_ours(config.hydra):
            with refusals():
                trials.begin(config)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        trials.end("FINISHED")

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        console.protect()  # a launcher may have begun this process
        credentials.learn_environment()
        credentials.keep_out_of_logs()
        composed = Composition.of(config)
        folder = hydra_files(Path(config.hydra.runtime.output_dir), composed.hydra)
        folder.mkdir(exist_ok=True)
        hydra = {"hydra": composed.hydra}
        files = {"config": composed.task, "hydra": hydra, "overrides": composed.hydra.overrides.task}
        for name, content in files.items():
            (folder / f"{name}.yaml").write_text(as_yaml(content), encoding="utf-8")
        if not is_ours(composed.hydra):  # whose sweeper may have written this
            mask_file(Path(composed.hydra.sweep.dir) / "multirun.yaml")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        # Of all jobs of a sweep until it ends, a third of a megabyte each.
        job_return.cfg = job_return.hydra_cfg = None


def mask_file(file: Path) -> None:
    """Mask the credentials in a text file, if it is there and holds any."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if credentials.masked(text) != text:
        file.write_text(credentials.masked(text), encoding="utf-8")


def without_credentials(folder: str, setting: str) -> None:
    """Raise ConfigError where a folder's name would tell a credential, as ${hydra.job.override_dirname} may."""
    if credentials.masked(folder) != folder:
        raise ConfigError(
            f"{setting} would name a folder after a credential; give that by the environment, as in "
            "MLFLOW_TRACKING_URI, or name its setting in hydra.job.config.override_dirname.exclude_keys."
        )


class Once(logging.Filter):
    """Lets each sentence through once: what all jobs of a sweep share is said by the first."""

    said: ClassVar[set[str]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if record.levelno >= logging.WARNING or message not in Once.said:
            Once.said.add(message)
            return True
        return False


def command() -> str:
    """The shell line that repeats this, but for credentials."""
    return shlex.join(["python", "-m", "qexp", *credentials.masked_tree(sys.argv[1:])])


def run(job: Job) -> float | None:
    """Hydra's task: one run, tracked; by itself, or as one of a sweep's jobs. Returns the objective."""
    if job.config.tracking.parent is not None and not job.foreign:
        with stoppable():
            return swept(job)
    if not job.alone:  # a job of another sweeper, which handles what is raised
        return single(job)
    with refusals(), until_stopped():
        return single(job)


def single(job: Job) -> float | None:
    """One run by itself: configuration, tracking server and inputs are checked before it starts."""
    from qexp import tracking

    schema.check(job.config)
    if job.foreign:
        folders.check_free("hydra.sweep.subdir", job.folder)
    jobs.start_server()
    store = tracking.connect(job.config.tracking, Path(job.config.outputs), job.cwd)
    resume.close_orphans(store)
    earlier = resume.earlier(store, job)
    if earlier:
        job = earlier.job
    experiment = store.experiment_name(job.choices["dataset"])
    tracking.check_run(store, experiment=experiment, params=job.params, resume=job.alone)
    if job.alone:
        say_ignored(sweep=False)
    jobs.check_inputs([job.config])
    row, handle = tracked(job, swept=schema.GROUPS if earlier else ())
    print(f"\n{summary([row])}\n")
    if earlier:
        print(f"{earlier.compared(row)}\n")
    say_where(job.folder, tracking.ui(store, handle))
    return row.metrics.get(job.config.objective)


def say_ignored(sweep: bool) -> None:
    """Log which of MLflow's environment variables are set and not followed."""
    from qexp import tracking

    for sentence in tracking.ignored(sweep):
        log.warning(sentence)


def swept(job: Job) -> float | None:
    """One of a sweep's jobs, with its line and its step of the bar, whether it is finished or fails."""
    try:
        row, _ = tracked(job, swept=schema.GROUPS)
    except Exception as error:
        row = failed(job.name, error)
        progress.report(f"#{job.number + 1}  {tables.failures([row])}", row)
        raise
    progress.report(f"#{job.number + 1}  {tables.line(row)}", row)
    return row.metrics.get(job.config.objective)


def tags(job: Job) -> dict[str, str]:
    """What a run is known by before it has computed anything."""
    given = {
        "study": job.config.study,
        "experiment": job.choices.get("experiment"),
        "command": command(),
        "rerun_of": job.config.rerun,
    }
    return {name: value for name, value in given.items() if value not in (None, "None", "null")}


def tracked(job: Job, swept: Collection[str] = ()) -> tuple[Row, Any]:
    """The job as a run in MLflow, which ends as FINISHED, FAILED or KILLED whatever happens; its row and its handle."""
    from qexp import tracking

    schema.check(job.config, swept)
    store = tracking.connect(job.config.tracking, Path(job.config.outputs), job.cwd)
    with tracking.start_run(
        store,
        experiment=store.experiment_name(job.choices["dataset"]),
        name=job.name,
        params=job.params,
        tags={**tags(job), **code_digest.tags(job.config)},
        parent=job.config.tracking.parent,
        # Hydra's own count tells a single run from a job of another sweeper than ours.
        resume=job.alone,
    ) as handle:
        # At once, so that a run that fails or is killed can be repeated too.
        handle.log_artifacts({"config.json": schema.plain(job.config)})
        result = jobs.run(job.config, job.folder)
        found = {**result.tags, "doubts": "\n".join(result.doubts)}
        files = {name: Path(path) for name, path in result.files.items()}
        # Here and not in the job's process, which is begun ahead, before Hydra has written its files.
        if job.hydra_files is not None and job.hydra_files.is_dir():
            files["hydra"] = job.hydra_files
        kept = job.config.tracking.log_model
        if kept is LogModel.none or (kept is LogModel.auto and not job.alone):
            files.pop("model")
        if kept is LogModel.flavor:
            handle.log_model(**result.flavor)
        used = [tracking.DatasetUse(**use) for use in result.datasets]
        handle.log_result(result.metrics, found, files, used, result.resolved)
    params = {**job.params, **result.resolved}
    row = Row(handle.id, job.name, "FINISHED", params=params, metrics=result.metrics, tags={**tags(job), **found})
    return row, handle


@dataclass(frozen=True)
class Planned:
    """A job of a sweep before it is launched: the overrides that compose it, and what they compose to."""

    overrides: list[str]
    job: Job
    name: str


def own(
    master: DictConfig, params: Sequence[str], typed: Sequence[str], loader: Any, launcher: Any, batch_size: int | None
) -> Any:
    """Run a sweep: overrides, some of which list several values; every combination is a job.

    params: those of the sweep itself (`hydra.sweeper.params`, as a ready study has them); typed: those of the command
    line, which stand in place of the sweep's own where they are of the same.
    All jobs are composed and checked, and the inputs of each distinct one, before the parent run is opened and the
    first job launched. Exits with status 1 where a job failed, 128 + signal where it was stopped.
    """
    with refusals(), until_stopped():
        jobs.start_server()  # it imports torch while this process composes the jobs and imports MLflow
        hide_from_names(master)
        composer = Composer(master, loader)
        return launch(master, composer, plan(composer, params, typed), launcher, batch_size)


def hide_from_names(master: DictConfig) -> None:
    """What a sweep gives to its jobs, and nobody has typed, is no part of Hydra's `override_dirname`, whatever else the
    user has taken out of it."""
    excluded = list(master.hydra.job.config.override_dirname.exclude_keys)
    if not set(GIVEN) <= set(excluded):
        keys = spelled([*excluded, *GIVEN])
        master.hydra.overrides.hydra.append(f"hydra.job.config.override_dirname.exclude_keys={keys}")


def plan(composer: Composer, params: Sequence[str], typed: Sequence[str]) -> list[Planned]:
    """Every distinct job, composed and checked. Raises ConfigError for the whole sweep where one can't run."""
    given = composer.parse(typed)
    own = [one for one in composer.parse(params) if not any(composer.replaces(other, one) for other in given)]
    overrides = [*own, *given]
    for override in overrides:
        if override.is_sweep_override() and override.key_or_group == "experiment":
            raise ConfigError(
                f"{override.input_line}: an experiment is a sweep by itself, and several can't be swept over; "
                "start them one after the other."
            )
    swept = [override.key_or_group for override in overrides if override.is_sweep_override()]
    places = [
        place
        for place, override in enumerate(overrides)
        if override.is_sweep_override() and not any(composer.replaces(o, override) for o in overrides[place + 1 :])
    ]
    found: dict[str, tuple[list[str], Job]] = {}
    refused: dict[str, str] = {}
    every = combinations(overrides)
    for combination in tqdm(every, desc="checking jobs", disable=None, leave=False):
        composed = composer(combination)
        try:
            job = job_from(composed)
            schema.check(job.config, swept)
            resume.check(job)
            if credentials.masked_tree(combination) != combination:
                without_credentials(composer.subfolder(combination, 0), "hydra.sweep.subdir")
        except ConfigError as error:
            refused.setdefault(str(error), " ".join(combination))
            continue
        found.setdefault(schema.config_hash(job.config), (combination, job))
    if refused:
        reasons = "\n".join(f"{reason} ({which})" for reason, which in refused.items())
        raise ConfigError(reasons if len(every) == 1 else f"{reasons}\nNo job of this sweep was started.")
    if len(found) < len(every):
        same = len(every) - len(found)
        log.warning("%d of %d jobs would compute the same as another and are not run twice.", same, len(every))
    told = [credentials.masked_tree(combination) for combination, _ in found.values()]
    telling = [[combination[place] for place in places] or combination for combination in told]
    return [
        Planned([*combination, f"tracking.name={quoted(name)}"], job, name)
        for (combination, job), name in zip(found.values(), names(telling), strict=True)
    ]


def names(telling: Sequence[Sequence[str]]) -> list[str]:
    """A name for each job of a sweep, no two alike. telling: the overrides that tell it from the others."""
    short_names = [plain(" ".join(map(short, overrides))) for overrides in telling]
    counts = Counter(short_names)
    return [
        name if counts[name] == 1 else plain(" ".join(overrides))
        for name, overrides in zip(short_names, telling, strict=True)
    ]


def plain(text: str) -> str:
    """`text` without what OmegaConf would take for an interpolation or an escape."""
    return text.replace("\\", "/").replace("$", "")


def short(override: str) -> str:
    """An override's value as part of a run's name: a path's last part; `fusion=true` where a bare word says nothing."""
    key, value = _split(override)
    value = value.strip("'\"")
    if value.lower() in ("true", "false", "null") or value.replace(".", "", 1).isdigit():
        return f"{key.rpartition('.')[2]}={value}"
    return value.rstrip("/").rpartition("/")[2]


def launch(
    master: DictConfig, composer: Composer, planned: Sequence[Planned], launcher: Any, batch_size: int | None
) -> Any:
    """Open the parent run, launch the jobs, close the parent with the table, and exit with 1 where a job failed."""
    from qexp import tracking

    first = planned[0].job
    folder = Path(os.path.abspath(master.hydra.sweep.dir))  # noqa: PTH100  (as Hydra does, links are not followed)
    folders.writable(folder)
    store = tracking.connect(first.config.tracking, Path(first.config.outputs), first.cwd)
    experiments = sorted({store.experiment_name(item.job.choices["dataset"]) for item in planned})
    for name in experiments:
        tracking.check_experiment(store, name)
    say_ignored(sweep=True)
    resume.close_orphans(store)
    study = resume.study(store, planned, experiments)
    left = study.left(planned)
    if left:
        jobs.check_inputs([item.job.config for item in left])
    wanted = [composer.subfolder(item.overrides, number) for number, item in enumerate(left)]
    claimed = folders.claim(folder, wanted)
    folders.save_beside(folder / "multirun.yaml", as_yaml(master))

    title = f"{tags(first).get('experiment', 'sweep')} {first.config.study or folder.name}"
    try:
        parent = study.open(store, experiment=experiments[0], name=title, tags=tags(first))
    except BaseException:
        folders.leave(folder, claimed)
        raise
    all_jobs = f"{len(planned)} job{'s' if len(planned) > 1 else ''}"
    print(f"{all_jobs}; runs go to the MLflow experiment {experiments[0]}, under {parent.name!r}.", flush=True)
    returns: list[Any] = []
    status, code = "FINISHED", 0
    try:
        with stoppable(), progress.over(len(planned), len(planned) - len(left)):
            every = [[*item.overrides, f"tracking.parent={parent.id}"] for item in left]
            for overrides, name, other in zip(every, claimed, wanted, strict=True):
                overrides += [f"hydra.sweep.subdir={quoted(name)}"] if name != other else []
            one_by_one = isinstance(launcher, BasicLauncher) and first.config.job.ahead
            following = successor(composer, every, [folder / name for name in claimed])
            turn = folder / f".turn-{parent.id}"  # another sweep may use the folder at the same time
            with jobs.in_turn(following, turn) if one_by_one else contextlib.nullcontext():
                for chunk in BasicSweeper.split_overrides_to_chunks(every, batch_size) if left else []:
                    returns.append(launcher.launch(chunk, initial_job_idx=sum(map(len, returns))))
    except Stop as stop:
        status, code = "KILLED", stop.code
    except BaseException:
        status = "FAILED"
        raise
    finally:
        folders.leave(folder, claimed)
        rows = study.new(tracking.children(store, parent.id, experiments))
        tracked_names = {row.name for row in rows}
        rows += [row for batch in returns for row in map(unstarted, batch) if row and row.name not in tracked_names]
        rows = study.with_done(planned, rows)
        if status == "FINISHED" and any(row.status != "FINISHED" for row in rows):
            status, code = "FAILED", 1
        close(store, parent, rows, status, folder)
    if status == "KILLED":
        finished = sum(row.status == "FINISHED" for row in rows)
        print(f"Stopped after {finished} of {all_jobs}. To run it again:\n  {command()}", file=sys.stderr)
    if code:
        sys.exit(code)
    return returns


def close(store: Store, parent: Run, rows: Sequence[Row], status: str, folder: Path) -> None:
    """End a sweep's run with the table of its jobs, which is printed too, and where everything is."""
    from qexp import tracking

    text = summary(rows)
    counts = Counter(row.status.lower() for row in rows)
    tracking.close_parent(parent, status, text, {name: counts[name] for name in ("finished", "failed", "killed")})
    print(f"\n{text}\n")
    say_where(folder, tracking.ui(store, parent, sort_by="accuracy/int8"))


def successor(
    composer: Composer, launched: Sequence[Sequence[str]], places: Sequence[Path]
) -> Callable[[Path], tuple[Config, Path] | None]:
    """From the folder of a job to the next one's configuration and folder, as Hydra's own launcher will have them.

    launched: the overrides of each job; places: its folder.
    """

    def after(current: Path) -> tuple[Config, Path] | None:
        number = places.index(current) + 1 if current in places else len(places)
        return (job_from(composer(launched[number])).config, places[number]) if number < len(places) else None

    return after


def unstarted(returned: Any) -> Row | None:
    """A failed job as a row, in case it failed before it had a run; None where it did not fail."""
    if returned.status is JobStatus.COMPLETED:
        return None
    given = OverridesParser.create().parse_overrides(list(returned.overrides))
    name = next((str(one.value()) for one in given if one.key_or_group == "tracking.name"), "job")
    return failed(name, returned._return_value)


def failed(name: str, error: Exception) -> Row:
    """The row of a job that has failed."""
    from qexp import tracking

    return Row("", name, "FAILED", tags={"error": tracking.sentence(error)})


def summary(rows: Sequence[Row]) -> str:
    """What a sweep prints in the end: what all runs share, the runs, the effects, and every job that failed.

    CPUs whose INT8 kernels answer otherwise (the tag kernel_signature) are never pooled: each has its own tables.
    """
    alike: dict[str, list[Row]] = {}
    for row in effects.finished(rows):
        alike.setdefault(row.tags.get("kernel_signature", ""), []).append(row)
    parts = [
        part(group)
        for group in alike.values() or [[]]
        for part in (shared, tables.runs, tables.latencies, tables.effects_text, tables.draws, tables.calibration)
    ]
    return "\n\n".join(part for part in [*parts, tables.failures(rows)] if part)


def shared(rows: Sequence[Row]) -> str:
    """The machine and the model, once above the table."""
    tags = rows[0].tags if rows else {}
    return f"{tags['cpu']} ({tags['isa']}), torch {tags['torch']}; {tags['float_model']}" if "cpu" in tags else ""


def say_where(folder: Path, ui: Any) -> None:
    print(f"Files: {folder}")
    if ui.command:
        given = f", with the password for {credentials.MASK}" if credentials.MASK in ui.command else ""
        print(f"Compare in MLflow{given}:\n  {ui.command}\nand open {ui.url}")
    else:
        print(f"Compare in MLflow: {ui.url}")
