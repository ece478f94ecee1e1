"""The rules of a release, the states it passes, and what may be decided in each.

GateResult -> Decision -> ReleaseState -> SplitRecord. Times are Unix seconds (UTC), shares are fractions in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from rl_actors.contracts import BadInputError
from serving.contracts.gates import ARTICLE_GATES, GateResults

Ending = Literal["rolled_back", "failed_back", "halted"]

STALE_AFTER_S: Final = 30.0  # the age at which a split record that nobody refreshes counts as share 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitRecord:
    """How traffic is divided, by epoch. `candidate` is empty, and `share` 0, when there is none."""

    epoch: int
    stable: str
    candidate: str
    share: float
    salt: str
    updated_at: float

    def __post_init__(self) -> None:
        """Refuse a split that could route nowhere."""
        if not self.stable or self.epoch < 1:
            raise BadInputError("split", (self.epoch, self.stable), "a split has an epoch >= 1 and a stable version")
        if not 0.0 <= self.share <= 1.0 or (self.share > 0 and not self.candidate):
            raise BadInputError("split.share", self.share, "give a share in [0, 1], and a candidate with it")


@dataclass(frozen=True, slots=True, kw_only=True)
class RampStep:
    """One step of the ramp: hold `share` until `min_requests` candidate runs ended, `max_duration_s` at the longest."""

    share: float
    min_requests: int
    max_duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleasePlan:
    """The rules of one release, armed before any traffic. All `gates` must pass to advance; any fail rolls back.

    `alpha` bounds the chance of a false roll back and, per gate, of a false promotion; `ramp_alpha` that of a false
    pass to the next step. Margins are relative (non-inferiority). With `may_promote=False` it is a drill.
    """

    ramp: tuple[RampStep, ...]
    max_duration_s: float
    gates: tuple[str, ...] = ARTICLE_GATES
    stop_rules: tuple[str, ...] = ("task_success_not_worse",)
    critical_checks: tuple[str, ...] = ()
    alpha: float = 0.05
    ramp_alpha: float = 0.25
    event_margin: float = 0.5
    event_rate_tolerance: float = 0.05  # bad sessions at this rate are fine, even too rare to compare the arms
    cost_margin: float = 0.10
    latency_limit: float = 0.15
    min_samples: int = 50
    full_samples: int = 350  # from n m / (n + m) of them on, the p95 itself decides, whatever its bounds
    sample_ratio_alpha: float = 0.001
    max_rollback_s: float = 300.0
    drill_max_age_s: float = 86_400.0
    ack_poll_s: float = 2.0
    may_promote: bool = True
    tick_s: float = 5.0
    stale_after_s: float = STALE_AFTER_S  # a controller that was away for longer does not count its absence
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a plan without rules, or whose ramp does not rise inside (0, 1)."""
        if not self.gates or not self.stop_rules:
            raise BadInputError("plan.gates / plan.stop_rules", (), "a canary starts only with gates and stop rules")
        shares = [step.share for step in self.ramp]
        if not shares or shares != sorted(set(shares)) or not 0.0 < shares[0] <= shares[-1] < 1.0:
            raise BadInputError("plan.ramp", shares, "give at least one share, each in (0, 1) and above the one before")
        if not 0.0 < self.alpha < 0.5 or self.min_samples < 2:
            raise BadInputError("plan.alpha", self.alpha, "give 0 < alpha < 0.5 and min_samples >= 2")

    @property
    def rules(self) -> tuple[str, ...]:
        """Gates and stop rules, each once."""
        return tuple(dict.fromkeys((*self.gates, *self.stop_rules)))

    @property
    def alpha_per_rule(self) -> float:
        """Share of alpha for each rule that can roll back on its own (Bonferroni)."""
        return self.alpha / len(self.rules)


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """Which version may replace which. Its id salts the split, so that no session is always a test subject."""

    release_id: str
    stable: str
    candidate: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparing:
    """Nothing has been touched yet; `epoch` is the split epoch found (0: none)."""

    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drilling:
    """The rollback path is being timed at share 0, before any user traffic."""

    started_at: float
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """The candidate carries the share of ramp step `step` (from 0)."""

    step: int
    epoch: int
    step_started_at: float
    release_started_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Promoting:
    """All gates passed at the last step; the candidate becomes stable once every gateway acknowledged."""

    decided_at: float
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Restoring:
    """All traffic goes back to stable, waiting for every gateway to acknowledge; `ending` names what follows."""

    ending: Ending
    reason: str
    detected_at: float
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Promoted:
    """The candidate carries all traffic. It can still fail back with one action."""

    at: float
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """Stable carries all traffic again; `time_to_recovery_s` runs from detection to acknowledgement."""

    reason: str
    time_to_recovery_s: float


class RolledBack(Recovered):
    """The candidate lost."""


class FailedBack(Recovered):
    """A promoted candidate was taken back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Halted:
    """Stopped for a human: the comparison or the routing is broken. The safe split was asked for."""

    reason: str


ReleaseState = Preparing | Drilling | Canary | Promoting | Restoring | Promoted | RolledBack | FailedBack | Halted


@dataclass(frozen=True, slots=True, kw_only=True)
class Reasoned:
    """The part that all decisions share: the reason, and the results it rests on."""

    reason: str
    evidence: GateResults


class Hold(Reasoned):
    """Change nothing."""


class Advance(Reasoned):
    """Go on to the next state on the way to promotion."""


class Promote(Reasoned):
    """Make the candidate stable."""


class RollBack(Reasoned):
    """Give all traffic back to stable."""


class Halt(Reasoned):
    """Give all traffic back to stable and ask a human: not the candidate but the measurement failed."""


Decision = Hold | Advance | Promote | RollBack | Halt
