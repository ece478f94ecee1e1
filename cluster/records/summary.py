"""How a run ended, as the final table shows it and `summary.json` keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rl_actors.durable import decode, encode

ReleaseOutcome = Literal["promoted", "rolled_back", "failed_back", "halted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLine:
    """One stage of the final table; `resumed` means that an earlier process had finished it."""

    name: str
    seconds: float
    line: str
    resumed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedLine:
    """One frozen result of training: a policy or a reward model."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteLine:
    """Baseline against candidate on one suite; successes are fractions, violations counts."""

    suite: str
    baseline_success: float
    candidate_success: float
    baseline_violations: int
    candidate_violations: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseLine:
    """One release: what became of the candidate and why. `time_to_recovery_s` is 0 for a promotion."""

    candidate: str
    outcome: ReleaseOutcome
    reason: str
    canary_requests: int
    observed_share: float
    time_to_recovery_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPaths:
    """Where to look next; empty when the run did not get that far."""

    folder: str
    brief_html: str = ""
    brief_md: str = ""
    ledger: str = ""
    mlflow_uri: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainHead:
    """Where a chained file stood: how many rows it had, and the chain of the last one ("" without a chain)."""

    rows: int
    chain: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """How a run ended. Written as `summary.json`: a run folder without one is unfinished.

    `heads` says of each chained file, by path in the run folder, where it stood; `seatrial audit` holds it to that.
    """

    run_id: str
    workflow: str
    stages: tuple[StageLine, ...]
    trained: tuple[TrainedLine, ...]
    offline: tuple[SuiteLine, ...]
    releases: tuple[ReleaseLine, ...]
    stable_policy: str
    bundle_id: str
    exit_code: int
    paths: RunPaths
    endpoint: str = ""
    heads: Mapping[str, ChainHead] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the summary as plain JSON; `from_json` reads it back."""
        return encode(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunSummary:
        """Return the summary that `to_json` gave. Raises pydantic's ValidationError."""
        return decode(cls, dict(data))
