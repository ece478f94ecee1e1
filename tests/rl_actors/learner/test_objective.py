"""Rewards as the recipe wants them, and advantages on every microbatch: numbers by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rl_actors.algorithms.batching import collate
from rl_actors.contracts.recipe import RECIPES, Recipe
from rl_actors.contracts.rollouts import TrainingSample
from rl_actors.learner.batch import Microbatch
from rl_actors.learner.objective import fill_advantages, kept_fraction, shape_rewards


def sample(name: str, group: int, reward: float, *, length: int = 4, truncated: bool = False) -> TrainingSample:
    """One prompt token, then sampled tokens only."""
    return TrainingSample(
        rollout_id=name,
        group_id=group,
        weights_versions=(0,),
        token_ids=(1,) * length,
        loss_mask=(False, *(True,) * (length - 1)),
        rollout_logprobs=(0.0,) * length,
        reward=reward,
        truncated=truncated,
    )


PAIR = [sample("a", 0, 0.0), sample("b", 0, 1.0), sample("c", 1, 5.0), sample("d", 1, 5.0)]


def rewards(samples: list[TrainingSample]) -> list[float]:
    return [one.reward for one in samples]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ppo_kl", [-1.0, 1.0, 0.0, 0.0]),
        ("rloo", [-1.0, 1.0, 0.0, 0.0]),
        ("dr_grpo", [-0.5, 0.5, 0.0, 0.0]),
        ("grpo", [-0.5 / 0.5**0.5, 0.5 / 0.5**0.5, 0.0, 0.0]),
    ],
)
def test_rewards_become_advantages_over_the_group(name: str, expected: list[float]):
    assert rewards(shape_rewards(PAIR, RECIPES[name])) == pytest.approx(expected, abs=1e-5)


def test_gae_without_a_group_baseline_keeps_rewards():
    assert rewards(shape_rewards(PAIR, Recipe(group_baseline=False))) == [0.0, 1.0, 5.0, 5.0]


def test_groups_without_signal_are_left_out_unless_nothing_else_is_left():
    """The verified outcome decides: the last two scored differently, both failed, and that is noise of a model."""
    recipe = replace(RECIPES["rloo"], drop_flat_groups=True)
    a, b, c, d = PAIR
    made = [a, replace(b, succeeded=True), replace(c, reward=0.11), replace(d, reward=0.13)]
    assert [one.rollout_id for one in shape_rewards(made, recipe)] == ["a", "b"]
    assert kept_fraction(shape_rewards(made, recipe), made) == 0.5
    assert [one.rollout_id for one in shape_rewards(made[2:], recipe)] == ["c", "d"]
    assert len(shape_rewards(made, RECIPES["rloo"])) == 4, "negative control: off by default"


def test_the_overlong_penalty_enters_before_attempts_are_compared():
    """Sampled lengths 3 and 7 at a ramp of 4 tokens to 8: penalties 0 and -0.75."""
    two = [sample("short", 0, 1.0), sample("long", 0, 1.0, length=8)]
    recipe = replace(RECIPES["rloo"], overlong_max=8, overlong_buffer=4)
    assert rewards(shape_rewards(two, recipe)) == pytest.approx([0.75, -0.75])
    assert rewards(shape_rewards(two, RECIPES["rloo"])) == [0.0, 0.0]


def test_truncated_rollouts_train_nothing_but_still_are_a_baseline():
    two = [sample("whole", 0, 1.0), sample("cut", 0, 0.0, truncated=True)]
    found = shape_rewards(two, replace(RECIPES["rloo"], mask_truncated=True))
    assert [sum(one.loss_mask) for one in found] == [3, 0]
    assert found[0].reward == 1.0
    assert [sum(one.loss_mask) for one in shape_rewards(two, RECIPES["rloo"])] == [3, 3]


# --- rewards against the group --------------------------------------------------------------------


def against_group(samples: list[TrainingSample]) -> list[TrainingSample]:
    """As the default recipe does, with a critic: the reward less the mean of the other attempts."""
    return shape_rewards(samples, Recipe())


def grouped(*rewards_by_group: list[float]) -> list[TrainingSample]:
    """One sample per reward; groups are interleaved as workers hand them back."""
    pairs = [(group, reward) for group, rewards in enumerate(rewards_by_group) for reward in rewards]
    made = [sample(f"r{n}", group, reward) for n, (group, reward) in enumerate(pairs)]
    return made[::2] + made[1::2]


def test_a_reward_is_measured_against_the_other_attempts_at_its_task():
    found = {one.rollout_id: one.reward for one in against_group(grouped([1.0, 0.0, 0.0], [5.0, 4.0]))}
    assert found == {"r0": 1.0, "r1": -0.5, "r2": -0.5, "r3": 1.0, "r4": -1.0}


@pytest.mark.parametrize("rewards", [[0.0, 0.0, 0.0], [1.0, 1.0]])
def test_a_task_that_always_ends_the_same_teaches_nothing(rewards: list[float]):
    assert {one.reward for one in against_group(grouped(rewards))} == {0.0}


def test_single_attempts_keep_their_rewards_where_all_are_single():
    assert [one.reward for one in against_group(grouped([0.7], [0.2]))] == [0.7, 0.2]


def test_an_attempt_that_lost_its_group_is_worth_nothing():
    """Its raw reward among centred ones would look like a huge success, whatever it was."""
    found = {one.rollout_id: one.reward for one in against_group(grouped([0.9], [1.0, 0.0]))}
    assert found == {"r0": 0.0, "r1": 1.0, "r2": -1.0}


def test_nothing_but_the_reward_is_touched_and_the_order_is_kept():
    samples = grouped([1.0, 0.0], [0.5, 0.25, 0.0])
    centred = against_group(samples)
    assert [replace(one, reward=0.0) for one in centred] == [replace(one, reward=0.0) for one in samples]
    assert sum(one.reward for one in centred) == pytest.approx(0.0)


# --- advantages -----------------------------------------------------------------------------------


def microbatch(samples: list[TrainingSample], value: float = 0.0, beyond: float = 0.0) -> Microbatch:
    inputs = collate(samples)
    zeros = torch.zeros(inputs.token_ids_BT.shape)
    return Microbatch(
        inputs=inputs,
        old_logprobs=zeros.clone(),
        ref_logprobs=zeros - 0.1,
        values=zeros + value,
        final_values=torch.full((len(samples),), beyond),
    )


def test_group_advantages_are_spread_as_they_are():
    batch = microbatch([sample("a", 0, -1.0), sample("b", 0, 1.0, length=3)])
    metrics = fill_advantages([batch], RECIPES["rloo"], kl_coef=9.0, gamma=1.0, lam=1.0)
    assert batch.advantages.tolist() == [[0.0, -1.0, -1.0, -1.0], [0.0, 1.0, 1.0, 0.0]]
    assert metrics.keys() == {"advantage_std"}


@pytest.mark.parametrize(("kl_in", "last"), [("reward", 1.0 - 0.5 * 0.1), ("loss", 1.0)])
def test_the_kl_is_in_the_reward_or_it_is_not(kl_in: str, last: float):
    """k1 is 0.1 nats on each token, kl_coef 0.5; at lambda 0 and gamma 0 a token's return is its own reward."""
    batch = microbatch([sample("a", 0, 1.0)])
    recipe = Recipe(kl_in=kl_in, group_baseline=False)  # pyright: ignore[reportArgumentType]
    fill_advantages([batch], recipe, kl_coef=0.5, gamma=0.0, lam=0.0)
    assert batch.returns[0, -1].item() == pytest.approx(last)
    assert batch.returns[0, 1].item() == pytest.approx(last - 1.0)


@pytest.mark.parametrize(
    ("bootstrap", "truncated", "expected"), [(True, True, 3.0), (True, False, 1.0), (False, True, 1.0)]
)
def test_only_truncated_rollouts_are_bootstrapped_and_only_when_asked(
    bootstrap: bool, truncated: bool, expected: float
):
    """Reward 1 and a critic that says 2 of what lies beyond: the return is 3, or 1 where the rollout is over."""
    batch = microbatch([sample("a", 0, 1.0, truncated=truncated)], value=0.5, beyond=2.0)
    recipe = Recipe(bootstrap_truncated=bootstrap, kl_in="loss")
    fill_advantages([batch], recipe, kl_coef=0.0, gamma=1.0, lam=1.0)
    assert batch.returns[0, 1:].tolist() == pytest.approx([expected] * 3)


def test_a_nan_beyond_a_rollout_that_is_over_does_not_leak():
    batch = microbatch([sample("a", 0, 1.0)], beyond=float("nan"))
    fill_advantages([batch], Recipe(bootstrap_truncated=True), kl_coef=0.0, gamma=1.0, lam=1.0)
    assert bool(batch.advantages.isfinite().all())


def test_whitening_and_explained_variance_are_of_all_microbatches_together():
    parts = [microbatch([one], value=0.5) for one in PAIR]
    whole = microbatch(PAIR, value=0.5)
    found = fill_advantages(parts, Recipe(), kl_coef=0.1, gamma=1.0, lam=0.9)
    assert found == pytest.approx(fill_advantages([whole], Recipe(), kl_coef=0.1, gamma=1.0, lam=0.9))
    torch.testing.assert_close(torch.cat([part.advantages for part in parts]), whole.advantages)
    alone = fill_advantages([parts[0]], Recipe(), kl_coef=0.1, gamma=1.0, lam=0.9)
    assert alone["advantage_std"] != pytest.approx(found["advantage_std"]), "negative control"
