"""What a run tells whoever watches it, and how it ended: the border between the pipeline and the console."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from rl_actors.durable.codec import decode, encode

ReleaseOutcome = Literal["promoted", "rolled_back", "failed_back", "halted"]


class Watch(Protocol):
    """Someone who looks on. No call may raise: looking on never changes a run."""

    def stage_started(self, name: str, detail: str) -> None:
        """A stage begins; `detail` says in a few words on what."""
        ...

    def stage_finished(self, name: str, line: str, seconds: float) -> None:
        """A stage ended (or was found finished: 0 seconds); `line` is its result in one line."""
        ...

    def progress(self, name: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """`done` of `total` steps of the running stage are over; `metrics` are of the last one."""
        ...

    def note(self, line: str) -> None:
        """Something worth a line that is not a stage's result."""
        ...


class Silent:
    """Watches nothing, for tests and library use."""

    def stage_started(self, name: str, detail: str) -> None:
        """Ignore it."""

    def stage_finished(self, name: str, line: str, seconds: float) -> None:
        """Ignore it."""

    def progress(self, name: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Ignore it."""

    def note(self, line: str) -> None:
        """Ignore it."""


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
