"""A finished page of text, before any format: headings, lines, tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Headers and rows of finished text; the first column names the row."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One headed part of the page: tables above lines."""

    id: str
    title: str
    tables: tuple[Table, ...] = ()
    lines: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether it says nothing at all, not even that something was not measured."""
        return not any(table.rows for table in self.tables) and not any(line.strip() for line in self.lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """One of the numbers in large type."""

    label: str
    value: str
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A whole page of finished text."""

    title: str
    outcome: str
    tone: str
    facts: tuple[tuple[str, str], ...]
    charter: tuple[tuple[str, str], ...]
    headlines: tuple[Headline, ...]
    sections: Mapping[str, Section]
    glossary: tuple[tuple[str, str, str], ...]
