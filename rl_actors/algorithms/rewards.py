"""The reward of a rollout: the sum of registered terms under a declared mix. No tensor, no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from rl_actors.contracts import Rollout, Score


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardMix:
    """Weight of the verified outcome, of which the critic has the rest, and what a violation takes off the outcome."""

    outcome_weight: float
    violation_penalty: float = 0.5

    def outcome_reward(self, rollout: Rollout) -> float:
        """Return 1 for a verified success, 0 for a failure, less for a violation."""
        return float(rollout.outcome.success) - self.violation_penalty * bool(rollout.outcome.violations)

    def reward(self, rollout: Rollout, critic_score: float) -> float:
        """Return the scalar reward: the sum of all terms."""
        return sum(term(self, rollout, critic_score) for term in REWARD_TERMS.values())

    def score(
        self, rollout: Rollout, critic_score: float, *, rubric: Mapping[str, float], reward_model_version: str
    ) -> Score:
        """Return the full result for a rollout that the critic gave `critic_score`, in 0..1."""
        return Score(
            rollout_id=rollout.rollout_id,
            reward=self.reward(rollout, critic_score),
            outcome_reward=self.outcome_reward(rollout),
            critic_score=critic_score,
            rubric=rubric,
            reward_model_version=reward_model_version,
        )


RewardTerm = Callable[[RewardMix, Rollout, float], float]
"""(mix, rollout, critic score) -> the term's part of the reward, weighed."""

REWARD_TERMS: Final[Mapping[str, RewardTerm]] = {
    "outcome": lambda mix, rollout, _critic_score: mix.outcome_weight * mix.outcome_reward(rollout),
    "critic": lambda mix, _rollout, critic_score: (1.0 - mix.outcome_weight) * critic_score,
}
