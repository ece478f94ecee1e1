"""The reward scorer: under the declared mix, order kept, calibrated chance."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from rl_actors.actors.reward_scorer import RewardScorer
from rl_actors.algorithms.rewards import RewardMix
from rl_actors.contracts.rollouts import Rollout
from rl_actors.models.reward_model import RewardModel, pad_sequences
from tests.rl_actors.fakes import BAD, GOOD, make_rollout, make_turn

MIX = RewardMix(outcome_weight=0.75)


@pytest.fixture(scope="module")
def directory(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    backbone: Any = AutoModel.from_pretrained(tiny_dir, dtype=torch.float32)
    model = RewardModel(backbone, ("correct", "polite"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.score_head.weight.normal_(generator=generator)
        model.rubric_head.weight.normal_(generator=generator)
    model.temperature = 2.0
    path = tmp_path_factory.mktemp("reward")
    model.save(path)
    return path


def rollouts() -> list[Rollout]:
    """Five rollouts of different length, longest in the middle."""
    made = []
    for number, length in enumerate((3, 9, 20, 1, 5)):
        turn = make_turn((1, 20 + number), [30 + number + step for step in range(length)])
        made.append(make_rollout(f"r{number}", turns=(turn,), outcome=GOOD if number % 2 else BAD))
    return made


def test_scores_come_back_in_order_whatever_the_length(directory: Path):
    scores = RewardScorer(str(directory), "rm-a", MIX).score(rollouts())
    assert [score.rollout_id for score in scores] == [f"r{number}" for number in range(5)]
    model = RewardModel.load(directory)
    for score, rollout in zip(scores, rollouts(), strict=True):
        turn = rollout.turns[0]
        ids, attention = pad_sequences([(*turn.prompt_token_ids, *turn.completion.token_ids)], torch.device("cpu"))
        with torch.no_grad():
            raw, rubric = model(ids, attention)
        critic = 1.0 / (1.0 + math.exp(-float(raw) / 2.0))
        assert score.critic_score == pytest.approx(critic, rel=1e-4)
        assert score.rubric == pytest.approx(
            dict(zip(("correct", "polite"), rubric[0].tolist(), strict=True)), rel=1e-3
        )
        assert score.outcome_reward == MIX.outcome_reward(rollout)
        assert score.reward == pytest.approx(0.75 * score.outcome_reward + 0.25 * critic, rel=1e-4)
        assert score.reward_model_version == "rm-a"


def test_the_size_of_a_batch_changes_no_score(directory: Path):
    whole = RewardScorer(str(directory), "rm-a", MIX).score(rollouts())
    for one, other in zip(
        whole, RewardScorer(str(directory), "rm-a", MIX, batch_size=2).score(rollouts()), strict=True
    ):
        assert one.reward == pytest.approx(other.reward, rel=1e-4)


def test_nothing_to_score_is_no_score(directory: Path):
    assert RewardScorer(str(directory), "rm-a", MIX).score([]) == []
