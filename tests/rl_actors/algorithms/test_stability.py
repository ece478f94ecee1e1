"""Tripwires: each one fires beyond its limit, not at it, and the decision carries its evidence."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_actors.algorithms.stability import (
    Continue,
    RestoreLastGood,
    SkipUpdate,
    StabilityDecision,
    StabilityLimits,
    StopTraining,
    StopUpdate,
    Trip,
    check_stability,
    escalate,
    reward_outcome_divergence,
)

LIMITS = StabilityLimits(
    max_grad_norm=10.0,
    max_mismatch_mean=0.05,
    max_mismatch_max=3.0,
    max_kl=0.02,
    max_ratio=5.0,
    max_clip_fraction=0.3,
    min_entropy=0.1,
    min_explained_variance=-1.0,
    max_reward_outcome_divergence=0.8,
    restore_learning_rate_factor=0.25,
)
HEALTHY = {
    "grad_norm": 1.0,
    "mismatch_abs_mean": 0.01,
    "mismatch_abs_max": 1.0,
    "approx_kl": 0.01,
    "ratio_max": 1.5,
    "clip_fraction": 0.1,
    "entropy": 0.7,
    "explained_variance": 0.5,
    "reward_outcome_divergence": 0.1,
}
WIRES = [
    ("grad_norm", "grad_norm", 10.0, 1, SkipUpdate),
    ("mismatch_mean", "mismatch_abs_mean", 0.05, 1, SkipUpdate),
    ("mismatch_max", "mismatch_abs_max", 3.0, 1, SkipUpdate),
    ("explained_variance", "explained_variance", -1.0, -1, SkipUpdate),
    ("target_kl", "approx_kl", 0.02, 1, StopUpdate),
    ("ratio", "ratio_max", 5.0, 1, StopUpdate),
    ("clip_fraction", "clip_fraction", 0.3, 1, StopUpdate),
    ("entropy_collapse", "entropy", 0.1, -1, RestoreLastGood),
    ("reward_outcome_divergence", "reward_outcome_divergence", 0.8, 1, StopTraining),
]


def trips_of(decision: StabilityDecision) -> tuple[Trip, ...]:
    assert not isinstance(decision, Continue)
    return decision.trips


def test_healthy_metrics_continue() -> None:
    assert check_stability(HEALTHY, LIMITS) == Continue(unchecked=())


@pytest.mark.parametrize(("reason", "metric", "limit", "sign", "decision_type"), WIRES)
def test_each_tripwire_fires_beyond_its_limit_only(
    reason: str, metric: str, limit: float, sign: int, decision_type: type
) -> None:
    assert check_stability(HEALTHY | {metric: limit}, LIMITS) == Continue()
    beyond = limit + sign * 0.001
    decision = check_stability(HEALTHY | {metric: beyond}, LIMITS)
    assert type(decision) is decision_type
    (trip,) = trips_of(decision)
    assert (trip.reason_code, trip.metric, trip.value, trip.limit) == (reason, metric, beyond, limit)
    assert str(decision).startswith(f"{reason}: {metric} = ")  # pyright: ignore[reportUnknownArgumentType]


@pytest.mark.parametrize(("reason", "metric", "limit", "sign", "decision_type"), WIRES)
def test_control_a_limit_of_none_is_off(reason: str, metric: str, limit: float, sign: int, decision_type: type) -> None:
    off = {item.name: None for item in fields(StabilityLimits) if item.name.startswith(("max_", "min_"))}
    counts = {"max_consecutive_skips": 3, "max_restores": 2}
    decision = check_stability({metric: limit + sign * 1e6}, replace(LIMITS, **(off | counts)))
    assert decision == Continue(), (reason, decision_type)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("metric", ["loss", "grad_norm", "entropy", "anything"])
def test_any_non_finite_metric_stops_the_step(value: float, metric: str) -> None:
    decision = check_stability(HEALTHY | {metric: value}, LIMITS)
    assert not isinstance(decision, Continue)
    assert "non_finite" in {trip.reason_code for trip in decision.trips}


def test_a_nan_alone_skips() -> None:
    decision = check_stability(HEALTHY | {"loss": math.nan}, LIMITS)
    assert isinstance(decision, SkipUpdate)
    assert decision.reason_code == "non_finite"


def test_a_missing_metric_is_named_not_passed() -> None:
    partial = {name: value for name, value in HEALTHY.items() if name not in ("entropy", "grad_norm")}
    decision = check_stability(partial, LIMITS)
    assert isinstance(decision, Continue)
    assert set(decision.unchecked) == {"entropy_collapse", "grad_norm"}


def test_the_strongest_action_wins_and_keeps_all_evidence() -> None:
    decision = check_stability(HEALTHY | {"grad_norm": 99.0, "approx_kl": 9.0, "entropy": 0.0}, LIMITS)
    assert isinstance(decision, RestoreLastGood)
    assert decision.reason_code == "entropy_collapse"
    assert decision.learning_rate_factor == 0.25
    assert [trip.reason_code for trip in decision.trips] == ["entropy_collapse", "target_kl", "grad_norm"]


@given(st.dictionaries(st.sampled_from(sorted(HEALTHY)), st.floats(), max_size=9))
def test_decision_is_continue_exactly_when_nothing_is_crossed(metrics: dict[str, float]) -> None:
    is_crossed = any(not math.isfinite(value) for value in metrics.values()) or any(
        sign * (metrics[metric] - limit) > 0 for _, metric, limit, sign, _ in WIRES if metric in metrics
    )
    assert isinstance(check_stability(metrics, LIMITS), Continue) == (not is_crossed)


@given(st.floats(0, 100), st.floats(0, 100))
def test_a_worse_metric_never_gets_a_milder_decision(first: float, second: float) -> None:
    better, worse = sorted([first, second])
    is_stopped = [
        not isinstance(check_stability(HEALTHY | {"ratio_max": ratio}, LIMITS), Continue) for ratio in (better, worse)
    ]
    assert is_stopped[0] <= is_stopped[1]


SKIP = check_stability(HEALTHY | {"grad_norm": 99.0}, LIMITS)
RESTORE = check_stability(HEALTHY | {"entropy": 0.0}, LIMITS)


def test_a_streak_of_skips_becomes_a_restore() -> None:
    assert escalate(SKIP, LIMITS, consecutive_skips=3, restores=0) == SKIP
    decision = escalate(SKIP, LIMITS, consecutive_skips=4, restores=0)
    assert isinstance(decision, RestoreLastGood)
    assert [trip.reason_code for trip in decision.trips] == ["repeated_skips", "grad_norm"]


def test_repeated_restores_end_the_run() -> None:
    assert escalate(RESTORE, LIMITS, consecutive_skips=0, restores=2) == RESTORE
    decision = escalate(RESTORE, LIMITS, consecutive_skips=0, restores=3)
    assert isinstance(decision, StopTraining)
    assert decision.reason_code == "repeated_restores"
    assert "restores = 3, limit 2" in str(decision)


@pytest.mark.parametrize("metrics", [{}, {"ratio_max": 99.0}, {"reward_outcome_divergence": 5.0}])
def test_other_decisions_do_not_escalate(metrics: dict[str, float]) -> None:
    decision = check_stability(HEALTHY | metrics, LIMITS)
    assert escalate(decision, LIMITS, consecutive_skips=99, restores=99) == decision


def test_divergence_of_a_hacked_reward_is_large() -> None:
    rewards_before, rewards_now = [0.1, 0.2, 0.3, 0.2], [0.9, 1.0, 0.8, 0.9]
    outcomes_before, outcomes_now = [1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]
    divergence = reward_outcome_divergence(rewards_before, outcomes_before, rewards_now, outcomes_now)
    assert 2.0 < divergence <= 4.0
    assert isinstance(check_stability(HEALTHY | {"reward_outcome_divergence": divergence}, LIMITS), StopTraining)


def test_divergence_by_hand() -> None:
    # Reward 0,0 -> 1,1 has deviation 0.5, so gain 2; outcome 0,1 -> 0,1 has gain 0.
    assert reward_outcome_divergence([0.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 1.0]) == pytest.approx(2.0)


def test_control_an_honest_reward_does_not_diverge() -> None:
    before, now = [0.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]
    honest = [2.0 * outcome - 0.3 for outcome in before], [2.0 * outcome - 0.3 for outcome in now]
    assert reward_outcome_divergence(honest[0], before, honest[1], now) == pytest.approx(0.0, abs=1e-12)


def test_divergence_without_data_or_variation_is_zero() -> None:
    assert reward_outcome_divergence([], [], [1.0], [1.0]) == 0.0
    assert reward_outcome_divergence([1.0], [1.0], [], []) == 0.0
    assert reward_outcome_divergence([0.5, 0.5], [1.0, 1.0], [0.5, 0.5], [1.0, 1.0]) == 0.0
