"""The command line: `python -m qexp.export` writes a run's INT8 model in a folder that serves it."""

from __future__ import annotations

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from qexp.config import command_line, conversion, validation
from qexp.config.composition import CONF
from qexp.config.error_messages import exit_with_message


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="export")
def compose_and_export(composed: DictConfig) -> None:
    with exit_with_message():
        cwd = HydraConfig.get().runtime.cwd
        command = conversion.export_from_hydra(composed, cwd)
        validation.check_export_command(command)
        # torch and mlflow are imported only after this point, so that --help and refusals take no time.
        from qexp.export.command import export

        print(export(command, Path(cwd)))


def main() -> None:
    command_line.prepare()
    compose_and_export()


if __name__ == "__main__":
    main()
