"""Rewards as the recipe wants them, and advantages on every microbatch: numbers by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rl_actors.algorithms.batching import collate
from rl_actors.contracts.recipe import RECIPES, Recipe
from rl_actors.contracts.rollouts import TrainingSample
from rl_actors.learner.batch import Microbatch
from rl_actors.learner.targets import fill_advantages, kept_fraction, shaped


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
    assert rewards(shaped(PAIR, RECIPES[name])) == pytest.approx(expected, abs=1e-5)


def test_gae_without_a_group_baseline_keeps_rewards():
    assert rewards(shaped(PAIR, Recipe(group_baseline=False))) == [0.0, 1.0, 5.0, 5.0]


def test_groups_without_signal_are_left_out_unless_nothing_else_is_left():
    """The verified outcome decides: the last two scored differently, both failed, and that is noise of a model."""
    recipe = replace(RECIPES["rloo"], drop_flat_groups=True)
    a, b, c, d = PAIR
    made = [a, replace(b, succeeded=True), replace(c, reward=0.11), replace(d, reward=0.13)]
    assert [one.rollout_id for one in shaped(made, recipe)] == ["a", "b"]
    assert kept_fraction(shaped(made, recipe), made) == 0.5
    assert [one.rollout_id for one in shaped(made[2:], recipe)] == ["c", "d"]
    assert len(shaped(made, RECIPES["rloo"])) == 4, "negative control: off by default"


def test_the_overlong_penalty_enters_before_attempts_are_compared():
    """Sampled lengths 3 and 7 at a ramp of 4 tokens to 8: penalties 0 and -0.75."""
    two = [sample("short", 0, 1.0), sample("long", 0, 1.0, length=8)]
    recipe = replace(RECIPES["rloo"], overlong_max=8, overlong_buffer=4)
    assert rewards(shaped(two, recipe)) == pytest.approx([0.75, -0.75])
    assert rewards(shaped(two, RECIPES["rloo"])) == [0.0, 0.0]


def test_truncated_rollouts_train_nothing_but_still_are_a_baseline():
    two = [sample("whole", 0, 1.0), sample("cut", 0, 0.0, truncated=True)]
    found = shaped(two, replace(RECIPES["rloo"], mask_truncated=True))
    assert [sum(one.loss_mask) for one in found] == [3, 0]
    assert found[0].reward == 1.0
    assert [sum(one.loss_mask) for one in shaped(two, RECIPES["rloo"])] == [3, 3]


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
