"""Render and check the Reliability Brief: one page in each locale, Markdown and HTML, no number without a row."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cluster.reports.brief import SECTIONS, BriefInput
from cluster.reports.locales import LOCALES, LocaleName, Phrasebook
from cluster.reports.plots import Figure, draw_figures
from cluster.reports.rows import collect_brief_input
from cluster.reports.view import View, view_of
from rl_actors.contracts import StageRefusedError
from rl_actors.durable import write_atomic

_TEMPLATES: Final = Path(__file__).parent / "templates"
PAGE_LINES: Final = 78
"""What fits on one page at the HTML's type size, in lines of `PAGE_WIDTH` characters; pictures take 12 of them."""
PAGE_WIDTH: Final = 150
_FIGURE_LINES: Final = 12

Page = tuple[tuple[Figure, ...], Mapping[str, str]]


def write_brief(brief: BriefInput, directory: Path) -> dict[LocaleName, tuple[Path, Path]]:
    """Write `brief.<locale>.md` and `.html` with figures beside them; returns both paths by locale.

    Raises:
        StageRefusedError: a section is empty, the page too long, or a number came from nowhere; nothing was written.
    """
    pages: dict[LocaleName, Page] = {locale: _page(brief, locale) for locale in LOCALES}
    written: dict[LocaleName, tuple[Path, Path]] = {}
    for locale, (figures, texts) in pages.items():
        for figure in figures:
            write_atomic(directory / figure_path(figure, locale), figure.png)
        for suffix, text in texts.items():
            write_atomic(directory / f"brief.{locale}.{suffix}", text.encode())
        written[locale] = (directory / f"brief.{locale}.md", directory / f"brief.{locale}.html")
    return written


def figure_path(figure: Figure, locale: LocaleName) -> str:
    """Return where a figure lies, relative to the brief."""
    return f"figures/{figure.name}.{locale}.png"


def _page(brief: BriefInput, locale: LocaleName) -> Page:
    book = Phrasebook(locale)
    view, figures = view_of(brief, book), draw_figures(brief, Phrasebook(locale))
    texts = {suffix: rendered(view, figures, book, suffix) for suffix in ("md", "html")}
    check_sections(view)
    check_numbers(texts, book)
    check_length(texts["md"])
    return figures, texts


def rendered(view: View, figures: Sequence[Figure], book: Phrasebook, suffix: str) -> str:
    """Return the page in one format."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=suffix == "html",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _cell
    shown = [
        {
            "title": figure.title,
            "path": figure_path(figure, book.locale),
            "base64": base64.b64encode(figure.png).decode(),
        }
        for figure in figures
    ]
    values: Mapping[str, Any] = {
        "view": view,
        "figures": shown,
        "locale": book.locale,
        "paper": book.paper,
        "colon": book.say("colon"),
    }
    return environment.get_template(f"brief.{suffix}.j2").render(values)


def _cell(text: str) -> str:
    """Keep recorded text from breaking a Markdown table or line."""
    return " ".join(text.replace("|", "\\|").split(None)) if "\n" in text or "|" in text else text


# --- checks: a brief that fails one is not shipped --------------------------------------------------------------------


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
    """Count the lines a page needs, long ones wrapped; blank lines and table rules take none."""
    lines = [line for line in markdown.splitlines() if line.strip() and set(line) - set("|- ")]
    pictures = any(line.startswith("![") for line in lines)
    text = [line for line in lines if not line.startswith("![")]
    return sum(math.ceil(len(line) / PAGE_WIDTH) for line in text) + _FIGURE_LINES * pictures


def write_briefs(run_dir: Path, *, ledger: Path | None = None) -> tuple[Path, ...]:
    """Write a run's briefs in every locale under `report/` and return their paths.

    Raises:
        StageRefusedError: A brief would be empty in a section, too long, or hold a number that no row holds.
    """
    written = write_brief(collect_brief_input(run_dir, ledger=ledger), run_dir / "report")
    return tuple(path for pair in written.values() for path in pair)
