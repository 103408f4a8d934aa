"""Jobs of a sweep as tasks of Ray's (https://docs.ray.io), on a cluster that runs or on one of this machine's own.

As thin as Hydra's own launchers: a task composes its job and runs it as they do. Ray runs no task a second time, so
that whatever becomes of a worker, or of a whole node, no job runs twice without anybody asking for it.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import re
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict
from tqdm import tqdm

from qexp.errors import ConfigError, InputError, RunError
from qexp.system import machine

log = logging.getLogger(__name__)

OBJECT_STORE = 100 * 2**20  # bytes; what jobs return is a few kB
POLL_SECONDS = 0.5  # between two looks at whether this process was told to stop
GRACE_SECONDS = 20.0  # in which jobs that are told to stop close their runs

# What Ray reads of the environment when it is imported: no report of its use to its makers.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


# Ray's switch for systems where a node is to listen on 127.0.0.1 alone, whatever address it is given otherwise.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

ANSWER_SECONDS = 10.0  # Ray itself tries for minutes


@dataclass(frozen=True)
class Cluster:
    """Where jobs run, and what each takes.

    address: of a running cluster's head, as `host:port`, or `auto`; None for one on this machine that is started for
    the sweep, listens on 127.0.0.1 and has no dashboard; num_cpus: threads; memory_gb: in units of 10^9 bytes. Raises
    ConfigError where Ray isn't installed, the address is none, or a job takes nothing.
    """

    address: str | None
    num_cpus: float
    memory_gb: float

    def __post_init__(self) -> None:
        if importlib.util.find_spec("ray") is None:
            raise ConfigError(
                "hydra/launcher=ray: Ray is not installed; install it by pip install 'qexp[ray]', or leave out "
                "hydra/launcher: job.at_a_time jobs then run at a time on this machine."
            )
        for name, value in (("num_cpus", self.num_cpus), ("memory_gb", self.memory_gb)):
            if not value > 0:
                raise ConfigError(f"hydra.launcher.{name}={value}: a job takes some; give a number above 0.")

        if self.address not in (None, "auto") and not re.fullmatch(r"[^/\s]+:\d+", str(self.address)):
            raise ConfigError(
                f"hydra.launcher.address={self.address}: give host:port of a cluster's head, auto for the one "
                "that runs on this machine, or null for one that is started for the sweep."
            )

    @property
    def memory(self) -> int:
        return int(self.memory_gb * 1e9)

    def check(self) -> None:
        """Raise InputError where no process answers at the address."""
        if self.address in (None, "auto"):
            return
        host, _, port = str(self.address).rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise self._unanswered() from error

    def _unanswered(self) -> InputError:
        return InputError(
            f"hydra.launcher.address={self.address}: no cluster of Ray's answers there; give host:port of one that "
            "runs, or leave it out for one on this machine."
        )

    @contextmanager
    def connected(self) -> Iterator[Any]:
        """The package `ray`, connected to the cluster within the context. Raises InputError where it can't be."""
        variables = {**QUIET, **(LOOPBACK if self.address is None else {})}
        os.environ.update({name: os.environ.get(name, value) for name, value in variables.items()})
        import ray

        # What a job prints comes with its result: what Ray would bring of it in time is up to chance.
        quiet: Any = {"logging_level": logging.ERROR, "log_to_driver": False}
        told = signal.getsignal(signal.SIGTERM)  # Ray would end this process by a handler of its own
        try:
            if self.address is None:
                # A job that takes more than there is runs alone, and says so (`tracked_run.check_here`).
                ray.init(
                    "local", num_cpus=max(machine.allowed_cores(), int(self.num_cpus)),
                    _memory=max(self.memory, machine.describe().memory or 0), object_store_memory=OBJECT_STORE,
                    include_dashboard=False, **quiet,
                )  # fmt: skip
            else:
                ray.init(self.address, **quiet)
        except ConnectionError as error:
            raise self._unanswered() from error
        except RuntimeError as error:
            raise InputError(
                f"hydra/launcher=ray: Ray can't be started: {str(error).strip().splitlines()[0]}"
            ) from error
        finally:
            signal.signal(signal.SIGTERM, told)
        try:
            yield ray
        finally:
            ray.shutdown()


@dataclass(frozen=True)
class Work:
    """The parts of Hydra's launchers that compose and run a job."""

    hydra_context: HydraContext
    task_function: TaskFunction
    config: DictConfig


@dataclass(frozen=True)
class Place:
    """The parts of this process that a job must find in its worker, too: the working folder, and the variables of the
    environment that MLflow and numerical libraries read. Passed as an argument, which Ray shows nowhere."""

    cwd: str
    environment: Mapping[str, str]

    @staticmethod
    def here() -> Place:
        mlflow = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")}
        return Place(os.getcwd(), {**mlflow, **machine.numerics_environment()})  # noqa: PTH109

    def enter(self) -> None:
        """Make this process such a place. Raises InputError where the folder isn't there."""
        for name in machine.numerics_environment():  # such as the OMP_NUM_THREADS that Ray sets
            del os.environ[name]
        os.environ.update(self.environment)
        try:
            os.chdir(self.cwd)
        except OSError as error:
            raise InputError(
                f"{self.cwd}, the sweep's working folder, is not on {machine.host()} ({error.strerror}); start the "
                "sweep in a folder that all nodes share."
            ) from error


def launch(cluster: Cluster, work: Work, job_overrides: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
    """Run these jobs on the cluster, as many at a time as fit there, and return what Hydra's launchers return.

    Prints what a job has printed when it ends. first: the number of the first job in its sweep. A job whose worker or
    node is gone has failed.
    """
    setup_globals()
    with cluster.connected() as ray:
        _log_nodes(cluster, ray.nodes())
        task = ray.remote(_run).options(
            num_cpus=cluster.num_cpus,
            memory=cluster.memory,
            max_retries=0,
            scheduling_strategy="SPREAD",
            name="qexp job",
        )
        shared = ray.put((work, Singleton.get_state(), Place.here()))
        jobs = {task.remote(shared, first + number, list(job)): number for number, job in enumerate(job_overrides)}
        returned: dict[int, JobReturn] = {}
        left = list(jobs)
        try:
            while left:
                ended, left = ray.wait(left, num_returns=len(left), timeout=POLL_SECONDS)
                for one in ended:
                    returned[jobs[one]], printed = _ended(ray, one, job_overrides[jobs[one]])
                    tqdm.write(printed, end="")
        except BaseException:
            for one in left:
                ray.cancel(one, force=False)
            ray.wait(left, num_returns=len(left), timeout=GRACE_SECONDS)
            raise
        return [returned[number] for number in range(len(jobs))]


def _log_nodes(cluster: Cluster, nodes: Sequence[Mapping[str, Any]]) -> None:
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    cpus = sum(node.get("CPU", 0) for node in alive)
    count = f"{len(alive)} node{'s' if len(alive) > 1 else ''}"
    log.info("Ray has %s with %g CPUs; each job takes %g, and %g GB.", count, cpus, cluster.num_cpus, cluster.memory_gb)
    fits = [
        node for node in alive if node.get("CPU", 0) >= cluster.num_cpus and node.get("memory", 0) >= cluster.memory
    ]
    if not fits:
        log.warning(
            "no node of Ray's has %g CPUs and %g GB, and jobs wait until one has; with hydra.launcher.num_cpus and "
            "hydra.launcher.memory_gb they take less.", cluster.num_cpus, cluster.memory_gb,
        )  # fmt: skip


def _ended(ray: Any, reference: Any, overrides: Sequence[str]) -> tuple[JobReturn, str]:
    """The result of a task, and what it has printed; a failed job where there is nothing, since its worker is gone."""
    try:
        found: tuple[JobReturn, str] = ray.get(reference)
        return found
    except ray.exceptions.RayTaskError as error:
        failure: Exception = error.cause
    except ray.exceptions.RayError as error:
        failure = RunError(f"its worker is gone, as Ray says: {str(error).strip().splitlines()[0]}")
    returned = JobReturn(overrides=overrides, status=JobStatus.FAILED)
    returned.return_value = failure
    return returned, ""


def _run(shared: tuple[Work, dict[Any, Any], Place], number: int, overrides: list[str]) -> tuple[JobReturn, str]:
    """A job in a worker of Ray's, as Hydra's launchers run it, and what it has printed."""
    work, singletons, place = shared
    place.enter()
    setup_globals()
    Singleton.set_state(singletons)
    composed = work.hydra_context.config_loader.load_sweep_config(work.config, overrides)
    with open_dict(composed):
        composed.hydra.job.id = f"{composed.hydra.job.name}_{number}"
        composed.hydra.job.num = number
    HydraConfig.instance().set_config(composed)
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        returned = run_job(
            hydra_context=work.hydra_context, task_function=work.task_function, config=composed,
            job_dir_key="hydra.sweep.dir", job_subdir_key="hydra.sweep.subdir",
        )  # fmt: skip
    return returned, printed.getvalue()
