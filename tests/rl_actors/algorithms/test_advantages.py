"""Advantages: a tool token is not a step, a group is whole, whitening is global."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rl_actors.algorithms.advantages import (
    explained_variance,
    gae_advantages,
    group_advantages,
    groups_with_signal,
    masked_moments,
    overlong_penalty,
    spread_over_tokens,
    token_rewards,
    whiten,
)
from rl_actors.contracts.errors import BadInputError

torch.set_num_threads(1)
quick = settings(deadline=None, max_examples=30)
LAMBDAS = [0.0, 0.5, 0.95, 1.0]
JUNK = [0.0, 1e6, -1e6, math.nan, math.inf]


def gae_of_one(
    rewards: list[float], values: list[float], gamma: float, lam: float, bootstrap: float = 0.0
) -> list[float]:
    """GAE of one rollout without tool tokens, as the double sum of arXiv 1506.02438 eq. 16."""
    following = [*values[1:], bootstrap]
    deltas = [reward + gamma * after - value for reward, value, after in zip(rewards, values, following, strict=True)]
    return [
        sum((gamma * lam) ** step * delta for step, delta in enumerate(deltas[start:])) for start in range(len(deltas))
    ]


def gae_decaying_over_tools(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> Tensor:
    """The common mistake: every token is a step, the mask is applied afterwards."""
    advantages, carried, after = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(values.shape[1])):
        carried = rewards[:, t] + gamma * after - values[:, t] + gamma * lam * carried
        after = values[:, t]
        advantages[:, t] = carried
    return advantages * mask


def with_tool_tokens(row: Tensor, gaps: list[int], junk: float) -> Tensor:
    """Insert gaps[i] junk entries before entry i."""
    pieces = [torch.cat([row.new_full((gap,), junk), row[i : i + 1]]) for i, gap in enumerate(gaps)]
    return torch.cat(pieces).unsqueeze(0)


def random_row(seed: int, length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(length, generator=generator, dtype=torch.float64),
        torch.randn(length, generator=generator, dtype=torch.float64),
    )


@quick
@given(
    seed=st.integers(0, 10_000),
    length=st.integers(1, 7),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from(LAMBDAS),
    bootstrap=st.floats(-2, 2),
)
def test_gae_equals_the_double_sum(seed: int, length: int, gamma: float, lam: float, bootstrap: float) -> None:
    rewards, values = random_row(seed, length)
    expected = torch.tensor(gae_of_one(rewards.tolist(), values.tolist(), gamma, lam, bootstrap), dtype=torch.float64)
    advantages, returns = gae_advantages(
        rewards[None],
        values[None],
        torch.ones(1, length, dtype=torch.bool),
        gamma=gamma,
        lam=lam,
        bootstrap_B=torch.tensor([bootstrap], dtype=torch.float64),
    )
    torch.testing.assert_close(advantages[0], expected)
    torch.testing.assert_close(returns[0], expected + values)


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("junk", JUNK)
@quick
@given(seed=st.integers(0, 10_000), gaps=st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_inserted_tool_tokens_change_nothing(lam: float, junk: float, seed: int, gaps: list[int]) -> None:
    rewards, values = random_row(seed, len(gaps))
    plain, plain_returns = gae_advantages(
        rewards[None], values[None], torch.ones(1, len(gaps), dtype=torch.bool), gamma=0.9, lam=lam
    )
    mask = with_tool_tokens(torch.ones(len(gaps)), gaps, 0.0).bool()
    padded, padded_returns = gae_advantages(
        with_tool_tokens(rewards, gaps, junk), with_tool_tokens(values, gaps, junk), mask, gamma=0.9, lam=lam
    )
    torch.testing.assert_close(padded[mask], plain[0])
    torch.testing.assert_close(padded_returns[mask], plain_returns[0])
    assert bool((padded[~mask] == 0).all())
    assert bool((padded_returns[~mask] == 0).all())


@pytest.mark.parametrize("lam", LAMBDAS)
def test_control_decay_over_tool_tokens_is_seen(lam: float) -> None:
    rewards, values = random_row(3, 4)
    gaps = [0, 2, 0, 1]
    mask = with_tool_tokens(torch.ones(4), gaps, 0.0).bool()
    plain, _ = gae_advantages(rewards[None], values[None], torch.ones(1, 4, dtype=torch.bool), gamma=0.9, lam=lam)
    padded = gae_decaying_over_tools(
        with_tool_tokens(rewards, gaps, 0.0), with_tool_tokens(values, gaps, 5.0), mask, gamma=0.9, lam=lam
    )
    assert not torch.allclose(padded[mask], plain[0], atol=1e-3)


Estimator = Callable[..., Tensor]


def ours(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> Tensor:
    return gae_advantages(rewards, values, mask, gamma=gamma, lam=lam)[0]


def at_lambda(wrong: float) -> Estimator:
    """The right recursion at a lambda that nobody asked for."""

    def estimate(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> Tensor:
        return ours(rewards, values, mask, gamma=gamma, lam=wrong)

    return estimate


def temporal_differences(rewards: Tensor, values: Tensor, gamma: float) -> Tensor:
    return rewards + gamma * torch.cat([values[1:], values.new_zeros(1)]) - values


def monte_carlo_minus_value(rewards: Tensor, values: Tensor, gamma: float) -> Tensor:
    del gamma  # it is 1
    return torch.stack([rewards[t:].sum() for t in range(len(rewards))]) - values


LIMITS: dict[str, tuple[float, Callable[[Tensor, Tensor, float], Tensor]]] = {
    "td": (0.0, temporal_differences),
    "monte carlo": (1.0, monte_carlo_minus_value),
}


def limit_error(estimator: Estimator, limit: str, seed: int, gaps: list[int], junk: float, gamma: float) -> float:
    """Largest difference from the closed form of the sampled tokens alone, with gaps[i] tool tokens before token i."""
    lam, closed_form = LIMITS[limit]
    rewards, values = random_row(seed, len(gaps))
    mask = with_tool_tokens(torch.ones(len(gaps)), gaps, 0.0).bool()
    rows = (with_tool_tokens(x, gaps, junk) for x in (rewards, values))
    found = estimator(*rows, mask, gamma=gamma, lam=lam)
    assert not found[~mask].any()
    return float((found[mask] - closed_form(rewards, values, gamma)).abs().max())


@pytest.mark.parametrize("junk", JUNK)
@quick
@given(
    seed=st.integers(0, 10_000),
    gaps=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
)
def test_lambda_zero_is_temporal_difference(junk: float, seed: int, gaps: list[int], gamma: float) -> None:
    assert limit_error(ours, "td", seed, gaps, junk, gamma) < 1e-12


@pytest.mark.parametrize("junk", JUNK)
@quick
@given(seed=st.integers(0, 10_000), gaps=st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_gamma_and_lambda_one_is_monte_carlo_minus_value(junk: float, seed: int, gaps: list[int]) -> None:
    assert limit_error(ours, "monte carlo", seed, gaps, junk, 1.0) < 1e-12


some_gaps = st.lists(st.integers(1, 3), min_size=2, max_size=6)


@pytest.mark.parametrize(
    ("wrong", "limit", "gamma"),
    [
        (at_lambda(0.5), "td", 0.9),
        (at_lambda(1.0), "td", 1.0),
        (at_lambda(0.95), "monte carlo", 1.0),
        (at_lambda(0.0), "monte carlo", 1.0),
        (gae_decaying_over_tools, "td", 0.9),
        # With gamma = lambda = 1 the values of tool tokens telescope away: their rewards alone betray the recursion.
        (gae_decaying_over_tools, "monte carlo", 1.0),
    ],
)
@quick
@given(seed=st.integers(0, 10_000), gaps=some_gaps)
def test_control_a_wrong_lambda_and_steps_over_tools_fail_the_limits(
    wrong: Estimator, limit: str, gamma: float, seed: int, gaps: list[int]
) -> None:
    assert limit_error(wrong, limit, seed, gaps, 5.0, gamma) > 1e-9


def test_bootstrap_only_reaches_the_truncated_row() -> None:
    values, mask = torch.zeros(2, 3), torch.tensor([[True, True, False], [True, True, False]])
    advantages, _ = gae_advantages(
        torch.zeros(2, 3), values, mask, gamma=0.5, lam=1.0, bootstrap_B=torch.tensor([0.0, 8.0])
    )
    assert advantages.tolist() == [[0.0, 0.0, 0.0], [2.0, 4.0, 0.0]]


def test_gae_of_masked_nan_row_is_zero_and_has_no_gradient() -> None:
    values = torch.full((1, 3), math.nan, requires_grad=True)
    advantages, returns = gae_advantages(values, values, torch.zeros(1, 3, dtype=torch.bool), gamma=1.0, lam=0.9)
    assert advantages.tolist() == returns.tolist() == [[0.0, 0.0, 0.0]]
    assert not advantages.requires_grad


def test_gae_does_not_change_its_inputs_and_keeps_float32_for_bfloat16() -> None:
    values = torch.ones(1, 2, dtype=torch.bfloat16)
    rewards = values.clone()
    advantages, _ = gae_advantages(rewards, values, torch.ones(1, 2, dtype=torch.bool), gamma=1.0, lam=1.0)
    assert advantages.dtype == torch.float32
    assert values.tolist() == rewards.tolist() == [[1.0, 1.0]]


def test_reward_is_on_the_last_unmasked_token() -> None:
    mask = torch.tensor([[False, True, True, False], [True, False, False, False], [False, False, False, False]])
    kl = torch.tensor([[math.nan, 1.0, 2.0, math.nan], [0.5, 9.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]])
    rewards = token_rewards(torch.tensor([3.0, -50.0, 7.0]), kl, mask, kl_coef=0.1)
    expected = torch.tensor([[0.0, -0.1, 2.8, 0.0], [-10.05, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(rewards, expected)


@quick
@given(seed=st.integers(0, 10_000), score=st.floats(-5, 5))
def test_token_rewards_sum_to_score_minus_kl(seed: int, score: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(1, 6, generator=generator) < 0.5
    kl = torch.rand(1, 6, generator=generator)
    rewards = token_rewards(torch.tensor([score]), kl, mask, kl_coef=0.3)
    expected = score - 0.3 * float(kl[mask].sum()) if mask.any() else 0.0
    assert float(rewards.sum()) == pytest.approx(expected, abs=1e-5)
    assert bool((rewards[~mask] == 0).all())


def test_control_reward_on_the_last_position_would_be_lost() -> None:
    mask = torch.tensor([[True, True, False]])
    on_last_position = torch.tensor([[0.0, 0.0, 1.0]])
    right = token_rewards(torch.ones(1), torch.zeros(1, 3), mask, kl_coef=0.0)
    values = torch.zeros(1, 3)
    assert float(gae_advantages(right, values, mask, gamma=1.0, lam=1.0)[0].sum()) == 2.0
    assert float(gae_advantages(on_last_position, values, mask, gamma=1.0, lam=1.0)[0].sum()) == 0.0


def test_score_clip_can_be_turned_off() -> None:
    mask = torch.tensor([[True]])
    assert token_rewards(torch.tensor([99.0]), torch.zeros(1, 1), mask, kl_coef=0.0, score_clip=None).item() == 99.0


def test_group_advantages_by_hand() -> None:
    scores, groups = torch.tensor([1.0, 3.0, 5.0, 7.0]), torch.tensor([4, 4, 4, 9])
    assert group_advantages(scores, groups, kind="dr_grpo").tolist() == [-2.0, 0.0, 2.0, 0.0]
    assert group_advantages(scores, groups, kind="rloo").tolist() == [-3.0, 0.0, 3.0, 0.0]
    torch.testing.assert_close(
        group_advantages(scores, groups, kind="grpo"), torch.tensor([-1.0, 0.0, 1.0, 0.0]), atol=1e-5, rtol=0
    )


def signal_of_the_signalless(advantages: Callable[[Tensor, Tensor], Tensor], scores: list[float], dtype: Any) -> float:
    """Largest advantage of groups of one and of groups of equal scores, beside one group that has a signal."""
    sizes = [1 + index % 4 for index in range(len(scores))]
    flat = [score for score, size in zip(scores, sizes, strict=True) for _ in range(size)]
    ids = [index for index, size in enumerate(sizes) for _ in range(size)]
    scores_B = torch.tensor([1.0, *flat, 3.0], dtype=dtype)
    found = advantages(scores_B, torch.tensor([77, *ids, 77]))
    assert found[0] < 0 < found[-1]
    return float(found[1:-1].abs().max())


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
@quick
@given(
    scores=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_singleton_and_equal_groups_give_zero(kind: str, scores: list[float], dtype: Any) -> None:
    def advantages(scores_B: Tensor, groups_B: Tensor) -> Tensor:
        return group_advantages(scores_B, groups_B, kind=kind)  # pyright: ignore[reportArgumentType]

    assert signal_of_the_signalless(advantages, scores, dtype) < 1e-6


def by_group(scores_B: Tensor, groups_B: Tensor, scale: Callable[[Tensor], Tensor]) -> Tensor:
    """(score - mean) / scale(group), one group after the other."""
    found = torch.zeros_like(scores_B)
    for group in groups_B.unique():
        rows = groups_B == group
        found[rows] = (scores_B[rows] - scores_B[rows].mean()) / scale(scores_B[rows])
    return found


def over_the_sample_deviation(scores_B: Tensor, groups_B: Tensor) -> Tensor:
    """std with n - 1: of one score it is 0 / 0, and no epsilon repairs that."""
    return by_group(scores_B, groups_B, lambda group: torch.std(group, correction=1) + 1e-6)


def over_the_bare_deviation(scores_B: Tensor, groups_B: Tensor) -> Tensor:
    """std with n and no epsilon: 0 / 0 wherever all scores are equal."""
    return by_group(scores_B, groups_B, lambda group: torch.std(group, correction=0))


def against_the_others(scores_B: Tensor, groups_B: Tensor) -> Tensor:
    """Leave-one-out as a quotient: a singleton has no others."""
    found = by_group(scores_B, groups_B, torch.ones_like)
    counts = (groups_B[:, None] == groups_B).sum(1)
    return found * counts / (counts - 1)


@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.parametrize("wrong", [over_the_sample_deviation, over_the_bare_deviation, against_the_others])
@quick
@given(score=st.floats(-100, 100, width=16))
def test_control_a_singleton_without_the_guard_is_nan(wrong: Callable[[Tensor, Tensor], Tensor], score: float) -> None:
    assert math.isnan(signal_of_the_signalless(wrong, [score], torch.float64))


@quick
@given(score=st.floats(-100, 100, width=16))
def test_control_equal_scores_without_an_epsilon_are_nan(score: float) -> None:
    assert math.isnan(signal_of_the_signalless(over_the_bare_deviation, [score, score], torch.float64))


def test_control_float32_mean_of_equal_scores_is_not_zero_after_division() -> None:
    scores = torch.full((8,), 0.1)
    naive = (scores - scores.sum() / 8) / (scores.std() + 1e-10)
    assert float(naive.abs().max()) > 0.5
    assert group_advantages(scores, torch.zeros(8, dtype=torch.long), kind="grpo").abs().max() < 1e-9


@quick
@given(
    scores=st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=8),
    seed=st.integers(0, 1000),
    kind=st.sampled_from(["grpo", "dr_grpo", "rloo"]),
)
def test_group_advantages_centre_each_group_and_follow_the_order(scores: list[float], seed: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores_B = torch.tensor(scores, dtype=torch.float64)
    groups = torch.randint(0, 2, (len(scores),), generator=generator)
    advantages = group_advantages(scores_B, groups, kind=kind)  # pyright: ignore[reportArgumentType]
    for group in groups.unique():
        assert float(advantages[groups == group].sum()) == pytest.approx(0.0, abs=1e-9)
    shuffle = torch.randperm(len(scores), generator=generator)
    shuffled = group_advantages(scores_B[shuffle], groups[shuffle], kind=kind)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(shuffled, advantages[shuffle])


def test_rloo_is_score_minus_mean_of_the_others() -> None:
    scores, groups = torch.tensor([1.0, 2.0, 6.0, 4.0, 8.0]), torch.tensor([0, 0, 0, 1, 1])
    expected = [1 - 4.0, 2 - 3.5, 6 - 1.5, 4 - 8.0, 8 - 4.0]
    torch.testing.assert_close(group_advantages(scores, groups, kind="rloo"), torch.tensor(expected))


def test_unknown_group_kind_is_refused_with_the_alternatives() -> None:
    with pytest.raises(BadInputError, match="grpo, dr_grpo, rloo"):
        group_advantages(torch.ones(2), torch.zeros(2), kind="gae")  # pyright: ignore[reportArgumentType]


def test_nan_score_stays_in_its_group() -> None:
    advantages = group_advantages(torch.tensor([math.nan, 1.0, 2.0, 4.0]), torch.tensor([0, 0, 1, 1]), kind="dr_grpo")
    assert advantages.isnan().tolist() == [True, True, False, False]


def test_groups_with_signal() -> None:
    scores, groups = torch.tensor([0.1, 0.1, 0.0, 1.0, 5.0]), torch.tensor([7, 7, 3, 3, 1])
    assert groups_with_signal(scores, groups).tolist() == [False, False, True, True, False]


def test_spread_over_tokens_is_zero_where_masked() -> None:
    mask = torch.tensor([[True, False], [False, True]])
    assert spread_over_tokens(torch.tensor([2.0, 3.0]), mask).tolist() == [[2.0, 0.0], [0.0, 3.0]]


def test_overlong_penalty_by_hand() -> None:
    lengths = torch.tensor([10, 80, 90, 100, 500])
    torch.testing.assert_close(
        overlong_penalty(lengths, max_tokens=100, buffer_tokens=20), torch.tensor([0.0, 0.0, -0.5, -1.0, -1.0])
    )


def batch_to_whiten(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(6, 5, generator=generator) < 0.6
    mask[0, :2] = True
    x = torch.randn(6, 5, generator=generator, dtype=torch.float64) * 3 + 7
    return torch.where(mask, x, math.nan), mask


@quick
@given(seed=st.integers(0, 10_000))
def test_whitened_tokens_have_mean_zero_and_unit_variance(seed: int) -> None:
    x, mask = batch_to_whiten(seed)
    white = whiten(x, mask)
    assert float(white[mask].mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(white[mask].var()) == pytest.approx(1.0, abs=1e-6)
    assert bool((white[~mask] == 0).all())


@quick
@given(seed=st.integers(0, 10_000), cut=st.integers(1, 5))
def test_whitening_parts_with_summed_moments_equals_the_whole(seed: int, cut: int) -> None:
    x, mask = batch_to_whiten(seed)
    moments = masked_moments(x[:cut], mask[:cut]) + masked_moments(x[cut:], mask[cut:])
    parts = [whiten(x[rows], mask[rows], moments=moments) for rows in (slice(cut), slice(cut, None))]
    torch.testing.assert_close(torch.cat(parts), whiten(x, mask))


def test_control_whitening_each_part_by_itself_is_seen() -> None:
    x, mask = batch_to_whiten(1)
    parts = torch.cat([whiten(x[:2], mask[:2]), whiten(x[2:], mask[2:])])
    assert not torch.allclose(parts, whiten(x, mask), atol=1e-3)


def test_whiten_of_nothing_one_and_equal_tokens() -> None:
    nothing = torch.zeros(1, 2, dtype=torch.bool)
    assert whiten(torch.full((1, 2), math.nan), nothing).tolist() == [[0.0, 0.0]]
    one = torch.tensor([[True, False]])
    assert whiten(torch.tensor([[5.0, math.nan]]), one).tolist() == [[0.0, 0.0]]
    torch.testing.assert_close(whiten(torch.full((1, 3), 0.1), torch.ones(1, 3, dtype=torch.bool)), torch.zeros(1, 3))


def explained(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    return explained_variance(masked_moments(returns, mask), masked_moments(returns - values, mask))


def test_explained_variance_by_hand() -> None:
    returns, mask = torch.tensor([[1.0, 2.0, 6.0, math.nan]]), torch.tensor([[True, True, True, False]])
    assert explained(returns, returns, mask) == 1.0
    assert explained(torch.zeros(1, 4), returns, mask) == pytest.approx(0.0)
    assert explained(-returns, returns, mask) == pytest.approx(-3.0)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_returns_that_are_all_alike_have_nothing_to_explain(value: float) -> None:
    """On flat returns a moved critic must not look like minus a thousand million, nor a fresh one perfect."""
    flat, mask = torch.full((1, 7), value), torch.ones(1, 7, dtype=torch.bool)
    for values in (torch.randn(1, 7), torch.zeros(1, 7), flat):
        assert explained(values, flat, mask) == 0.0
    assert explained(torch.randn(1, 7), torch.randn(1, 7), torch.zeros_like(mask)) == 0.0


def test_explained_variance_adds_up_over_parts() -> None:
    values, returns, mask = torch.randn(4, 6), torch.randn(4, 6), torch.rand(4, 6) > 0.3
    parts = [(masked_moments(r, m), masked_moments(r - v, m)) for v, r, m in zip(values, returns, mask, strict=True)]
    summed = [torch.stack(column).sum(0) for column in zip(*parts, strict=True)]
    assert explained_variance(*summed) == pytest.approx(explained(values, returns, mask))
