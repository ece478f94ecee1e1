"""Locales of the reports: words from `strings/<locale>.json`, numbers and dates as each market writes them (CLDR).

Whatever shows a digit goes through a `Phrasebook`, which remembers it: `unsourced_numbers` then finds any number in a
finished text that no row was formatted into.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Final, Literal

from babel import Locale
from babel.dates import format_date
from babel.numbers import format_decimal, get_minus_sign_symbol, get_plus_sign_symbol

LocaleName = Literal["en-US", "en-GB", "fr"]
LOCALES: Final[tuple[LocaleName, ...]] = ("en-US", "en-GB", "fr")

_STRINGS: Final = Path(__file__).parent / "strings"
_NUMBER: Final = re.compile(r"\d(?:[\d.,\u202f]*\d)?")
_SUPERSCRIPTS: Final = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
_TIMES: Final = "\u00d7"
_LARGE: Final = 1e5
_WHOLE: Final = 100.0
_INVISIBLE: Final = re.compile(r"<style.*?</style>|<title.*?</title>|<[^>]+>|!\[[^\]]*\]\([^)]*\)", re.DOTALL)


@cache
def strings_of(locale: LocaleName) -> Mapping[str, str]:
    """Return the words of a locale by key."""
    return json.loads((_STRINGS / f"{locale}.json").read_text(encoding="utf-8"))


class Phrasebook:
    """Words, numbers and dates of one locale; remembers every number it wrote. None is always "not measured"."""

    def __init__(self, locale: LocaleName) -> None:
        self.locale: LocaleName = locale
        self._market = Locale.parse(locale, sep="-")
        self.paper = "Letter" if locale == "en-US" else "A4"
        self._strings, self._written = strings_of(locale), set[str]()

    # --- words --------------------------------------------------------------------------------------------------------

    def say(self, key: str, **values: str) -> str:
        """Return the string of a key with already formatted values filled in. Raises KeyError for a missing key."""
        text = self._strings[key]
        self._remember(text)  # before filling in: a value must have been formatted here to count
        return text.format(**values) if values else text

    def knows(self, key: str) -> bool:
        """Whether this locale has a string for the key."""
        return key in self._strings

    def quote(self, text: str, limit: int = 160) -> str:
        """Return recorded text or an identifier as it is, cut to `limit` characters; its digits come from a row."""
        return self._remember(text if len(text) <= limit else f"{text[: limit - 1].rstrip()}…")

    @property
    def not_measured(self) -> str:
        """What stands where there is no row."""
        return self._strings["not_measured"]

    # --- numbers ------------------------------------------------------------------------------------------------------

    def integer(self, value: float | None) -> str:
        """Return a count with thousands marks."""
        return self._number(value, 0)

    def decimal(self, value: float | None, digits: int = 2) -> str:
        """Return a number with fixed decimals; the infinite is a sign, never a large number."""
        return self._number(value, digits)

    def percent(self, fraction: float | None, digits: int = 1, *, signed: bool = False) -> str:
        """Return a fraction as a percentage."""
        scaled = None if fraction is None else 100 * fraction
        return self._number(scaled, digits, pattern=self._market.percent_formats[None].pattern, signed=signed)

    def points(self, fraction: float | None) -> str:
        """Return a difference of fractions in percentage points, signed."""
        scaled = None if fraction is None else 100 * fraction
        return self._number(scaled, 1, suffix=f"\u00a0{self._strings['unit.points']}", signed=True)

    def seconds(self, value: float | None) -> str:
        """Return a duration in seconds."""
        return self._number(value, 2 if value is not None and abs(value) < 10 else 1, suffix="\u00a0s")

    def p_value(self, value: float | None) -> str:
        """Return a p-value; a tiny one by its power of ten."""
        return self.amount(value, 3)

    def amount(self, value: float | None, digits: int = 2) -> str:
        """Return a number of any size: decimals below a hundred, a power of ten for very large and very small ones."""
        if value is None or not math.isfinite(value) or value == 0:
            return self._number(value, digits)
        if 10**-digits <= abs(value) < _LARGE:
            return self._number(value, digits if abs(value) < _WHOLE else 0)
        exponent = math.floor(math.log10(abs(value)))
        power = f"\u00a0{_TIMES}\u00a010{str(exponent).translate(_SUPERSCRIPTS)}"
        return self._number(value / 10**exponent, 1, suffix=power)

    def date(self, at: float | None) -> str:
        """Return a day in UTC from Unix seconds."""
        if at is None:
            return self.not_measured
        return self._remember(format_date(datetime.fromtimestamp(at, UTC), "long", self._market))

    def _number(
        self, value: float | None, digits: int, *, pattern: str = "#,##0", suffix: str = "", signed: bool = False
    ) -> str:
        if value is None or math.isnan(value):
            return self.not_measured
        if math.isinf(value):
            return "∞" if value > 0 else f"{get_minus_sign_symbol(self._market)}∞"
        # Rounded as Python rounds, so that a figure is the same here as in every table and log.
        rounded = Decimal(f"{value:.{digits}f}")
        shown = rounded.scaleb(-2) if pattern.endswith("%") else rounded
        exact = pattern.replace("0", f"{0:.{digits}f}")
        sign = get_plus_sign_symbol(self._market) if signed and not rounded.is_signed() else ""
        return self._remember(sign + format_decimal(shown, exact, self._market) + suffix)

    # --- provenance ---------------------------------------------------------------------------------------------------

    def _remember(self, text: str) -> str:
        self._written.update(_NUMBER.findall(text))
        return text

    def unsourced_numbers(self, text: str) -> list[str]:
        """Return the numbers in a finished text (Markdown or HTML) that were not written by this phrasebook."""
        visible = html.unescape(_INVISIBLE.sub(" ", text))
        return sorted(set(_NUMBER.findall(visible)) - self._written)
