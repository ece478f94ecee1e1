"""What a gate says: a verdict with its evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

Verdict = Literal["pass", "fail", "inconclusive", "invalid"]


Evidence = Mapping[str, float | str]


ARTICLE_GATES: Final = (
    "no_safety_regression",
    "latency_delta_lt_15_percent",
    "cost_per_success_not_worse",
    "rollback_under_5_minutes",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateResult:
    """What one gate found. `reason` is a sentence for a human, `evidence` the numbers behind it.

    Example: GateResult(gate="latency_delta_lt_15_percent", verdict="pass", evidence={"p95_delta": 0.041}, reason="...")
    """

    gate: str
    verdict: Verdict
    evidence: Evidence
    reason: str
