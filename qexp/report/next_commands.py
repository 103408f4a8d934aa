"""The commands that come after a report: it again with another question, the folder that serves what it recommends."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from qexp.config.schema import ExportFormat, RuntimeName, export_name
from qexp.records import Precision, RunRecord, Variant
from qexp.report.decision import Answer
from qexp.report.findings import Findings
from qexp.system import credentials

# The form in which a runtime's model ships; that of torch's other runtimes is TorchScript.
_FORMATS: dict[str, ExportFormat] = {
    RuntimeName.torchscript: ExportFormat.torchscript,
    RuntimeName.onnxruntime: ExportFormat.onnx,
    RuntimeName.openvino: ExportFormat.openvino,
    RuntimeName.inductor: ExportFormat.aoti,
}


@dataclass(frozen=True, eq=False)
class Exportable:
    """A model of a run that can be exported. runtime: in which it is recommended, or fastest; batch_size: of its
    timing."""

    run: RunRecord
    precision: Precision
    runtime: str
    batch_size: int

    @property
    def form(self) -> ExportFormat:
        return _FORMATS.get(self.runtime, ExportFormat.torchscript)

    @property
    def has_own_form(self) -> bool:
        """True if a model ships for this very runtime, and not as TorchScript in place of it."""
        return self.runtime in _FORMATS

    @property
    def overrides(self) -> list[str]:
        """The settings of `python -m qexp.export`."""
        given = [f"run_id={self.run.run_id}", f"format={self.form}"]
        given += [f"precision={self.precision}"] if self.precision is not Precision.int8 else []
        return given + ([f"batch_size={self.batch_size}"] if self.form is ExportFormat.openvino else [])


def exportable(found: Findings) -> Exportable | None:
    """The model that a recommendation means: the chosen candidate's, be it provisional, or the float model in its
    fastest runtime; None where there is none."""
    head, one = found.headline, found.chosen
    batch_size, threads = head.conditions or (1, 1)
    if head.kind is not Answer.stay_on_fp32:
        return Exportable(head.chosen.ships, Precision.int8, head.chosen.runtime, batch_size) if head.chosen else None
    if one is None:
        return None
    variants = {runtime: str(Variant(Precision.fp32, runtime)) for runtime in RuntimeName}
    here = (row for row in found.timing.get("rows", ()) if (row["batch_size"], row["threads"]) == (batch_size, threads))
    p50s = {row["variant"]: float(row["p50"]) for row in here}
    timed = {runtime: p50s[variant] for runtime, variant in variants.items() if variant in p50s}
    fastest = min(timed, key=timed.__getitem__, default=RuntimeName.torchscript)
    return Exportable(one.ships, Precision.fp32, fastest, batch_size)


@dataclass(frozen=True)
class NextCommands:
    """folder: the report's, `outputs`/reports/NAME; source: the override that finds its runs, empty for the latest
    sweep."""

    folder: Path
    source: str

    @property
    def outputs(self) -> Path:
        return self.folder.absolute().parent.parent

    @property
    def report(self) -> str:
        """The report again."""
        return self._command("qexp.report", *([self.source] if self.source else []))

    def export(self, model: Exportable) -> str:
        """The folder that serves a model."""
        return self._command("qexp.export", *model.overrides)

    def folder_of(self, model: Exportable) -> Path:
        """The folder that `export` writes."""
        return self.outputs / "exports" / export_name(model.run.run_id, model.form, model.precision)

    def _command(self, module: str, *overrides: str) -> str:
        """With credentials masked, and with the setting `outputs` where it isn't the default."""
        where = [] if self.outputs == Path.cwd() / "outputs" else [f"outputs={from_here(self.outputs)}"]
        return shlex.join(credentials.masked_tree(["python", "-m", module, *overrides, *where]))


def from_here(path: Path) -> str:
    """A path as it is typed in the current folder."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
