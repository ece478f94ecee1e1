"""Watches whether the learned reward still measures what the verifier verifies, over a whole run."""

from __future__ import annotations

from collections.abc import Sequence

from rl_actors.algorithms.stability import reward_outcome_divergence
from rl_actors.contracts import Rollout, Score

WINDOW_STEPS = 4
Window = tuple[Sequence[float], Sequence[float]]


class DivergenceWatch:
    """Compares the first steps it saw with the latest ones. `seen` is its whole state, plain JSON."""

    def __init__(self, seen: Sequence[Window] = ()) -> None:
        """Go on from what another watch has seen."""
        self._steps = [(list(critic), list(outcome)) for critic, outcome in seen]

    @property
    def seen(self) -> list[Window]:
        """Critic scores and verified outcomes of the steps it still needs."""
        return [*self._steps]

    def observe(self, rollouts: Sequence[Rollout], scores: Sequence[Score]) -> float:
        """Take in one step; returns the divergence in standard deviations, 0.0 until two windows do not overlap."""
        critic = [score.critic_score for score in scores]
        self._steps.append((critic, [float(rollout.outcome.success) for rollout in rollouts]))
        if len(self._steps) > 2 * WINDOW_STEPS:
            del self._steps[WINDOW_STEPS]  # between the two windows
        if len(self._steps) < 2 * WINDOW_STEPS:
            return 0.0
        early, late = self._steps[:WINDOW_STEPS], self._steps[-WINDOW_STEPS:]
        columns = [[x for step in window for x in step[column]] for window in (early, late) for column in (0, 1)]
        return reward_outcome_divergence(*columns)
