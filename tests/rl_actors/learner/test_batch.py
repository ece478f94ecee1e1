"""Random minibatches of equal size, microbatches within a budget."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_actors.algorithms.batching import plan_microbatches
from rl_actors.contracts.rollouts import TrainingSample
from rl_actors.learner.batch import MAX_WASTE_FRACTION, Minibatch, minibatches
from rl_actors.learner.objective import global_counts


def sample(number: int, length: int, reward: float) -> TrainingSample:
    """Ids that name the sample; everything after the first two tokens was sampled."""
    return TrainingSample(
        rollout_id=f"r{number}", group_id=number, weights_versions=(0,), token_ids=(number,) * length,
        loss_mask=(False, False, *(True,) * (length - 2)), rollout_logprobs=(0.0,) * length, reward=reward,
        truncated=False,
    )  # fmt: skip


def deal(samples: list[TrainingSample], count: int, budget: int = 10_000, seed: int = 0) -> list[Minibatch]:
    return minibatches(samples, count=count, token_budget=budget, rng=random.Random(seed), device="cpu")


def numbers(part: Minibatch) -> list[int]:
    """Which samples a minibatch holds: their first token is their number."""
    return sorted(int(number) for micro in part for number in micro.inputs.token_ids_BT[:, 0])


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(6, 40), min_size=1, max_size=20),
    count=st.integers(1, 6),
    budget=st.integers(1, 200),
)
def test_every_sample_is_dealt_once_within_the_budget(lengths: list[int], count: int, budget: int):
    parts = deal([sample(number, length, 0.0) for number, length in enumerate(lengths)], count, budget)
    assert sorted(number for part in parts for number in numbers(part)) == list(range(len(lengths)))
    sizes = [len(numbers(part)) for part in parts]
    assert len(parts) == min(count, len(lengths))
    assert max(sizes) - min(sizes) <= 1
    for micro in (micro for part in parts for micro in part):
        rows, width = micro.inputs.token_ids_BT.shape
        assert rows * width <= budget or rows == 1 or width <= max(lengths)
        assert rows * width <= max(budget, max(lengths))


def test_the_order_in_which_samples_arrive_does_not_matter_and_the_seed_does():
    samples = [sample(number, 6 + number % 3, 0.0) for number in range(12)]
    assert [numbers(p) for p in deal(samples, 3)] == [numbers(p) for p in deal(samples[::-1], 3)]
    assert [numbers(p) for p in deal(samples, 3)] != [numbers(p) for p in deal(samples, 3, seed=1)]


def test_length_does_not_decide_who_trains_together():
    """Long tickets are of other kinds than short ones: a step must see both."""
    samples = [sample(number, 6 if number < 20 else 60, 0.0) for number in range(40)]
    for part in deal(samples, 4):
        assert 1 <= sum(number < 20 for number in numbers(part)) <= 9


def test_padding_stays_within_its_bound():
    samples = [sample(number, 6 + 5 * number, 0.0) for number in range(30)]
    (part,) = deal(samples, 1)
    real = sum(int(micro.inputs.attention_mask_BT.sum()) for micro in part)
    padded = sum(micro.inputs.token_ids_BT.numel() for micro in part)
    assert real == sum(len(one.token_ids) for one in samples)
    assert real / padded > 0.75


def test_loss_tokens_are_counted_over_the_whole_minibatch():
    samples = [sample(number, 10, 0.0) for number in range(5)]
    (part,) = deal(samples, 1, budget=20)
    assert len(part) > 1
    assert global_counts(part).num_loss_tokens == 5 * 8


# Quantiles 0, 10 ... 100 % of 364 live rollouts of the packaged workflow, in tokens.
LENGTHS = (152, 182, 190, 226, 233, 236, 238, 240, 242, 247, 314)


def workflow_lengths(rng: random.Random, count: int) -> list[int]:
    """Draw lengths as the workflow's are distributed, straight between the quantiles."""
    places = [rng.random() * (len(LENGTHS) - 1) for _ in range(count)]
    return [round(LENGTHS[int(x)] + (x % 1) * (LENGTHS[int(x) + 1] - LENGTHS[int(x)])) for x in places]


@pytest.mark.parametrize("seed", range(5))
def test_padding_wastes_at_most_a_tenth_of_the_workflows_minibatches(seed: int):
    lengths = workflow_lengths(random.Random(seed), 48)
    kept = plan_microbatches(lengths, token_budget=2048, max_waste_fraction=MAX_WASTE_FRACTION)
    padded = sum(len(group) * max(lengths[index] for index in group) for group in kept)
    assert 1 - sum(lengths) / padded <= 0.1
    one_batch = 1 - sum(lengths) / (len(lengths) * max(lengths))
    assert one_batch > 0.1, "negative control: padded to the longest, these lengths waste more"
