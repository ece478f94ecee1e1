"""What a gate sees of a canary, and what it says: a verdict with its evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from serving.contracts.requests import TrafficWindow

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


GateResults = tuple[GateResult, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drill:
    """One timed use of the rollback path: `seconds` from detection until every gateway acknowledged the safe split."""

    at: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmEvent:
    """The first bad event of one session: its arm, and the canary's share when its request was routed."""

    is_canary: bool
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveEvidence:
    """Everything that a live gate or a monitor may look at.

    Windows and `epoch_sessions` = (canary, all) cover the current ramp step; events, `canary_sessions` and
    `failed_checks` (candidate requests by failed check) the whole release.
    """

    stable: TrafficWindow
    candidate: TrafficWindow
    share: float
    epoch_sessions: tuple[int, int]
    canary_sessions: int
    failed_checks: Mapping[str, int]
    safety_events: tuple[ArmEvent, ...]
    failure_events: tuple[ArmEvent, ...]
    drills: tuple[Drill, ...]
    now: float
