"""The export of what a report recommends, by `python -m qexp.export` in a process of its own, since it needs torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qexp.config.composition import quoted
from qexp.records import Precision
from qexp.report import wording
from qexp.report.decision import Answer
from qexp.report.findings import Findings
from qexp.report.next_commands import Exportable, NextCommands, exportable, from_here
from qexp.system import credentials

if TYPE_CHECKING:
    from qexp.tracking.store import Store


def export(found: Sequence[Findings], commands: NextCommands, store: Store) -> str:
    """Write the folder of the model that each study's recommendation means, and return what to print of it.

    Where it can't be told what to ship, nothing is written. An export that fails is a sentence.
    """
    told = [_exported(one, commands, store) for one in found]
    if len(found) > 1:
        told = [f"{wording.study(one.study)}:\n{text}" for one, text in zip(found, told, strict=True)]
    return "\n".join(told)


def _exported(found: Findings, commands: NextCommands, store: Store) -> str:
    model = exportable(found)
    if model is None:
        return "Nothing is exported, since there is nothing to recommend."
    if found.headline.kind not in (Answer.ship, Answer.stay_on_fp32):
        return f"Nothing is exported, since what to ship is open; the provisional one:\n  {commands.export(model)}"
    said, failed = _run(model, commands, store)
    if failed:
        return f"The export failed: {failed}\nTo try it again:\n  {commands.export(model)}"
    if model.precision is Precision.int8:
        return said
    instead = "" if model.has_own_form else ", and ships as TorchScript"
    return f"FP32 is fastest in {model.runtime}{instead}.\n{said}" if found.timing else said


def _run(model: Exportable, commands: NextCommands, store: Store) -> tuple[str, str]:
    """The text that the export prints, and the sentence with which it failed, empty where it didn't."""
    folder = commands.folder_of(model)
    if (folder / "check.npz").is_file():  # the last file that an export writes
        return f"{from_here(folder)} was written before.\nServe it: python -i {from_here(folder / 'serve.py')}", ""
    where = [f"folder={quoted(from_here(folder))}", f"outputs={quoted(str(commands.outputs))}"]
    done = subprocess.run(
        [sys.executable, "-m", "qexp.export", *model.overrides, *where],
        env={**os.environ, "MLFLOW_TRACKING_URI": store.uri},  # an address on a command line can be read by others
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return done.stdout.strip(), ""
    lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}."]
    return "", credentials.masked(lines[-1])
