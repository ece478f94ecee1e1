"""One word, one thing: names of the three packages keep to `docs/glossary.md`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.house import PACKAGES, ROOT, read_sources

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def forbidden_words(glossary: str) -> set[str]:
    """Return the words in the column "not" of every table; a table without that column is an error."""
    rows = [line.strip().strip("|").split("|") for line in glossary.splitlines() if line.startswith("|")]
    wrong = [row for row in rows if len(row) != 3]
    assert not wrong, f"rows of three columns, please: {wrong}"
    cells = [row[2].strip() for row in rows]
    return {word.strip() for cell in cells if set(cell) - set("-") and cell != "not" for word in cell.split(",")}


def names_in(source: str) -> Iterator[str]:
    """Yield every name that a file gives to something."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()):
                yield name


def snake_case(name: str) -> str:
    return "_".join(_WORDS.findall(name)).lower()


def against_the_glossary(source: str, forbidden: set[str]) -> list[str]:
    """Names that hold a forbidden word, as a whole word or as whole words in a row."""
    named = {name: f"_{snake_case(name)}_" for name in names_in(source)}
    return sorted(name for name, words in named.items() if any(f"_{word}_" in words for word in forbidden))


SOURCES = read_sources(*PACKAGES)
FORBIDDEN = forbidden_words((ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sorted(SOURCES))
def test_names_keep_to_the_glossary(path: str):
    assert not against_the_glossary(SOURCES[path], FORBIDDEN)


def test_the_glossary_forbids_something():
    assert {"trajectory", "champion", "cfg", "manager"} <= FORBIDDEN
    assert "not" not in FORBIDDEN
    assert "" not in FORBIDDEN


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def sample_trajectory(): ...", ["sample_trajectory"]),
        ("class ChampionPolicy: ...", ["ChampionPolicy"]),
        ("def f(cfg): ...", ["cfg"]),
        ("action_mask = 1", ["action_mask"]),
        ("action = mask = 1", []),
        ("class Tripod: ...\nmanagement = 1", []),
        ("x = 'trajectory'  # episode", []),
    ],
)
def test_a_name_against_the_glossary_is_seen(source: str, found: list[str]):
    assert against_the_glossary(source, FORBIDDEN) == found
