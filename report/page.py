"""The page as data, and its two forms: one html file that needs nothing else, and Markdown with its pictures beside it."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

TEMPLATES = Path(__file__).parent


@dataclass(frozen=True)
class Table:
    """Cells as they are printed; columns of these numbers hold words, the others hold numbers."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Figure:
    """A picture with its words.

    Attributes:
        name: file name beside the page.
        png: the file.
        alt: what it shows, for who cannot see it.
        caption: printed below.
        rows: what each row of a contact sheet is, from the top.
        wide: takes the page's whole width.
    """

    name: str
    png: bytes
    alt: str
    caption: str = ""
    rows: tuple[str, ...] = ()
    wide: bool = False

    @property
    def uri(self) -> str:
        """The picture as an address that holds it."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Section:
    """A heading with what stands under it; empty ones are left out of the page."""

    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()


@dataclass(frozen=True)
class Source:
    """How a run is repeated."""

    name: str
    command: str
    config: str


@dataclass(frozen=True)
class Page:
    """Everything that both forms show, so that they cannot differ in a number."""

    title: str
    made: str
    headline: Sequence[str]
    notes: Sequence[str]
    sections: Sequence[Section]
    repeat: Table
    sources: Sequence[Source] = field(default_factory=list)

    @property
    def figures(self) -> list[Figure]:
        """All pictures, in order."""
        return [figure for section in self.sections for figure in section.figures]


def render_html(page: Page) -> str:
    """One file: style inline, pictures inside, no script, nothing fetched."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["tight"] = lambda text: text.replace(" %", "\u00a0%").replace(" points", "\u00a0points")
    return environment.get_template("page.html.jinja").render(page=page) + "\n"


def render_markdown(page: Page) -> str:
    """Pictures are files beside it. Every value is escaped, not only what is expected to need it."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), finalize=escape_markdown, undefined=StrictUndefined, trim_blocks=True, autoescape=False
    )
    return environment.get_template("page.md.jinja").render(page=page) + "\n"


def escape_markdown(value: object) -> str:
    """One line in which nothing is markup; what is marked as safe passes."""
    if isinstance(value, Markup):
        return str(value)
    return re.sub(r"([\\`*_\[\]<>|~&$])", r"\\\1", " ".join(str(value).split()))
