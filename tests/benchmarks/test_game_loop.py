"""The relay game's scorer: the product's mix, and no penalty for what the sampler calls a violation."""

from __future__ import annotations

import pytest
from game_loop import GameScorer

from rl_actors.algorithms.rewards import RewardMix
from rl_actors.contracts import Outcome
from tests.rl_actors.fakes import make_rollout

MALFORMED = Outcome(success=True, violations=("malformed",), reasons=())


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_a_malformed_turn_costs_nothing_in_the_game(weight: float):
    rollout = make_rollout(outcome=MALFORMED)
    (score,) = GameScorer(outcome_weight=weight, critic=lambda _: 0.2).score([rollout])
    assert (score.outcome_reward, score.critic_score) == (1.0, 0.2)
    assert score.reward == weight * 1.0 + (1 - weight) * 0.2
    assert RewardMix(outcome_weight=weight).reward(rollout, 0.2) < score.reward, "negative control: in a run it does"
