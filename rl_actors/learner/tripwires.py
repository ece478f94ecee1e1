"""What a learner remembers of its tripwires: skips in a row, restores so far, and what each one said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from rl_actors.algorithms import (
    Continue,
    ReasonCode,
    RestoreLastGood,
    SkipUpdate,
    StabilityDecision,
    StabilityLimits,
    check_stability,
    escalate,
)

_EXPLAINED: Final = "explained_variance"


class Tripwires:
    """Judges one minibatch after the other. `trips` holds reason, metric, value and limit of those that tripped.

    Both `trips` and what could not be checked are those of the update that `begin_update` began.
    """

    def __init__(self, limits: StabilityLimits) -> None:
        """Start with a clean record."""
        # The loop judges this one, over rollouts of many steps; of a minibatch it would always be unchecked.
        self._limits = replace(limits, max_reward_outcome_divergence=None)
        self.num_skipped = 0  # optimizer steps in a row, across updates
        self.num_restores = 0
        self.begin_update()

    def begin_update(self) -> None:
        """Forget what was said of the minibatches of another update; streaks go on."""
        self.trips: list[str] = []
        self._unchecked = Counter[ReasonCode]()

    @property
    def unchecked(self) -> dict[str, float]:
        """`unchecked_<reason code>`: minibatches that passed although this limit's metric was not there."""
        return {f"unchecked_{code}": float(count) for code, count in self._unchecked.items()}

    def judge(self, metrics: Mapping[str, float], *, is_critic_warmup: bool = False) -> StabilityDecision:
        """Judge one minibatch, the streak of skips and the number of restores so far included.

        A critic that warms up explains nothing yet, and a skipped step could not teach it: it is not judged.
        """
        metrics = {name: value for name, value in metrics.items() if not (is_critic_warmup and name == _EXPLAINED)}
        decision = check_stability(metrics, self._limits)
        self.num_skipped = self.num_skipped + 1 if isinstance(decision, SkipUpdate) else 0
        decision = self._escalated(decision)
        if isinstance(decision, RestoreLastGood):
            self.num_restores, self.num_skipped = self.num_restores + 1, 0
            decision = self._escalated(decision)
        if isinstance(decision, Continue):
            self._unchecked.update(decision.unchecked)
        else:
            self.trips.append(str(decision))
        return decision

    def _escalated(self, decision: StabilityDecision) -> StabilityDecision:
        return escalate(decision, self._limits, consecutive_skips=self.num_skipped, restores=self.num_restores)
