"""Locales: every string in every locale, numbers and dates as each market writes them, and numbers with a source."""

from __future__ import annotations

import math
import re
import string
from pathlib import Path
from typing import get_args

import pytest

from cluster.records.bundle import MEMBERS
from cluster.reports import locales
from cluster.reports.locales import LOCALES, LocaleName, Phrasebook, strings_of
from cluster.reports.view import _EVIDENCE, _FALLBACK_EVIDENCE, GLOSSARY, SECTIONS
from serving.contracts.gates import ARTICLE_GATES, Verdict
from serving.release.state_machine import HEALTHY, TERMINAL

SOURCE = Path(locales.__file__).parent
EACH = pytest.mark.parametrize("locale", LOCALES)


def used_keys() -> set[str]:
    """Every key the code can ask for: literals, and the families that are completed with a name."""
    text = "".join(path.read_text() for pattern in ("*.py", "templates/*.j2") for path in SOURCE.glob(pattern))
    keys = set(re.findall(r'(?:say|knows)\(\s*"([^"]+)"', text)) | set(
        re.findall(r"""_strings\[["']([^"'{]+)["']\]""", text)
    )
    keys |= {
        f"column.{name}"
        for call in re.findall(r"_columns\(book, ([^)]*)\)", text)
        for name in re.findall(r'"(\w+)"', call)
    }
    families = {
        "member": MEMBERS,
        "section": SECTIONS,
        "verdict": get_args(Verdict),
        "gate": (*ARTICLE_GATES, "task_success_not_worse", HEALTHY),
        "phase": ("offline", "canary"),
        "evidence": (*_EVIDENCE, *_FALLBACK_EVIDENCE),
        "ending": (*(state.__name__ for state in TERMINAL), "open"),
        "compared": ("previous", "baseline"),
        "figure": ("learning", "intents", "canary"),
        "legend": ("e_fail", "e_pass", "fail_limit", "pass_limit"),
        "rollback.short": ("RolledBack", "FailedBack", "Halted"),
    }
    keys |= {f"{family}.{name}" for family, names in families.items() for name in names}
    return keys | {f"glossary.{name}.{part}" for name in GLOSSARY for part in ("label", "text")}


def without_ten(locale: LocaleName) -> dict[str, str]:
    return {key: text.replace("log10", "") for key, text in strings_of(locale).items()}


def fields_of(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


@EACH
def test_every_string_that_is_used_exists(locale: LocaleName):
    missing = used_keys() - set(strings_of(locale))
    assert not missing, f"{locale}: {sorted(missing)}"


def test_all_locales_have_the_same_keys_and_none_is_unused():
    keys = {locale: set(strings_of(locale)) for locale in LOCALES}
    assert keys["en-US"] == keys["en-GB"] == keys["fr"]
    unused = keys["fr"] - used_keys()
    assert not unused, sorted(unused)


def test_all_locales_fill_in_the_same_values():
    for key, text in strings_of("en-US").items():
        for locale in ("en-GB", "fr"):
            assert fields_of(strings_of(locale)[key]) == fields_of(text), f"{locale} {key}"  # type: ignore[index]


def test_strings_themselves_hold_no_number_but_names_of_measures():
    """A number in a string would be one without a row: only "95 %", "p95", "log10" and "1 - rate" name measures."""
    for locale in LOCALES:
        assert all("1" not in text or key.startswith("glossary.") for key, text in without_ten(locale).items())
        digits = set(re.findall(r"\d+", " ".join(strings_of(locale).values())))
        assert digits <= {"95", "10", "1"}, locale


@EACH
def test_no_string_is_empty_and_french_is_french(locale: LocaleName):
    assert all(text.strip() for text in strings_of(locale).values())
    same = [k for k, text in strings_of("fr").items() if text == strings_of("en-US")[k] and len(text.split()) > 2]
    assert not same


def test_british_spelling_differs_from_american():
    assert "behavior" in strings_of("en-US")["limit.violations.none"]
    assert "behaviour" in strings_of("en-GB")["limit.violations.none"]
    assert "labelled" in strings_of("en-GB")["glossary.success_rate.text"]


@EACH
def test_a_missing_key_fails(locale: LocaleName):
    with pytest.raises(KeyError, match="no such key"):
        Phrasebook(locale).say("no such key")


@pytest.mark.parametrize(
    ("locale", "count", "percent", "points", "date"),
    [
        ("en-US", "12,345", "82.4%", "+3.1\u00a0points", "November 22, 2026"),
        ("en-GB", "12,345", "82.4%", "+3.1\u00a0points", "22 November 2026"),
        ("fr", "12\u202f345", "82,4\u00a0%", "+3,1\u00a0points", "22 novembre 2026"),
    ],
)
def test_each_market_writes_numbers_and_dates_its_own_way(
    locale: LocaleName, count: str, percent: str, points: str, date: str
):
    book = Phrasebook(locale)
    assert book.integer(12_345) == count
    assert book.percent(0.824) == percent
    assert book.points(0.031) == points
    assert book.date(1_795_370_000.0) == date


def test_paper_is_letter_in_the_united_states_only():
    assert {name: Phrasebook(name).paper for name in LOCALES} == {"en-US": "Letter", "en-GB": "A4", "fr": "A4"}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0.00"),
        (0.5, "0.50"),
        (1841.5, "1,842"),
        (2.3e-11, "2.3\u00a0\u00d7\u00a010⁻¹¹"),
        (4.2e7, "4.2\u00a0\u00d7\u00a010⁷"),
        (math.inf, "∞"),
        (-math.inf, "-∞"),
        (math.nan, "not measured"),
        (None, "not measured"),
    ],
)
def test_amounts_of_any_size(value: float | None, shown: str):
    assert Phrasebook("en-US").amount(value) == shown


def test_durations_and_signs():
    book = Phrasebook("fr")
    assert book.seconds(0.613) == "0,61\u00a0s"
    assert book.seconds(42.04) == "42,0\u00a0s"
    assert book.percent(-0.021, signed=True) == "-2,1\u00a0%"


@EACH
def test_what_was_not_measured_is_never_a_number(locale: LocaleName):
    book = Phrasebook(locale)
    writers = (
        book.integer,
        book.decimal,
        book.percent,
        book.points,
        book.seconds,
        book.p_value,
        book.amount,
        book.date,
    )
    assert {write(None) for write in writers} == {book.not_measured}
    assert not re.search(r"\d", book.not_measured)


# --- provenance -------------------------------------------------------------------------------------------------------


def test_a_number_that_was_not_written_here_is_found():
    book = Phrasebook("en-US")
    text = f"success {book.percent(0.824)} on {book.integer(1200)} tasks, bundle {book.quote('3fa9c1')}"
    assert book.unsourced_numbers(text) == []
    assert book.unsourced_numbers(f"{text}; latency 412 ms") == ["412"]
    assert book.unsourced_numbers("82.5%") == ["82.5"]


def test_a_value_filled_into_a_string_must_have_been_written_here():
    book = Phrasebook("en-US")
    assert book.unsourced_numbers(book.say("rollback.drill", seconds="0.07 s")) == ["0.07"]


def test_markup_and_pictures_hold_no_numbers_of_the_brief():
    book = Phrasebook("fr")
    text = (
        '<style>h2 { margin: 3mm }</style><img src="data:image/png;base64,a1b2"> ![figure](figures/a7.png) <td>ok</td>'
    )
    assert book.unsourced_numbers(text) == []
    assert book.unsourced_numbers(f"{text}<td>7</td>") == ["7"]


def test_quotes_are_cut_and_keep_their_digits():
    book = Phrasebook("en-GB")
    assert book.quote("release-0042 " * 30, 20) == "release-0042 releas…"
    assert book.unsourced_numbers("release-0042") == []
