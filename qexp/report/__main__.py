"""The command line: `python -m qexp.report` writes a report of runs that are kept in MLflow."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra._internal import utils as hydra_utils
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from qexp.config import command_line, conversion, validation
from qexp.config.composition import CONF, quoted
from qexp.config.error_messages import exit_with_message

# Settings that Hydra's grammar would take apart: a filter has quotes and signs, and two ids are no list to sweep over.
TEXTS = ("filter", "sweep", "study", "name")


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="report")
def compose_and_report(composed: DictConfig) -> None:
    with exit_with_message():
        cwd = HydraConfig.get().runtime.cwd
        command = conversion.report_from_hydra(composed, cwd)
        validation.check_report_command(command)
        # matplotlib and mlflow are imported only after this point, so that --help and refusals take no time.
        from qexp.report import command as commands

        print(commands.report(command, Path(cwd)))


def readable(argument: str) -> str:
    """An argument as Hydra reads it as it was meant: texts in quotes, and the two runs of `compare` as a list."""
    key, _, value = argument.partition("=")
    if key == "compare" and not value.startswith("["):
        return f"{key}=[{','.join(map(quoted, value.split(',')))}]"  # an id such as 1e5 would be a number
    plain = value and value not in ("null", "???") and value[0] not in "'\"" and "${" not in value
    return f"{key}={quoted(value)}" if key in TEXTS and plain else argument


def check_options(arguments: Sequence[str]) -> None:
    """Exit with a sentence where several reports are asked for at once."""
    if hydra_utils.get_args_parser().parse_intermixed_args(list(arguments)).multirun:
        sys.exit(
            "-m: `python -m qexp.report` makes one report at a time; leave it out, and start it again for another."
        )


def main() -> None:
    sys.argv[1:] = [readable(argument) for argument in sys.argv[1:]]
    command_line.prepare()
    check_options(sys.argv[1:])
    compose_and_report()


if __name__ == "__main__":
    main()
