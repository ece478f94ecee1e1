"""A reward model: the SFT backbone, a Bradley-Terry score and a value per rubric criterion, read at the last token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from rl_actors.contracts import BadDataError
from rl_actors.models.loading import load_backbone

_CONFIG, _HEADS = "reward_model.json", "heads.safetensors"


def pad_sequences(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return right-padded token ids and attention mask, [B, T]."""
    ids = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True)
    attention = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
    return ids.to(device), attention.to(device)


class RewardModel(torch.nn.Module):
    """Scores finished rollouts; with `temperature` dividing it, sigmoid(score margin) is a calibrated chance."""

    def __init__(self, backbone: PreTrainedModel, criteria: Sequence[str]) -> None:
        """Put heads on a backbone."""
        super().__init__()
        self.backbone = backbone
        self.criteria = tuple(criteria)
        hidden = int(backbone.config.hidden_size)
        self.score_head = torch.nn.Linear(hidden, 1, bias=False)
        self.rubric_head = torch.nn.Linear(hidden, len(self.criteria))
        # Before training every rollout scores 0: neither side of a pair starts ahead.
        for parameter in (self.score_head.weight, self.rubric_head.weight, self.rubric_head.bias):
            torch.nn.init.zeros_(parameter)
        self.temperature = 1.0

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores [B] in logits and rubric values [B, criteria] on the scale 0..1, of sequences padded right."""
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        last = attention_mask.sum(dim=1) - 1
        pooled = hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
        return self.score_head(pooled).squeeze(-1), self.rubric_head(pooled)

    @torch.no_grad()
    def critic_scores(self, sequences: Sequence[Sequence[int]]) -> tuple[list[float], list[list[float]]]:
        """Return each sequence's chance against a score of 0, sigmoid(score / temperature), and its rubric values."""
        scores_B, rubric = self(*pad_sequences(sequences, self.score_head.weight.device))
        return torch.sigmoid(scores_B / self.temperature).tolist(), rubric.tolist()

    def save(self, directory: str | Path) -> None:
        """Write backbone, heads and temperature."""
        path = Path(directory)
        self.backbone.save_pretrained(path)
        heads = {name: x.contiguous() for name, x in self.state_dict().items() if not name.startswith("backbone.")}
        save_file(heads, path / _HEADS)
        config = json.dumps({"criteria": list(self.criteria), "temperature": self.temperature}, indent=1)
        (path / _CONFIG).write_text(config, encoding="utf8")

    @classmethod
    def load(cls, directory: str | Path) -> RewardModel:
        """Read what `save` wrote, in float32, in evaluation mode.

        Raises:
            BadDataError: A head is missing.
        """
        path = Path(directory)
        config: dict[str, Any] = json.loads((path / _CONFIG).read_text(encoding="utf8"))
        model = cls(load_backbone(path), config["criteria"])
        missing = model.load_state_dict(load_file(path / _HEADS), strict=False).missing_keys
        # A head that is not there would score 0, and nobody would see why.
        if lost := [name for name in missing if not name.startswith("backbone.")]:
            raise BadDataError("reward model", str(path), f"{_HEADS} lacks {', '.join(lost)}; train it again")
        model.temperature = float(config["temperature"])
        return model.eval()
