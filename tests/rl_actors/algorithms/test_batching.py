"""Batching: alignment, and token budgets."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_actors.algorithms.batching import collate, filler_batch, plan_microbatches
from rl_actors.algorithms.losses import policy_loss
from rl_actors.contracts.errors import BadDataError, BadInputError
from rl_actors.contracts.rollouts import Routes, TrainingSample
from rl_actors.models.scoring_head import token_logprobs_and_entropy

torch.set_num_threads(1)
quick = settings(deadline=None, max_examples=40)


def sample(length: int, *, prompt: int = 1, name: str = "r", **changes: object) -> TrainingSample:
    """A sample whose token i has id 10 + i and rollout logprob -i."""
    fields: dict[str, object] = {
        "rollout_id": name,
        "group_id": 4,
        "weights_versions": (0,),
        "token_ids": tuple(range(10, 10 + length)),
        "loss_mask": tuple(i >= prompt for i in range(length)),
        "rollout_logprobs": tuple(-float(i) for i in range(length)),
        "reward": 0.5,
        "truncated": False,
    }
    return TrainingSample(**(fields | changes))  # pyright: ignore[reportArgumentType]


def test_collate_by_hand() -> None:
    batch = collate([sample(3), sample(2, reward=1.5, truncated=True, group_id=9)])
    assert batch.token_ids_BT.tolist() == [[10, 11, 12], [10, 11, 0]]
    assert batch.attention_mask_BT.tolist() == [[True, True, True], [True, True, False]]
    assert batch.loss_mask_BT.tolist() == [[False, True, True], [False, True, False]]
    assert batch.rollout_logprobs_BT.tolist() == [[0.0, -1.0, -2.0], [0.0, -1.0, 0.0]]
    assert batch.rewards_B.tolist() == [0.5, 1.5]
    assert batch.group_ids_B.tolist() == [4, 9]
    assert batch.truncated_B.tolist() == [False, True]


def test_an_engines_routes_lie_by_layer_and_token_and_the_rest_is_open() -> None:
    routes = Routes(num_layers=2, top_k=1, experts=(1, 5, 2, 6))
    batch = collate([sample(3, routes=routes), sample(2)])
    assert batch.routes_LBTK[:, :, :, 0].tolist() == [[[1, 2, -1], [-1, -1, -1]], [[5, 6, -1], [-1, -1, -1]]]
    assert collate([sample(3)]).routes_LBTK.shape == (0, 1, 3, 0)
    assert filler_batch().routes_LBTK.numel() == 0


def test_collate_drops_junk_logprobs_of_unsampled_tokens() -> None:
    batch = collate([sample(3, prompt=2, rollout_logprobs=(math.nan, math.nan, -1.0))])
    assert batch.rollout_logprobs_BT.tolist() == [[0.0, 0.0, -1.0]]


def test_collate_copies_to_a_device() -> None:
    batch = collate([sample(2)]).to("meta")
    assert {str(batch.token_ids_BT.device), str(batch.rewards_B.device)} == {"meta"}


def test_a_loss_token_at_position_zero_is_refused() -> None:
    with pytest.raises(BadDataError, match="start with a prompt"):
        collate([sample(3), sample(3, prompt=0, name="bad")])


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(BadDataError, match="filler_batch"):
        collate([])


def test_a_filler_trains_nothing() -> None:
    batch = filler_batch()
    logits = torch.randn(1, 2, 5, requires_grad=True)
    logprobs, _ = token_logprobs_and_entropy(logits, batch.token_ids_BT, 1.0)
    output = policy_loss(
        logprobs, logprobs, torch.ones(1, 2), batch.loss_mask_BT, clip_low=0.2, clip_high=0.2, num_loss_tokens=9
    )
    output.loss.backward()
    assert not batch.loss_mask_BT.any()
    assert batch.attention_mask_BT.all()
    assert output.loss.item() == 0.0
    assert logits.grad is not None
    assert bool((logits.grad == 0).all())


def workflow_lengths(seed: int, count: int) -> list[int]:
    """Long-tailed lengths like those of a tool-using workflow: prompt 60, about 200 tokens, some of 1,000."""
    tail = torch.randn(count, generator=torch.Generator().manual_seed(seed)).mul(0.6).exp()
    return [60 + int(140 * value) for value in tail.tolist()]


def waste_fraction(groups: list[list[int]], lengths: list[int]) -> float:
    """Share of computed positions that are padding."""
    padded = sum(len(group) * max(lengths[index] for index in group) for group in groups)
    return 1 - sum(lengths) / padded if padded else 0.0


@quick
@given(
    lengths=st.lists(st.integers(1, 100), max_size=40),
    budget=st.integers(100, 400),
    waste=st.sampled_from([0.0, 0.1, 0.5]),
)
def test_a_plan_covers_every_sample_once_within_budget_and_waste(lengths: list[int], budget: int, waste: float) -> None:
    plan = plan_microbatches(lengths, token_budget=budget, max_waste_fraction=waste)
    assert sorted(index for group in plan for index in group) == list(range(len(lengths)))
    assert all(len(group) * max(lengths[index] for index in group) <= budget for group in plan)
    assert waste_fraction(plan, lengths) <= waste + 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_padding_waste_on_workflow_lengths_is_within_a_tenth(seed: int) -> None:
    lengths = workflow_lengths(seed, 192)
    plan = plan_microbatches(lengths, token_budget=8192)
    assert waste_fraction(plan, lengths) <= 0.10
    # The bound must not be bought with tiny microbatches.
    assert len(plan) <= 2.5 * math.ceil(sum(lengths) / 8192)


def test_control_unsorted_microbatches_waste_more() -> None:
    lengths = workflow_lengths(0, 192)
    assert waste_fraction([list(range(start, start + 8)) for start in range(0, 192, 8)], lengths) > 0.3


def test_a_microbatch_is_as_wide_as_its_first_sample_and_ties_keep_their_order() -> None:
    assert plan_microbatches([3, 5, 5], token_budget=14, max_waste_fraction=0.5) == [[1, 2], [0]]


def test_plan_of_nothing_is_empty() -> None:
    assert plan_microbatches([], token_budget=8) == []


def test_a_sample_over_the_budget_is_refused_with_its_length() -> None:
    with pytest.raises(BadInputError, match="longest sample, 9 tokens"):
        plan_microbatches([3, 9], token_budget=8)
