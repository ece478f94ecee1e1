"""The Reliability Brief as data: what changed, what was tested, what rollback guarantee exists (requirements 110-118).

Everything here was read from rows by `rows.collect_brief_input`; None and empty mean "not measured", never zero.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Literal

from rl_actors.contracts import Calibration, Interval
from serving.contracts import GateResult

SECTIONS: Final = ("changed", "tested", "gates", "decision", "rollback", "limits")
"""Performance (`tested`) and control (`gates`, `decision`, `rollback`): no section is optional."""

GLOSSARY: Final = (
    "success_rate",
    "human_override_rate",
    "tool_error_rate",
    "cost_per_success",
    "reliability_score",
    "time_to_recovery",
    "e_value",
)
"""Ids of the metrics a report may name, the same in all locales."""

# The suite whose tasks look like traffic; the frozen and adversarial ones are special on purpose.
_ORDINARY_SUITES: Final = ("capability", "held_out", "frozen")

Phase = Literal["offline", "canary"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeRow:
    """One part of the bundle that differs, as people name it, with the start of its hash."""

    member: str
    before: str
    after: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteRow:
    """Both policies on one suite. Violations are counted singly; a task with several counts once as violating."""

    suite: str
    num_tasks: int
    baseline: Interval
    candidate: Interval
    baseline_violations: int
    candidate_violations: int
    candidate_violating_tasks: int
    baseline_cost: float
    candidate_cost: float


@dataclass(frozen=True, slots=True, kw_only=True)
class IntentRow:
    """Success of both policies on one intent, as fractions."""

    intent: str
    baseline: float
    candidate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmRow:
    """One policy on live traffic, out of the run ledger."""

    policy: str
    num_runs: int
    success_rate: float | None
    human_override_rate: float
    tool_error_rate: float
    cost_per_success: float
    reliability_score: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GateRow:
    """A verdict with its evidence, before or during live traffic."""

    phase: Phase
    result: GateResult


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseRow:
    """How one release ended (`state`: Promoted, RolledBack, ...) and why; recovery None where none was needed."""

    release_id: str
    stable: str
    candidate: str
    state: str
    decision: str
    reason: str
    deciding_gates: tuple[str, ...]
    shares: tuple[float, ...]
    time_to_recovery_s: float | None
    drill_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningPoint:
    """One PPO step: success of the rollouts as a fraction, KL to the baseline in nats per token."""

    step: int
    success: float
    kl: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvidencePoint:
    """One tick of the canary: log10 e-values of the event test, and the share then in force."""

    minutes: float
    log10_e_fail: float
    log10_e_pass: float
    share: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryCurve:
    """Evidence over time, with log10 of the limits at which it decides."""

    points: tuple[EvidencePoint, ...]
    fail_limit: float | None
    pass_limit: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CharterRow:
    """The charter's answers as the spec gives them (empty: not asked then), and the tickets a release really met."""

    workload: str
    constraints: str
    rollback_path: str
    tickets_per_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BriefInput:
    """Everything a brief may say."""

    run_id: str
    workflow: str
    charter: CharterRow
    written_at: float | None
    bundle_id: str
    compared_with: Literal["previous", "baseline", ""]
    compared_bundle_id: str
    changes: tuple[ChangeRow, ...] | None
    unchanged: tuple[str, ...]
    suites: tuple[SuiteRow, ...]
    intents: tuple[IntentRow, ...]
    success_gain: float | None
    p_value: float | None
    reward_model: str
    calibration: Calibration | None
    arms: tuple[ArmRow, ...]
    gates: tuple[GateRow, ...]
    release: ReleaseRow | None
    other_releases: tuple[ReleaseRow, ...]
    triggers: tuple[str, ...]
    learning: tuple[LearningPoint, ...]
    canary: CanaryCurve

    @property
    def main_suite(self) -> SuiteRow | None:
        """The suite that stands for ordinary work."""
        return self._suite(main_suite([row.suite for row in self.suites]))

    @property
    def adversarial_suite(self) -> SuiteRow | None:
        """The suite of attacks."""
        return self._suite("adversarial")

    def _suite(self, name: str) -> SuiteRow | None:
        return next((row for row in self.suites if row.suite == name), None)

    @property
    def releases(self) -> tuple[ReleaseRow, ...]:
        """Every release of the run, this brief's first."""
        return (*([self.release] if self.release else []), *self.other_releases)


def main_suite(names: Collection[str]) -> str:
    """Return the name of the suite that stands for ordinary work: capability, else held-out, else frozen, else none."""
    return next((name for name in _ORDINARY_SUITES if name in names), "")
