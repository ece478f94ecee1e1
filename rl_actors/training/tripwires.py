"""What a learner remembers of its tripwires: skips in a row, restores so far, and what each one said."""

from __future__ import annotations

from collections.abc import Mapping

from rl_actors.algorithms.stability import (
    Continue,
    RestoreLastGood,
    SkipUpdate,
    StabilityDecision,
    StabilityLimits,
    check_stability,
    escalate,
)


class Tripwires:
    """Judges one minibatch after the other. `trips` holds reason, metric, value and limit of those that tripped."""

    def __init__(self, limits: StabilityLimits) -> None:
        """Start with a clean record."""
        self._limits = limits
        self.num_skipped = 0  # optimizer steps in a row, across updates
        self.num_restores = 0
        self.trips: list[str] = []

    def judge(self, metrics: Mapping[str, float]) -> StabilityDecision:
        """Judge one minibatch, the streak of skips and the number of restores so far included."""
        decision = check_stability(metrics, self._limits)
        self.num_skipped = self.num_skipped + 1 if isinstance(decision, SkipUpdate) else 0
        decision = self._escalated(decision)
        if isinstance(decision, RestoreLastGood):
            self.num_restores, self.num_skipped = self.num_restores + 1, 0
            decision = self._escalated(decision)
        if not isinstance(decision, Continue):
            self.trips.append(str(decision))
        return decision

    def _escalated(self, decision: StabilityDecision) -> StabilityDecision:
        return escalate(decision, self._limits, consecutive_skips=self.num_skipped, restores=self.num_restores)
