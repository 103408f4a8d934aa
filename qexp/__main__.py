"""Hydra's door: `python -m qexp` composes a configuration, runs one job or a sweep, and returns the objective."""

from __future__ import annotations

import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from qexp import console
from qexp.compose import CONF, Composition, check_choices
from qexp.errors import ConfigError


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def compose_and_run(composed: DictConfig) -> float | None:
    # torch and mlflow are imported only after this point, so that --help and refusals answer at once.
    from qexp import sweep

    with open_dict(composed):
        composed.hydra = HydraConfig.get()
    return sweep.run(sweep.job_from(Composition.of(composed)))


def main() -> None:
    console.protect()
    # argparse, and so Hydra, takes overrides in one row only: with -m among them it refuses those that follow.
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda argument: argument not in ("-m", "--multirun"))
    try:
        check_choices(sys.argv[1:])
    except ConfigError as error:
        sys.exit(str(error))
    compose_and_run()


if __name__ == "__main__":
    main()
