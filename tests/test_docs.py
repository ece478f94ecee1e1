"""Pages that name files name files that exist."""

from __future__ import annotations

import re

import pytest

from tests.house import PACKAGES, ROOT

_PATH = re.compile(rf"`((?:{'|'.join(PACKAGES)}|benchmarks|tests|docs)/(?:[\w.-]+/)*(?:[\w.-]+\.(?:py|md|yaml))?)`")
PAGES = ("README.md", "docs/architecture.md", "docs/glossary.md", "docs/learning.md")


def missing_paths(text: str) -> list[str]:
    """Modules, pages and folders of this repository, in backticks, that are not there."""
    return sorted({path for path in _PATH.findall(text) if not (ROOT / path).exists()})


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_files_that_exist(page: str):
    assert not missing_paths((ROOT / page).read_text(encoding="utf-8"))


def test_a_file_that_is_gone_is_seen():
    assert missing_paths("`serving/gone.py` and `serving/` but not serving/else.py") == ["serving/gone.py"]


def test_readme_is_short_enough_to_be_read():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
