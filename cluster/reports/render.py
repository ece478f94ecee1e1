"""Write the Reliability Brief: one page in each locale, Markdown and HTML, no number without a row."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cluster.reports.brief import BriefInput, collect_brief_input
from cluster.reports.locales import LOCALES, LocaleName, Phrasebook
from cluster.reports.plots import draw_figures
from cluster.reports.view import SECTIONS, View, view_of
from rl_actors.contracts import StageRefusedError
from rl_actors.durable import write_atomic

PAGE_LINES: Final = 78
"""What fits on one page at the HTML's type size, in lines of `PAGE_WIDTH` characters; pictures take 12 of them."""
PAGE_WIDTH: Final = 150
_TEMPLATES: Final = Path(__file__).parent / "templates"
_FIGURE_LINES: Final = 12


def write_briefs(run_dir: Path, *, ledger: Path | None = None) -> None:
    """Write a run's briefs in every locale under `report/`. Raises StageRefusedError."""
    write_brief(collect_brief_input(run_dir, ledger=ledger), run_dir / "report")


def write_brief(brief: BriefInput, directory: Path) -> None:
    """Write `brief.<locale>.md` and `.html` with figures beside them.

    Raises:
        StageRefusedError: a section is empty, the page too long, or a number came from nowhere; nothing was written.
    """
    files: dict[str, bytes] = {}
    for locale in LOCALES:
        # Ticks of an axis come from no row: pictures have a book of their own, so that they vouch for no number.
        book, figures = Phrasebook(locale), draw_figures(brief, Phrasebook(locale))
        view = view_of(brief, book)
        texts = {suffix: render(view, figures, book, suffix) for suffix in ("md", "html")}
        check_sections(view)
        check_numbers(texts, book)
        check_length(texts["md"])
        files |= {figure_path(name, locale): png for name, png in figures.items()}
        files |= {f"brief.{locale}.{suffix}": text.encode() for suffix, text in texts.items()}
    for name, content in files.items():
        write_atomic(directory / name, content)


def figure_path(name: str, locale: LocaleName) -> str:
    """Return where a figure lies, relative to the brief."""
    return f"figures/{name}.{locale}.png"


def render(view: View, figures: Mapping[str, bytes], book: Phrasebook, suffix: str) -> str:
    """Return the page in one format, `md` or `html`, with figures (PNG) by name."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=suffix == "html",
        undefined=StrictUndefined,  # a misspelled name is an error, not an empty cell
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _cell
    shown = [
        (book.say(f"figure.{name}"), figure_path(name, book.locale), base64.b64encode(png).decode())
        for name, png in figures.items()
    ]
    return environment.get_template(f"brief.{suffix}.j2").render(view=view, figures=shown, book=book)


def _cell(text: str) -> str:
    # Recorded text must not break a Markdown table or line.
    return " ".join(text.replace("|", "\\|").split(None)) if "\n" in text or "|" in text else text


def check_sections(view: View) -> None:
    """Refuse a page that leaves out performance or control: neither is optional (requirement 110)."""
    missing = [name for name in SECTIONS if name not in view.sections or view.sections[name].is_empty]
    if missing:
        raise StageRefusedError(f"reliability brief: nothing stands under {', '.join(missing)}; no section is optional")


def check_numbers(texts: Mapping[str, str], book: Phrasebook) -> None:
    """Refuse a number that no row was formatted into."""
    for suffix, text in texts.items():
        unsourced = book.unsourced_numbers(text)
        if unsourced:
            raise StageRefusedError(f"reliability brief, {book.locale} {suffix}: {unsourced} come from no row")


def check_length(markdown: str) -> None:
    """Refuse more than a page (requirement 115)."""
    lines = page_lines(markdown)
    if lines > PAGE_LINES:
        raise StageRefusedError(f"reliability brief: {lines} lines, one page holds {PAGE_LINES}; shorten a section")


def page_lines(markdown: str) -> int:
    """Return the lines that a page needs, long ones wrapped."""
    # Blank lines and the rules of tables take none.
    lines = [line for line in markdown.splitlines() if line.strip() and set(line) - set("|- ")]
    pictures = any(line.startswith("![") for line in lines)
    text = [line for line in lines if not line.startswith("![")]
    return sum(math.ceil(len(line) / PAGE_WIDTH) for line in text) + _FIGURE_LINES * pictures
