"""The end of the output of a run or sweep: where its files and MLflow are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qexp.system import credentials


def print_locations(folder: Path, ui: Any) -> None:
    """Print where the files are and how to open MLflow. ui: as `tracking.ui` returns it."""
    print(f"Files: {folder}")
    if ui.command:
        given = f", with the password for {credentials.MASK}" if credentials.MASK in ui.command else ""
        print(f"Compare in MLflow{given}:\n  {ui.command}\nand open {ui.url}")
    else:
        print(f"Compare in MLflow: {ui.url}")
