"""The launcher that Hydra finds under `hydra/launcher=ray` (conf/hydra/launcher/ray.yaml), whose work is done by
qexp/launch/ray_jobs.py. Hydra imports every plugin at each start, so nothing heavy is imported here."""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class RayLauncher(Launcher):
    """Runs each job of a sweep as a task of Ray's. settings: of `qexp.launch.ray_jobs.Cluster`."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from qexp.config.error_messages import exit_with_message
        from qexp.launch import ray_jobs

        with exit_with_message():
            self.cluster = ray_jobs.Cluster(**self.settings)
            self.cluster.check()
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from qexp.launch import ray_jobs

        work = ray_jobs.Work(self.hydra_context, self.task_function, self.config)
        return ray_jobs.launch(self.cluster, work, job_overrides, initial_job_idx)
