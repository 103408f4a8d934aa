"""What is found of a sweep whose jobs ran on different processors."""

from __future__ import annotations

from dataclasses import replace

from qexp.records import RunRecord, Top1
from qexp.report import terminal
from qexp.report.findings import Files, of_study
from qexp.report.study import studies
from tests.helpers.planted import Planted, made, question

Run = tuple[RunRecord, Top1]


def planted(signature: str, worse: str) -> list[Run]:
    """Runs of two observers on INT8 kernels of this signature, of which one breaks 60 of 1,000 images."""
    runs = []
    for observer in ("minmax", "mse"):
        broken, name = 60 * (observer == worse), f"{observer} on {signature}"
        one = Planted(name, broken, params={"observer": observer}, tags={"kernel_signature": signature})
        runs.append(made(one, 1000, 0))
    return runs


def said(runs: list[Run]) -> list[str]:
    """The end of a sweep of these runs on a terminal, of each study by itself."""
    records = [replace(record, start=float(number)) for number, (record, _) in enumerate(runs)]
    found = studies(records, {record.run_id: top1 for record, top1 in runs})
    return [terminal.summary([of_study(study, question(margin=0.02), Files(None))], 100) for study in found]


def test_figures_of_two_kernels_are_never_pooled() -> None:
    """What loses on the one kind of kernels is what is to be shipped on the other."""
    here, there = planted("k", "mse"), planted("l", "minmax")
    mixed = said([here[0], there[0], here[1], there[1]])
    headed = [f", INT8 kernels {signature}" for signature in ("k", "l")]  # else both would have one heading
    assert [text.replace(kernels, "", 1) for text, kernels in zip(mixed, headed, strict=True)] == [
        *said(here), *said(there)
    ]  # fmt: skip
    assert [kernels in text.splitlines()[0] for text, kernels in zip(mixed, headed, strict=True)] == [True, True]
    assert "Ship minmax in eager (run minmax on k)" in mixed[0]
    assert "Ship mse in eager (run mse on l)" in mixed[1]
