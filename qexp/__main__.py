"""The command line: `python -m qexp` composes a configuration with Hydra and runs one job or a sweep."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import hydra
from hydra._internal import utils as hydra_utils
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from qexp.config.composition import CONF, Composition, check_choices, check_quotes
from qexp.config.error_messages import exit_with_message
from qexp.errors import ConfigError
from qexp.launch import foreign_sweeper
from qexp.system import console, credentials


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def compose_and_run(composed: DictConfig) -> float | None:
    # torch and mlflow are imported only after this point, so that --help and refusals take no time.
    from qexp.launch import job, tracked_run

    with open_dict(composed):
        composed.hydra = HydraConfig.get()
    return tracked_run.run(job.job_from(Composition.of(composed)))


def options_first(arguments: Sequence[str]) -> list[str]:
    """The same command line with its options before the overrides.

    argparse, and so Hydra, refuses overrides that follow an option, such as -m, that stands among them.
    """
    overrides: list[str] = hydra_utils.get_args_parser().parse_intermixed_args(list(arguments)).overrides
    options, waiting = [], list(overrides)
    for argument in arguments:
        if waiting and argument == waiting[0]:
            waiting.pop(0)
        else:
            options.append(argument)
    return [*options, *overrides]


def run_and_report(func: Any) -> Any:
    """Replaces Hydra's function of this name, so that a refusal is printed as one sentence."""

    def refusing() -> Any:
        with exit_with_message():
            return func()

    return hydras_report(refusing)


hydras_report = hydra_utils.run_and_report


def main() -> None:
    console.protect()
    hydra_utils.run_and_report = run_and_report
    credentials.learn_environment()
    credentials.learn(sys.argv[1:])
    sys.argv[1:] = options_first(sys.argv[1:])
    try:
        check_quotes(sys.argv[1:])
        check_choices(sys.argv[1:])
    except ConfigError as error:
        sys.exit(str(error))
    try:
        compose_and_run()
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else None
        stopped = isinstance(error, KeyboardInterrupt) or (isinstance(code, int) and code > 128)
        foreign_sweeper.close_parent("KILLED" if stopped else "FAILED")
        raise


if __name__ == "__main__":
    main()
