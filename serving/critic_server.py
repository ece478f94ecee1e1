"""The critic as a server: a reward model that scores finished runs in batches. The platform makes it a deployment."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import torch

from rl_actors.models.reward_model import RewardModel


class CriticServer:
    """One reward model on one replica."""

    def __init__(self, path: str, pad_token_id: int = 0) -> None:
        """Load the model of a directory, in evaluation mode."""
        self._model = RewardModel.load(path)
        self._pad = pad_token_id

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Return one calibrated score per sequence, sigmoid(logit / temperature) in 0..1, as training's scorers do."""
        return await asyncio.to_thread(self._score, sequences)

    @torch.inference_mode()
    def _score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        longest = max(len(sequence) for sequence in sequences)
        ids_BT = torch.full((len(sequences), longest), self._pad)
        mask_BT = torch.zeros((len(sequences), longest), dtype=torch.long)
        for row, sequence in enumerate(sequences):
            ids_BT[row, : len(sequence)] = torch.tensor(sequence)
            mask_BT[row, : len(sequence)] = 1
        scores_B, _ = self._model(ids_BT, mask_BT)
        return torch.sigmoid(scores_B / self._model.temperature).tolist()
