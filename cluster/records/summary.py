"""How a run ended, as the final table shows it and `summary.json` keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rl_actors.contracts import SuiteResult
from rl_actors.durable import decode, encode
from serving.contracts import Ending

ReleaseEnding = Literal["promoted"] | Ending


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
class ReleaseOutcome:
    """How one release ended, from the ledger and the controller's own record. A promotion has no time to recovery.

    `requests` counts the tickets that users wrote down as sent (`tickets.jsonl`), before a kill or after; `ledger_rows`
    the requests of this release in the ledger, which the gateways wrote. The two must be equal. `observed_share` is
    the canary's part of all requests while at the first ramp step.
    """

    candidate: str
    outcome: ReleaseEnding
    reason: str
    canary_requests: int
    observed_share: float = -1.0
    time_to_recovery_s: float = 0.0
    release_id: str = ""
    stable: str = ""
    requests: int = 0
    failed_requests: int = 0
    ledger_rows: int = 0
    first_step_requests: int = 0
    first_step_canary_requests: int = 0
    drill_s: float = 0.0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        """Work out the share from the counts where it is not given."""
        # Below zero: nobody has said it. An old `summary.json` has only the share, an old journal only the counts.
        if self.observed_share < 0:
            share = self.first_step_canary_requests / max(self.first_step_requests, 1)
            object.__setattr__(self, "observed_share", share)


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

    `offline` holds baseline and candidate on each suite. `heads` says of each chained file, by path in the run folder,
    where it stood; `seatrial audit` holds it to that.
    """

    run_id: str
    workflow: str
    stages: tuple[StageLine, ...]
    trained: tuple[TrainedLine, ...]
    # Not compared: the file keeps five numbers of each pair, and `eval/` the whole.
    offline: tuple[tuple[SuiteResult, SuiteResult], ...] = field(default=(), compare=False)
    releases: tuple[ReleaseOutcome, ...]
    stable_policy: str
    bundle_id: str
    exit_code: int
    paths: RunPaths
    endpoint: str = ""
    heads: Mapping[str, ChainHead] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the summary as plain JSON; `from_json` reads it back but for the suites."""
        suites = [
            {
                "suite": baseline.suite,
                "baseline_success": baseline.success.mean,
                "candidate_success": candidate.success.mean,
                "baseline_violations": baseline.violations,
                "candidate_violations": candidate.violations,
            }
            for baseline, candidate in self.offline
        ]
        return {**encode(self), "offline": suites}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunSummary:
        """Return a summary that `to_json` gave, without its suites. Raises pydantic's ValidationError."""
        return decode(cls, {**data, "offline": ()})
