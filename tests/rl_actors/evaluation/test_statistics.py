"""Intervals and paired tests against hand-computed values, scipy and their own guarantee of coverage."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from rl_actors.contracts.errors import BadDataError
from rl_actors.evaluation.statistics import mcnemar_p_value, wilson_interval


@given(st.integers(1, 500), st.data(), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_equals_scipy(n: int, data: st.DataObject, confidence: float) -> None:
    successes = data.draw(st.integers(0, n))
    interval = wilson_interval(successes, n, confidence=confidence)
    expected = binomtest(successes, n).proportion_ci(confidence_level=confidence, method="wilson")
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert interval.mean == successes / n
    assert 0.0 <= interval.low <= interval.mean <= interval.high <= 1.0


def test_wilson_at_the_ends_is_not_certain() -> None:
    assert wilson_interval(0, 10).low == 0.0
    assert wilson_interval(0, 10).high == pytest.approx(0.2775, abs=1e-4)
    assert wilson_interval(10, 10).low == pytest.approx(0.7225, abs=1e-4)
    assert wilson_interval(10, 10).high == 1.0


def coverage_of_intervals(intervals: list[tuple[float, float]], rate: float) -> float:
    """Exact probability that the interval of k ~ Binomial(n, rate) holds the rate."""
    n = len(intervals) - 1
    return sum(float(binom.pmf(k, n, rate)) for k, (low, high) in enumerate(intervals) if low <= rate <= high)


def test_wilson_covers_near_zero_where_the_normal_interval_does_not() -> None:
    n, rate = 30, 0.03
    wilson = [(interval.low, interval.high) for interval in (wilson_interval(k, n) for k in range(n + 1))]
    assert coverage_of_intervals(wilson, rate) > 0.9
    # Negative control: the textbook normal interval.
    half = [1.96 * math.sqrt(k / n * (1 - k / n) / n) for k in range(n + 1)]
    normal = [(k / n - half[k], k / n + half[k]) for k in range(n + 1)]
    assert coverage_of_intervals(normal, rate) < 0.7


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(successes: int, n: int) -> None:
    with pytest.raises(BadDataError, match="one trial or more"):
        wilson_interval(successes, n)


def test_mcnemar_by_hand() -> None:
    assert mcnemar_p_value(5, 1) == pytest.approx(7 / 64)
    assert mcnemar_p_value(1, 5) == pytest.approx(63 / 64)


@given(st.integers(0, 30), st.integers(0, 30))
def test_mcnemar_equals_the_binomial_test(num_for: int, num_against: int) -> None:
    num = num_for + num_against
    expected = float(binomtest(num_for, num, 0.5, alternative="greater").pvalue) if num else 1.0
    assert mcnemar_p_value(num_for, num_against) == pytest.approx(expected)


def test_without_a_discordant_pair_nothing_is_shown() -> None:
    assert mcnemar_p_value(0, 0) == 1.0


@pytest.mark.parametrize("discordant", [5, 12, 40])
def test_mcnemar_keeps_its_error_rate_exactly(discordant: int) -> None:
    rejected = sum(
        float(binom.pmf(wins, discordant, 0.5))
        for wins in range(discordant + 1)
        if mcnemar_p_value(wins, discordant - wins) <= 0.05
    )
    assert rejected <= 0.05


def test_control_ignoring_the_pairs_misses_a_clear_gain() -> None:
    assert mcnemar_p_value(6, 0) < 0.02
    first, second = wilson_interval(60, 66), wilson_interval(66, 66)
    assert first.high > second.low
