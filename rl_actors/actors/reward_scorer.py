"""A reward scorer: verified outcome plus calibrated reward model under a declared mix."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rl_actors.agent import rollout_token_ids
from rl_actors.algorithms import RewardMix
from rl_actors.contracts import Rollout, Score
from rl_actors.models import RewardModel


class RewardScorer:
    """Runs as a Ray actor."""

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

    def _score_batch(self, rollouts: Sequence[Rollout]) -> list[Score]:
        critics, rubrics = self._model.critic_scores([rollout_token_ids(rollout) for rollout in rollouts])
        named = [dict(zip(self._model.criteria, rubric, strict=True)) for rubric in rubrics]
        return [
            self._mix.score(rollout, critic, rubric=rubric, reward_model_version=self._version)
            for rollout, critic, rubric in zip(rollouts, critics, named, strict=True)
        ]
