"""The critic as a server: a reward model that scores finished runs in batches. The platform makes it a deployment."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from rl_actors.models import RewardModel


class CriticServer:
    """One reward model on one replica."""

    def __init__(self, path: str) -> None:
        """Load the model of a directory, in evaluation mode."""
        self._model = RewardModel.load(path)

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Return one calibrated score per sequence, in 0..1, as training's scorers do."""
        scores, _ = await asyncio.to_thread(self._model.critic_scores, sequences)
        return scores
