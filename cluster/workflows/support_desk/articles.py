"""The company's policy articles: the same in every world; each holds one short fact."""

from __future__ import annotations

from collections.abc import Mapping

ARTICLES: Mapping[str, str] = {
    "returns": "Returns are accepted for 30 days.",
    "warranty": "The warranty lasts 24 months.",
    "shipping": "Shipping takes 4 days.",
    "cancellation": "Orders can be cancelled until they ship.",
    "gifts": "Gift wrap costs 5 euros.",
}
ARTICLE_FACTS: Mapping[str, str] = {
    "returns": "30 days",
    "warranty": "24 months",
    "shipping": "4 days",
    "cancellation": "until they ship",
    "gifts": "5 euros",
}
