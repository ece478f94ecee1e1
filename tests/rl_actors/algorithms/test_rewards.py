"""The reward mix: its registered terms by hand, what a critic can and cannot do, and a term of one's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_actors.algorithms import rewards
from rl_actors.algorithms.rewards import RewardMix
from rl_actors.contracts import Outcome
from rl_actors.contracts.rollouts import Score
from tests.rl_actors.fakes import BAD, GOOD, make_rollout

MIX = RewardMix(outcome_weight=0.75)
SUCCESS_AGAINST_POLICY = Outcome(success=True, violations=("no_owner_check",), reasons=())
FAILURE = Outcome(success=False, violations=(), reasons=())


@pytest.mark.parametrize(
    ("outcome", "reward"), [(GOOD, 1.0), (FAILURE, 0.0), (BAD, -0.5), (SUCCESS_AGAINST_POLICY, 0.5)]
)
def test_a_violation_costs_whatever_came_of_it(outcome: Outcome, reward: float):
    rollout = make_rollout(outcome=outcome)
    assert MIX.outcome_reward(rollout) == reward
    assert MIX.reward(rollout, 0.5) == 0.75 * reward + 0.25 * 0.5


def test_many_violations_cost_as_one():
    several = Outcome(success=False, violations=("a", "b", "c"), reasons=())
    assert MIX.outcome_reward(make_rollout(outcome=several)) == -0.5


@pytest.mark.parametrize(("weight", "reward"), [(1.0, 1.0), (0.0, 0.2), (0.75, 0.8)])
def test_the_mix_by_hand(weight: float, reward: float):
    assert RewardMix(outcome_weight=weight).reward(make_rollout(outcome=GOOD), 0.2) == pytest.approx(reward)


@given(weight=st.floats(0.51, 1.0), liked=st.floats(0, 1), disliked=st.floats(0, 1))
def test_above_one_half_no_critic_can_outweigh_the_outcome(weight: float, liked: float, disliked: float):
    mix = RewardMix(outcome_weight=weight)
    assert mix.reward(make_rollout(outcome=GOOD), disliked) > mix.reward(make_rollout(outcome=FAILURE), liked)


def test_below_one_half_a_critic_can():
    """Negative control of the one above."""
    mix = RewardMix(outcome_weight=0.4)
    assert mix.reward(make_rollout(outcome=GOOD), 0.0) < mix.reward(make_rollout(outcome=FAILURE), 1.0)


@given(weight=st.floats(0, 1), critic=st.floats(0, 1), outcome=st.sampled_from([GOOD, FAILURE, BAD]))
def test_the_sum_of_terms_is_the_written_out_mix_bit_for_bit(weight: float, critic: float, outcome: Outcome):
    mix = RewardMix(outcome_weight=weight, violation_penalty=0.0)
    assert mix.reward(make_rollout(outcome=outcome), critic) == weight * outcome.success + (1 - weight) * critic


def test_a_score_holds_its_parts():
    found = MIX.score(make_rollout("r1", outcome=BAD), 0.2, rubric={"polite": 0.5}, reward_model_version="rm-a")
    assert found == Score(
        rollout_id="r1", reward=0.75 * -0.5 + 0.25 * 0.2, outcome_reward=-0.5, critic_score=0.2,
        rubric={"polite": 0.5}, reward_model_version="rm-a",
    )  # fmt: skip


def test_a_registered_term_enters_every_reward(monkeypatch: pytest.MonkeyPatch):
    """README's recipe "add a reward term": a function and its registration; the parts beside it stay."""
    rollout = make_rollout(outcome=GOOD, tool_calls=3)
    before = MIX.score(rollout, 0.2, rubric={}, reward_model_version="rm-a")
    monkeypatch.setitem(rewards.REWARD_TERMS, "calls", lambda _mix, run, _critic: -0.125 * run.tool_calls_count)  # type: ignore[arg-type]
    after = MIX.score(rollout, 0.2, rubric={}, reward_model_version="rm-a")
    assert after.reward == before.reward - 0.375
    assert (after.outcome_reward, after.critic_score) == (before.outcome_reward, before.critic_score)
