"""A reward scorer: verified outcome plus calibrated reward model under a declared mix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rl_actors.agent.rollout import rollout_token_ids
from rl_actors.contracts import Rollout, Score
from rl_actors.models.reward_model import RewardModel
from rl_actors.training.reward import pad_sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardMix:
    """reward = outcome_weight * outcome + (1 - outcome_weight) * critic, both in 0..1, minus the violation penalty."""

    outcome_weight: float
    violation_penalty: float = 0.5

    def outcome_reward(self, rollout: Rollout) -> float:
        """Return 1 for a verified success, 0 for a failure, less for a violation."""
        return float(rollout.outcome.success) - self.violation_penalty * bool(rollout.outcome.violations)

    def combine(self, outcome_reward: float, critic_score: float) -> float:
        """Return the scalar reward."""
        return self.outcome_weight * outcome_reward + (1.0 - self.outcome_weight) * critic_score


class RewardScorer:
    """Runs as a Ray actor. The critic score is sigmoid(score / temperature), against a score of 0."""

    def __init__(self, path: str, version: str, mix: RewardMix, num_threads: int = 1, batch_size: int = 16) -> None:
        """Load the reward model."""
        torch.set_num_threads(num_threads)
        self._model = RewardModel.load(path)
        self._version, self._mix, self._batch_size = version, mix, batch_size

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """Return one score per rollout, in order."""
        order = sorted(range(len(rollouts)), key=lambda index: len(rollout_token_ids(rollouts[index])))
        scores: dict[int, Score] = {}
        for start in range(0, len(order), self._batch_size):
            chunk = order[start : start + self._batch_size]
            scores |= zip(chunk, self._score_batch([rollouts[index] for index in chunk]), strict=True)
        return [scores[index] for index in range(len(rollouts))]

    def score_tokens(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Return the calibrated critic score, 0..1, of token sequences; what serving logs."""
        return self._critic(sequences)[0]

    @torch.no_grad()
    def _critic(self, sequences: Sequence[Sequence[int]]) -> tuple[list[float], list[list[float]]]:
        ids, attention = pad_sequences(sequences, next(self._model.parameters()).device)
        score, rubric = self._model(ids, attention)
        return torch.sigmoid(score / self._model.temperature).tolist(), rubric.tolist()

    def _score_batch(self, rollouts: Sequence[Rollout]) -> list[Score]:
        critics, rubrics = self._critic([rollout_token_ids(rollout) for rollout in rollouts])
        scores = []
        for rollout, critic, rubric in zip(rollouts, critics, rubrics, strict=True):
            outcome = self._mix.outcome_reward(rollout)
            scores.append(
                Score(
                    rollout_id=rollout.rollout_id,
                    reward=self._mix.combine(outcome, critic),
                    outcome_reward=outcome,
                    critic_score=critic,
                    rubric=dict(zip(self._model.criteria, rubric, strict=True)),
                    reward_model_version=self._version,
                )
            )
        return scores
