"""The command line: `python -m qexp` composes a configuration with Hydra and runs one job or a sweep."""

from __future__ import annotations

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from qexp.config import command_line
from qexp.config.composition import CONF, Composition
from qexp.launch import foreign_sweeper


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def compose_and_run(composed: DictConfig) -> float | None:
    # torch and mlflow are imported only after this point, so that --help and refusals take no time.
    from qexp.launch import job, tracked_run

    with open_dict(composed):
        composed.hydra = HydraConfig.get()
    return tracked_run.run(job.job_from(Composition.of(composed)))


def main() -> None:
    command_line.prepare()
    try:
        compose_and_run()
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else None
        stopped = isinstance(error, KeyboardInterrupt) or (isinstance(code, int) and code > 128)
        foreign_sweeper.close_parent("KILLED" if stopped else "FAILED")
        raise


if __name__ == "__main__":
    main()
