"""Losses at hand-computed points."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rl_actors.algorithms.losses import aggregate, merge_metrics, policy_loss, value_loss
from rl_actors.contracts.errors import BadInputError

torch.set_num_threads(1)
CLIPS: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.3}


def single(ratio: float, advantage: float, **options: Any) -> tuple[float, float]:
    """Loss and d loss / d ratio of one token."""
    logprob = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    output = policy_loss(
        logprob, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.tensor([[True]]), **CLIPS, **options
    )
    (gradient,) = torch.autograd.grad(output.loss, logprob)
    return output.loss.item(), gradient.item() / ratio


# By hand: (ratio, advantage) -> (loss, d loss / d ratio) at clips 0.2 and 0.3, dual clip 3.
Points = dict[tuple[float, float], tuple[float, float]]
PPO_POINTS: Points = {
    (1.0, 2.0): (-2.0, -2.0),
    (1.25, 2.0): (-2.5, -2.0),
    (1.5, 2.0): (-2.6, 0.0),
    (0.5, 2.0): (-1.0, -2.0),
    (0.5, -2.0): (1.6, 0.0),
    (1.5, -2.0): (3.0, 2.0),
    (10.0, -2.0): (20.0, 2.0),
}
DUAL_CLIP_POINTS: Points = {
    (2.9, -2.0): (5.8, 2.0),
    (3.1, -2.0): (6.0, 0.0),
    (10.0, -2.0): (6.0, 0.0),
    (0.5, -2.0): (1.6, 0.0),
    (10.0, 2.0): (-2.6, 0.0),
    (0.1, 2.0): (-0.2, -2.0),
}


def missed(points: Points, found: Callable[[float, float], tuple[float, float]]) -> list[tuple[float, float]]:
    """The points at which a loss is not what the hand computed."""
    return [point for point, wanted in points.items() if found(*point) != pytest.approx(wanted)]


def unclipped(ratio: float, advantage: float) -> tuple[float, float]:
    return -ratio * advantage, -advantage


def dual_clipped(ratio: float, advantage: float) -> tuple[float, float]:
    return single(ratio, advantage, dual_clip=3.0)


def bounded_on_both_sides(ratio: float, advantage: float) -> tuple[float, float]:
    """A dual clip that forgets that it is for A < 0: |loss| <= c |A|."""
    loss, slope = single(ratio, advantage)
    is_bound = ratio > 3.0 or (advantage > 0 and ratio < 1 / 3.0)
    return (-3.0 * advantage if ratio > 3.0 else -advantage / 3.0, 0.0) if is_bound else (loss, slope)


def test_ppo_clip_by_hand() -> None:
    assert missed(PPO_POINTS, single) == []


def test_control_a_loss_without_clip_misses_the_clipped_points() -> None:
    assert missed(PPO_POINTS, unclipped) == [(1.5, 2.0), (0.5, -2.0)]


def test_dual_clip_by_hand() -> None:
    assert missed(DUAL_CLIP_POINTS, dual_clipped) == []


def test_control_plain_ppo_and_a_bound_on_both_sides_miss_the_dual_points() -> None:
    assert missed(DUAL_CLIP_POINTS, single) == [(3.1, -2.0), (10.0, -2.0)]
    assert missed(DUAL_CLIP_POINTS, bounded_on_both_sides) == [(10.0, 2.0), (0.1, 2.0)]


def by_cases(ratio: float, advantage: float, dual_clip: float) -> tuple[float, float]:
    """Loss and slope, case by case."""
    if advantage >= 0:
        return (-1.3 * advantage, 0.0) if ratio > 1.3 else (-ratio * advantage, -advantage)
    if ratio < 0.8:
        return -0.8 * advantage, 0.0
    return (-dual_clip * advantage, 0.0) if ratio > dual_clip else (-ratio * advantage, -advantage)


away_from_corners = st.floats(0.01, 50.0).filter(lambda ratio: min(abs(ratio - x) for x in (0.8, 1.3, 2.0, 5.0)) > 1e-6)


@settings(deadline=None, max_examples=60)
@given(
    ratio=away_from_corners,
    advantage=st.floats(-5, 5).filter(lambda x: x == 0 or abs(x) > 1e-3),
    dual_clip=st.sampled_from([2.0, 5.0]),
)
def test_dual_clip_is_its_cases_everywhere(ratio: float, advantage: float, dual_clip: float) -> None:
    wanted = by_cases(ratio, advantage, dual_clip)
    assert single(ratio, advantage, dual_clip=dual_clip) == pytest.approx(wanted, rel=1e-6)
    # Negative control: without the bound it is another loss exactly beyond it.
    is_beyond = advantage < 0 and ratio > dual_clip
    assert (single(ratio, advantage) != pytest.approx(wanted, rel=1e-6)) == is_beyond


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight"), [(1.0, 2.0, 1.0), (5.0, 2.0, 1.3), (5.0, -2.0, 1.3), (0.1, 2.0, 0.8)]
)
def test_cispo_keeps_the_gradient_of_clipped_tokens(ratio: float, advantage: float, weight: float) -> None:
    loss, slope = single(ratio, advantage, kind="cispo")
    assert loss == pytest.approx(-weight * advantage * math.log(ratio))
    assert slope * ratio == pytest.approx(-weight * advantage)


def test_gspo_by_hand() -> None:
    log_ratios = torch.tensor([[0.1, 0.3, 9.0], [0.5, -0.1, 0.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    advantages = torch.tensor([[2.0], [1.0]]).expand(2, 3)
    output = policy_loss(
        log_ratios, torch.zeros(2, 3), advantages, mask, kind="gspo", aggregation="sequence_mean", **CLIPS
    )
    first, second = math.exp(0.2), math.exp(0.4 / 3)
    assert output.loss.item() == pytest.approx(-(2 * first + second) / 2)
    (gradient,) = torch.autograd.grad(output.loss, log_ratios)
    # d s / d logp_t = s / |y| for a sequence: GSPO eq. 10, half of it from the mean over two sequences.
    expected = torch.tensor([[-first / 2, -first / 2, 0.0], [-second / 6] * 3], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected)


def test_gspo_clips_whole_sequences() -> None:
    log_ratios = torch.tensor([[2.0, -0.2]], dtype=torch.float64)
    output = policy_loss(log_ratios, torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2).bool(), kind="gspo", **CLIPS)
    assert output.metrics["clip_fraction"] == 1.0
    assert output.loss.item() == pytest.approx(-1.3)
    token = policy_loss(log_ratios, torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2).bool(), **CLIPS)
    assert token.metrics["clip_fraction"] == 0.5


def test_aggregations_by_hand() -> None:
    x = torch.tensor([[1.0, 3.0, 5.0], [8.0, 99.0, 99.0], [99.0, 99.0, 99.0]])
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    got = {
        kind: aggregate(x, mask, aggregation=kind).item() for kind in ("token_mean", "sequence_mean", "sequence_sum")
    }
    assert got == pytest.approx({"token_mean": 17 / 4, "sequence_mean": (3 + 8) / 2, "sequence_sum": (9 + 8) / 2})


def test_metrics_by_hand() -> None:
    log_ratio = torch.log(torch.tensor([[1.5, 0.5, 1.0]], dtype=torch.float64))
    mask = torch.ones(1, 3, dtype=torch.bool)
    metrics = policy_loss(log_ratio, torch.zeros(1, 3), torch.tensor([[1.0, 1.0, 1.0]]), mask, **CLIPS).metrics
    # The ratio 0.5 at A > 0 lies outside the range, but the pessimistic side is the plain one: not clipped.
    assert metrics["clip_fraction"] == pytest.approx(1 / 3)
    assert metrics["ratio_mean"] == pytest.approx(1.0)
    assert metrics["ratio_max"] == pytest.approx(1.5)
    assert metrics["approx_kl"] == pytest.approx((0.5 - math.log(1.5) - 0.5 - math.log(0.5)) / 3)


def test_extreme_ratio_stays_finite() -> None:
    mask, logprobs = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[0.0, -500.0]], requires_grad=True)
    output = policy_loss(logprobs, torch.tensor([[-500.0, 0.0]]), torch.tensor([[0.0, -1.0]]), mask, **CLIPS)
    output.loss.backward()
    assert output.loss.isfinite()
    assert logprobs.grad is not None
    assert bool(logprobs.grad.isfinite().all())


def test_only_the_policy_receives_a_gradient() -> None:
    leaves = [torch.zeros(1, 2, requires_grad=True) for _ in range(4)]
    logprobs, old, advantages, correction = leaves
    mask = torch.ones(1, 2, dtype=torch.bool)
    policy_loss(logprobs, old, advantages + 1, mask, correction_BT=correction + 1, **CLIPS).loss.backward()
    assert [leaf.grad is not None for leaf in leaves] == [True, False, False, False]


@pytest.mark.parametrize("clips", [(-0.1, 0.2), (0.2, -0.1), (math.nan, 0.2)])
def test_negative_clip_is_refused(clips: tuple[float, float]) -> None:
    x = torch.zeros(1, 1)
    with pytest.raises(BadInputError, match="clip_low"):
        policy_loss(x, x, x, x.bool(), clip_low=clips[0], clip_high=clips[1])


# By hand, at old value 1, target 3, clip 0.2: value -> (loss, d loss / d value).
VALUE_POINTS = {
    1.5: (0.5 * 1.8**2, 0.0),
    1.1: (0.5 * 1.9**2, -1.9),
    5.0: (0.5 * 2.0**2, 2.0),
    0.0: (0.5 * 3.0**2, -3.0),
    4.5: (0.5 * 1.8**2, 0.0),
}
Critic = Callable[[Tensor, Tensor, Tensor], Tensor]


def clipped_critic(values: Tensor, old: Tensor, target: Tensor) -> Tensor:
    return value_loss(values, old, target, torch.tensor([[True]]), clip=0.2).loss


def unclipped_critic(values: Tensor, old: Tensor, target: Tensor) -> Tensor:
    return value_loss(values, old, target, torch.tensor([[True]]), clip=None).loss


def optimistic_critic(values: Tensor, old: Tensor, target: Tensor) -> Tensor:
    """The smaller of both errors in place of the larger."""
    clipped = old + (values - old).clamp(-0.2, 0.2)
    return 0.5 * torch.minimum((values - target) ** 2, (clipped - target) ** 2).sum()


def merely_clipped_critic(values: Tensor, old: Tensor, target: Tensor) -> Tensor:
    """The clipped error alone: a critic that left the region never comes back."""
    return 0.5 * ((old + (values - old).clamp(-0.2, 0.2) - target) ** 2).sum()


def missed_values(critic: Critic) -> list[float]:
    """The values at which a critic's loss or slope is not what the hand computed."""
    found = {}
    for value in VALUE_POINTS:
        values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
        loss = critic(values, torch.tensor([[1.0]]).double(), torch.tensor([[3.0]]).double())
        found[value] = (loss.item(), torch.autograd.grad(loss, values)[0].item())
    return [value for value, wanted in VALUE_POINTS.items() if found[value] != pytest.approx(wanted)]


def test_value_clip_by_hand() -> None:
    assert missed_values(clipped_critic) == []


@pytest.mark.parametrize(
    ("critic", "missing"),
    [
        (unclipped_critic, [1.5, 4.5]),
        (optimistic_critic, [1.5, 5.0, 0.0, 4.5]),
        (merely_clipped_critic, [5.0, 0.0]),
    ],
)
def test_control_other_critics_miss_the_value_points(critic: Critic, missing: list[float]) -> None:
    assert missed_values(critic) == missing


@pytest.mark.parametrize("value", VALUE_POINTS)
def test_value_clip_fraction_counts_the_tokens_that_do_not_train(value: float) -> None:
    values, old, target = (torch.tensor([[x]]) for x in (value, 1.0, 3.0))
    metrics = value_loss(values, old, target, torch.tensor([[True]]), clip=0.2).metrics
    assert metrics["value_clip_fraction"] == float(VALUE_POINTS[value][1] == 0.0)


def test_value_loss_without_clip_is_half_squared_error() -> None:
    values, returns = torch.tensor([[9.0, math.nan]]), torch.tensor([[3.0, 1.0]])
    output = value_loss(values, torch.zeros(1, 2), returns, torch.tensor([[True, False]]), clip=None)
    assert output.loss.item() == 18.0
    assert dict(output.metrics) == {"value_clip_fraction": 0.0, "value_mean": 9.0, "return_mean": 3.0}


def test_value_clip_must_be_positive() -> None:
    x = torch.zeros(1, 1)
    with pytest.raises(BadInputError, match="null for no clipping"):
        value_loss(x, x, x, x.bool(), clip=0.0)


def test_merge_metrics_adds_takes_the_maximum_and_keeps_nan() -> None:
    parts = [{"ratio_max": math.nan, "kl": 0.1}, {"ratio_max": 3.0, "kl": 0.2, "only_here": 1.0}]
    merged = merge_metrics(parts)
    assert math.isnan(merged["ratio_max"])
    assert math.isnan(merge_metrics(parts[::-1])["ratio_max"])
    assert merged["kl"] == pytest.approx(0.3)
    assert merged["only_here"] == 1.0
    assert merge_metrics([]) == {}
