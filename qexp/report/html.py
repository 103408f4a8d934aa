"""A page of HTML in one file: its parts as values, and their rendering. Text is escaped, and nothing is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Text:
    """A paragraph. soft: a remark."""

    kind: ClassVar[str] = "text"
    text: str
    soft: bool = False


@dataclass(frozen=True)
class Items:
    kind: ClassVar[str] = "items"
    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """rows: cells as text; numbers: the columns that are set to the right, by heading; marks: a row's class, chosen or
    out, by its index; caption: below it."""

    kind: ClassVar[str] = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: frozenset[str] = frozenset()
    marks: Mapping[int, str] = field(default_factory=dict)
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure as SVG that was made here, so that it is not escaped. alt: what it shows."""

    kind: ClassVar[str] = "picture"
    svg: str
    alt: str
    caption: str = ""

    @property
    def markup(self) -> Markup:
        return Markup(self.svg)


@dataclass(frozen=True)
class Front:
    """The interactive Pareto front (assets/front.js), and the picture where no script runs, and in print."""

    kind: ClassVar[str] = "front"
    data: Mapping[str, Any]
    still: Picture
    keys: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    kind: ClassVar[str] = "facts"
    facts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Command:
    kind: ClassVar[str] = "command"
    command: str


@dataclass(frozen=True)
class Folded:
    """Parts that are shown on a click."""

    kind: ClassVar[str] = "folded"
    title: str
    parts: Sequence[Any]


@dataclass(frozen=True)
class Sheet:
    """Images with lines of text. images: (URI of its data or empty, lines)."""

    kind: ClassVar[str] = "sheet"
    images: Sequence[tuple[str, Sequence[str]]]


@dataclass(frozen=True)
class Block:
    """A part of a section under a heading."""

    heading: str
    parts: Sequence[Any]


@dataclass(frozen=True)
class Answer:
    """The two sentences that come first. kind: a recommendation's, which colours it."""

    kind: str
    sentences: Sequence[str]


@dataclass(frozen=True)
class Section:
    """All of one study, or of a comparison. tiles: name, value and remark of the figures that matter most."""

    heading: str
    answer: Answer | None
    tiles: Sequence[tuple[str, str, str]]
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """title, lead: what it is about; sections: one where there is one study."""

    title: str
    lead: Sequence[str]
    sections: Sequence[Section]


def render(page: Page) -> str:
    environment = Environment(
        loader=FileSystemLoader(_HERE / "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    interactive = any(part.kind == "front" for one in page.sections for block in one.blocks for part in block.parts)
    names = ["uPlot.iife.min.js", "front.js"] if interactive else []
    styles = ["uPlot.min.css", "report.css"] if interactive else ["report.css"]
    return environment.get_template("report.html").render(
        page=page, styles=[_asset(name) for name in styles], scripts=[_asset(name) for name in names]
    )


def _asset(name: str) -> Markup:
    return Markup((_HERE / "assets" / name).read_text(encoding="utf-8"))
