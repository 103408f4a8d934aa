"""Hydra's callback: refuses a single run before it has a folder, and writes the composed configuration."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from qexp.config import validation
from qexp.config.composition import Composition, as_yaml
from qexp.config.error_messages import exit_with_message
from qexp.config.schema import Config
from qexp.errors import ConfigError
from qexp.launch import folders, foreign_sweeper, rerun
from qexp.launch.job import hydra_files, is_ours, job_from
from qexp.system import console, credentials


class HydraCallback(Callback):
    """Refuses a single run before Hydra makes its folder, and writes Hydra's files without credentials.

    Also releases what Hydra would hold in memory of each job.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with exit_with_message():
            job = job_from(Composition.of(config))
            validation.check(job.config)
            refuse_export(job.config)
            rerun.check(job)
            folder = Path(config.hydra.run.dir)
            refuse_credentials(str(folder), "hydra.run.dir")
            folders.make_writable(folder)
            folders.hold(folder)
            folders.check_free("hydra.run.dir", folder)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if not is_ours(config.hydra):
            with exit_with_message():
                foreign_sweeper.open_parent(config)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        foreign_sweeper.close_parent("FINISHED")

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        console.protect()  # a launcher may have started this process
        credentials.learn_environment()
        credentials.keep_out_of_logs()
        composed = Composition.of(config)
        folder = hydra_files(Path(config.hydra.runtime.output_dir), composed.hydra)
        hydra = {"hydra": composed.hydra}
        files = {"config": composed.task, "hydra": hydra, "overrides": composed.hydra.overrides.task}
        with contextlib.suppress(OSError):  # a full disk, of which the job says more; Hydra would go on after a warning
            folder.mkdir(exist_ok=True)
            for name, content in files.items():
                (folder / f"{name}.yaml").write_text(as_yaml(content), encoding="utf-8")
        if not is_ours(composed.hydra):  # another sweeper may have written this file
            mask_file(Path(composed.hydra.sweep.dir) / "multirun.yaml")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        # Hydra would hold these for all jobs until the sweep ends, a third of a megabyte each.
        job_return.cfg = job_return.hydra_cfg = None


def mask_file(file: Path) -> None:
    """Mask the credentials in a text file, if it exists and has any."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if credentials.masked(text) != text:
        file.write_text(credentials.masked(text), encoding="utf-8")


def refuse_export(config: Config) -> None:
    """Raise ConfigError where a single run is to export what is recommended."""
    if config.report.export:
        raise ConfigError(
            "report.export=true: exports what a sweep recommends, and this is a single run; add -m, or export the run "
            "with `python -m qexp.export run_id=ID` when it has finished."
        )


def refuse_credentials(folder: str, setting: str) -> None:
    """Raise ConfigError where a folder's name holds a credential, as ${hydra.job.override_dirname} may."""
    if credentials.masked(folder) != folder:
        raise ConfigError(
            f"{setting} would name a folder after a credential; give that by the environment, as in "
            "MLFLOW_TRACKING_URI, or name its setting in hydra.job.config.override_dirname.exclude_keys."
        )
