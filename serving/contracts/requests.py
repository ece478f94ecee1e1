"""One live request as a row, and the rows of a version as a window: what gates read.

Times are Unix seconds (UTC); no field is ever null. `run_id` names a request, in rows, headers and on disk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from rl_actors.contracts import PlanRevision

ReleaseChannel = Literal["offline_eval", "canary", "general"]
RequestStatus = Literal["running", "ok", "truncated", "tool_budget", "timeout", "engine_error", "aborted"]
Success = Literal["yes", "no", "unknown"]
EventKind = Literal["violation", "override", "failure"]

UNSCORED: Final = -1.0  # critic_score of a request that the critic has not scored yet


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One request, one row (the article's observability schema).

    A row is written ahead with status `running` and the defaults below, then completed once.
    """

    run_id: str
    request_id: str  # the idempotency key
    session_key: str
    model_version: str
    reward_model_version: str
    policy_version: str
    bundle_id: str
    release_channel: ReleaseChannel  # from the router, never from the caller
    split_epoch: int
    started_at: float
    intent: str
    sandbox_level: str
    task_id: str = ""  # only tests and simulated users know one
    status: RequestStatus = "running"
    success: Success = "unknown"
    tool_calls_count: int = 0
    tool_error_count: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    duration_ms: float = 0.0
    cost: float = 0.0
    human_override: bool = False
    critic_score: float = UNSCORED
    policy_checks: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestCompletion:
    """The second half of a row, known only when the request ends. `policy_checks` maps check -> held."""

    status: RequestStatus
    success: Success
    tool_calls_count: int
    tool_error_count: int
    tokens_in: int
    tokens_out: int
    duration_ms: float
    cost: float
    policy_checks: Mapping[str, bool]
    plans: tuple[PlanRevision, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSample:
    """A finished request as gates see it, in order of completion."""

    session_key: str
    duration_ms: float
    cost: float
    success: Success
    completed_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEvent:
    """One bad event, stamped with the moment it became known (an override or a label may come late)."""

    at: float
    kind: EventKind
    run_id: str
    session_key: str
    policy_version: str
    split_epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficWindow:
    """All finished requests of a version in one channel and split epoch; `num_labelled` have a known outcome."""

    policy_version: str
    release_channel: ReleaseChannel
    split_epoch: int
    num_runs: int
    num_running: int
    num_sessions: int
    num_labelled: int
    num_successes: int
    num_overrides: int
    tool_calls_count: int
    tool_error_count: int
    failed_checks: Mapping[str, int]  # requests by failed policy check
    samples: tuple[RequestSample, ...]

    @property
    def success_rate(self) -> float:
        """Successes over labelled requests; 0 without labels."""
        return self.num_successes / self.num_labelled if self.num_labelled else 0.0

    @property
    def human_override_rate(self) -> float:
        """Overridden requests over finished ones; 0 without any."""
        return self.num_overrides / self.num_runs if self.num_runs else 0.0

    @property
    def tool_error_rate(self) -> float:
        """Tool errors over tool calls; 0 without calls."""
        return self.tool_error_count / self.tool_calls_count if self.tool_calls_count else 0.0

    @property
    def cost_per_success(self) -> float:
        """Cost of all requests over successes; infinite when nothing succeeded, never 0."""
        # Failures cost, too: a version that fails cheaply must not look cheap.
        return sum(sample.cost for sample in self.samples) / self.num_successes if self.num_successes else math.inf
