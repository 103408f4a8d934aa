"""The commands that come after a report: it again with another question, the folder that serves the recommended run."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from qexp.config.schema import RuntimeName
from qexp.report.decision import Candidate
from qexp.system import credentials

# The form in which a runtime's model ships; that of torch's other runtimes is TorchScript.
_FORMATS: dict[str, str] = {RuntimeName.onnxruntime: "onnx", RuntimeName.openvino: "openvino"}


@dataclass(frozen=True)
class NextCommands:
    """folder: the report's, `outputs`/reports/NAME; source: the override that finds its runs, empty for the latest
    sweep."""

    folder: Path
    source: str

    @property
    def report(self) -> str:
        """The report again."""
        return self._command("qexp.report", *([self.source] if self.source else []))

    def export(self, one: Candidate) -> str:
        """The run that ships, in a folder that serves it."""
        form = _FORMATS.get(one.runtime, "torchscript")
        return self._command("qexp.export", f"run_id={one.ships.run_id}", f"format={form}")

    def _command(self, module: str, *overrides: str) -> str:
        """With credentials masked, and with the setting `outputs` where it isn't the default."""
        outputs = self.folder.absolute().parent.parent
        where = [] if outputs == Path.cwd() / "outputs" else [f"outputs={from_here(outputs)}"]
        return shlex.join(credentials.masked_tree(["python", "-m", module, *overrides, *where]))


def from_here(path: Path) -> str:
    """A path as it is typed in the current folder."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
