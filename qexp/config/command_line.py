"""A command line of Hydra overrides: options anywhere among them, and refusals in one sentence."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from hydra._internal import utils as hydra_utils

from qexp.config.composition import check_choices, check_quotes
from qexp.config.error_messages import exit_with_message
from qexp.system import console, credentials


def prepare() -> None:
    """Make `sys.argv` one that Hydra takes, and have errors printed as one sentence and credentials masked.

    Exits with status 1 where an override can't be read.
    """
    console.protect()
    hydra_utils.run_and_report = run_and_report
    credentials.learn_environment()
    credentials.learn(sys.argv[1:])
    sys.argv[1:] = options_first(sys.argv[1:])
    with exit_with_message():
        check_quotes(sys.argv[1:])
        check_choices(sys.argv[1:])


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
