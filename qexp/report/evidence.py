"""The candidates of a recommendation as rows of a table: in the order in which they matter, named, with why not."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tabulate import tabulate

from qexp.config.identity import GROUPS, NOT_APPLICABLE
from qexp.metrics import Metric
from qexp.records import Interval, RunRecord
from qexp.report import formats
from qexp.report.candidates import simulated, stopped
from qexp.report.decision import Answer, Candidate, Recommendation

# Of the table that a terminal or a page shows.
MOST = 20


@dataclass(frozen=True)
class Row:
    """A candidate as text. mark: `chosen`, `tied`, `qualifies`, or empty; word: the outcome in a word or two; why: it
    is not what to ship, in a clause; points, ms, speedup, size, p, adjusted: figures with their intervals."""

    candidate: Candidate
    name: str
    runtimes: str
    points: str
    p: str
    adjusted: str
    ms: str
    speedup: str
    size: str
    mark: str
    word: str
    why: str

    @property
    def short(self) -> Row:
        """The same with half-widths for intervals: `-0.12 ±0.28`."""
        delta = self.candidate.delta
        points = (
            f"{formats.signed(delta.value)} ±{formats.points((delta.high - delta.low) / 2)}" if delta else self.points
        )
        speedup = _speedup(self.candidate, lambda one: f"{one.value:.2f}× ±{(one.high - one.low) / 2:.2f}")
        return replace(self, points=points, speedup=speedup)


def rows(found: Recommendation) -> list[Row]:
    """All candidates, those that matter first: the chosen one, those tied with it, those that qualify, the others by
    how near they are to it."""
    several = len({one.runtimes for one in found.candidates}) > 1
    return [_row(found, one, several) for one in sorted(found.candidates, key=lambda one: _place(found, one))]


def _place(found: Recommendation, one: Candidate) -> tuple[float, ...]:
    ranks = {"chosen": 0, "tied": 1, "qualifies": 2}
    speed = -one.latency.speedup.value if one.latency else 0.0
    rank = ranks.get(_mark(found, one), 3)
    loss = -one.delta.value if one.delta else 1.0
    return (rank, bool(one.reasons), speed) if rank < 3 else (rank, bool(one.reasons), one.adjusted, one.p, loss)


def _mark(found: Recommendation, one: Candidate) -> str:
    if same(one, found.chosen):
        return "chosen"
    return "tied" if _among(one, found.tied) else "qualifies" if _among(one, found.qualified) else ""


def same(one: Candidate, other: Candidate | None) -> bool:
    """True if both are the same setting in the same runtimes."""
    return other is not None and (one.ships.run_id, one.runtimes) == (other.ships.run_id, other.runtimes)


def _among(one: Candidate, others: Sequence[Candidate]) -> bool:
    return any(same(one, other) for other in others)


def _row(found: Recommendation, one: Candidate, several: bool) -> Row:
    word, why = outcome(found, one)
    runtimes = ", ".join(one.runtimes)
    name = label(one)
    return Row(
        one, f"{name} in {one.runtime}" if several else name, runtimes, formats.difference(one.delta),
        formats.p_value(one.p), formats.p_value(one.adjusted), formats.ms(one.latency.ms if one.latency else None),
        _speedup(one, formats.factor), formats.mb(one.size_mb), _mark(found, one), word,
        why,
    )  # fmt: skip


def _speedup(one: Candidate, text: Callable[[Interval], str]) -> str:
    """The speedup as text, with a `?` where the timing can't be trusted."""
    if one.latency is None:
        return formats.UNKNOWN
    return text(one.latency.speedup).replace("×", "×" if one.latency.valid else "×?", 1)


def label(one: Candidate) -> str:
    """The settings that tell a candidate from others: `per_channel mse batches=32`; the run's name where none does."""
    ends = [name.rpartition(".")[2] for name in one.setting]
    words = []
    for name, text in one.setting.items():
        end = name.rpartition(".")[2]
        says_it_all = name in GROUPS or (text.isidentifier() and text not in ("true", "false") and ends.count(end) == 1)
        words += [] if text == NOT_APPLICABLE else [text if says_it_all else f"{end}={text}"]
    return " ".join(words) or one.ships.name


def outcome(found: Recommendation, one: Candidate) -> tuple[str, str]:
    """A candidate's outcome in a word or two, and the reason why it is not the one to ship, as a clause."""
    if same(one, found.chosen) and found.kind is Answer.ship:
        return "ship", ""
    if reasons := simulated(one.hypothesis):
        return "simulated", "; ".join(reasons)
    if found.kind is Answer.speed_unknown and one.qualifies:
        return "by accuracy", "; ".join(["qualifies by accuracy", *(one.reasons or ["its speed is not known"])])
    if same(one, found.chosen):
        return "provisional", f"the best so far, and not shown to lose less than {100 * found.margin:g} points"
    if one.raced_out:
        return "stopped", stopped(one.hypothesis)[0]
    if one.reasons:
        return "ruled out", "; ".join(one.reasons)
    if _among(one, found.dropped):
        return "tied", "tied, but shown less accurate than another of the tied"
    if _among(one, found.tied):
        return "tied", "tied with the recommended one, which is simpler"
    if not one.qualifies:
        margin = f"{100 * found.margin:g} points"
        if one.delta is None:
            return "unknown", "its accuracy is not known"
        if one.delta.high < -found.margin:
            return "loses", f"shown to lose {margin} or more"
        if one.delta.high < 0:
            return "open", f"a loss is shown, and that it is less than {margin} is not"
        return "open", f"not shown to lose less than {margin}"
    if one.latency is None:
        return "not timed", "its speed was not measured"
    if not one.latency.valid:
        return "untimed", "its timing can't be trusted: " + "; ".join(one.latency.reasons)
    if not one.faster:
        return "not faster", "not shown to be faster than FP32"
    return "qualifies", "qualifies, and another is better by what was asked for"


COLUMNS = {
    "setting": "name", "runtimes": "runtimes", "points [95%]": "points", "p": "p", "adjusted p": "adjusted",
    "latency, ms": "ms", "speedup [95%]": "speedup", "size, MB": "size", "outcome": "word", "why not": "why",
}  # fmt: skip
NUMBERS = frozenset({"points [95%]", "p", "adjusted p", "latency, ms", "speedup [95%]", "size, MB"})


def columns(shown: Sequence[Row]) -> list[str]:
    """The headings of the columns in which some row has something to say; runtimes only where they differ."""
    empty = ("", formats.UNKNOWN)
    said = {name: {getattr(row, name) for row in shown} for name in COLUMNS.values()}
    known = [heading for heading, name in COLUMNS.items() if said[name].difference(empty)]
    return [heading for heading in known if heading != "runtimes" or len(said["runtimes"]) > 1]


def cells(row: Row, headings: Sequence[str]) -> list[str]:
    return [str(getattr(row, COLUMNS[heading])) for heading in headings]


def markdown(shown: Sequence[Row], left_out: int = 0) -> str:
    """A table in Markdown. left_out: the number of rows that it lacks."""
    headings = columns(shown)
    lines = [["**" + row.name + "**" if row.mark == "chosen" else row.name, *cells(row, headings)[1:]] for row in shown]
    safe = [[_of_markdown(cell) for cell in line] for line in lines]
    text = str(tabulate(safe, headings, tablefmt="pipe", disable_numparse=True))
    return f"{text}\n\nand {formats.count(left_out, 'more candidate')}" if left_out else text


def _of_markdown(cell: str) -> str:
    for sign in ("\\", "|", "<", "`"):
        cell = cell.replace(sign, f"\\{sign}")
    return " ".join(cell.split())


def latex(shown: Sequence[Row]) -> str:
    """A table in LaTeX, for the package booktabs; the recommended row is bold."""
    headings = [heading for heading in columns(shown) if heading not in ("why not", "runtimes")]
    align = "".join("r" if heading in NUMBERS else "l" for heading in headings)
    lines = [f"\\begin{{tabular}}{{{align}}}", "\\toprule", _tex_line(headings), "\\midrule"]
    for row in shown:
        line = [_of_tex(cell) for cell in cells(row, headings)]
        lines.append(" & ".join(rf"\textbf{{{cell}}}" if row.mark == "chosen" else cell for cell in line) + r" \\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def _tex_line(line: Sequence[str]) -> str:
    return " & ".join(map(_of_tex, line)) + r" \\"


_TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "×": r"$\times$", "–": "--", "…": r"\dots{}", "→": r"$\rightarrow$",
}  # fmt: skip


def _of_tex(text: str) -> str:
    return "".join(_TEX.get(sign, sign) for sign in " ".join(text.split()))


def runs_csv(records: Sequence[RunRecord]) -> str:
    """Every run as a line: what it is called, how it ended, all its params and metrics."""
    params = list(dict.fromkeys(name for record in records for name in record.params))
    known = {str(name): index for index, name in enumerate(Metric)}
    metrics = sorted(
        {name for record in records for name in record.metrics}, key=lambda name: (known.get(name, 999), name)
    )
    out = io.StringIO()
    tags = ("verdict", "latency_valid", "latency_reason", "latency_from", "cpu", "error")
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["run_id", "name", "status", *tags, *metrics, *params])
    for one in records:
        table.writerow(
            [
                one.run_id, one.name, one.status, *(one.tags.get(name, "") for name in tags),
                *(one.metrics.get(name, "") for name in metrics), *(one.params.get(name, "") for name in params),
            ]
        )  # fmt: skip
    return out.getvalue()
