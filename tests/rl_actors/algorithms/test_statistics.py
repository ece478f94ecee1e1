"""Intervals and paired tests against hand-computed values, scipy and their own guarantee of coverage."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from rl_actors.algorithms.statistics import mcnemar_p_value, wilson_interval
from rl_actors.errors import BadDataError


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


def pairs(wins: int, losses: int, same: int = 3) -> tuple[list[bool], list[bool]]:
    """Baseline and candidate results with so many discordant pairs."""
    return [False] * wins + [True] * losses + [True] * same, [True] * wins + [False] * losses + [True] * same


def test_mcnemar_by_hand() -> None:
    baseline, candidate = pairs(wins=5, losses=1)
    assert mcnemar_p_value(baseline, candidate) == pytest.approx(2 * (1 + 6) / 64)
    assert mcnemar_p_value(baseline, candidate, alternative="candidate_better") == pytest.approx(7 / 64)
    assert mcnemar_p_value(baseline, candidate, alternative="candidate_worse") == pytest.approx(63 / 64)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 20))
def test_mcnemar_equals_the_binomial_test_whatever_the_concordant_pairs(wins: int, losses: int, same: int) -> None:
    baseline, candidate = pairs(wins, losses, same)
    p_value = mcnemar_p_value(baseline, candidate)
    expected = float(binomtest(wins, wins + losses, 0.5).pvalue) if wins + losses else 1.0
    assert p_value == pytest.approx(expected)
    assert mcnemar_p_value(candidate, baseline) == pytest.approx(p_value)
    better = mcnemar_p_value(baseline, candidate, alternative="candidate_better")
    assert mcnemar_p_value(candidate, baseline, alternative="candidate_worse") == pytest.approx(better)


@pytest.mark.parametrize("alternative", ["two_sided", "candidate_better", "candidate_worse"])
def test_without_a_discordant_pair_nothing_is_shown(alternative: str) -> None:
    assert mcnemar_p_value([True, False], [True, False], alternative=alternative) == 1.0  # pyright: ignore[reportArgumentType]
    assert mcnemar_p_value([], []) == 1.0


@pytest.mark.parametrize("discordant", [5, 12, 40])
def test_mcnemar_keeps_its_error_rate_exactly(discordant: int) -> None:
    rejected = sum(
        float(binom.pmf(wins, discordant, 0.5))
        for wins in range(discordant + 1)
        if mcnemar_p_value(*pairs(wins, discordant - wins)) <= 0.05
    )
    assert rejected <= 0.05


def test_control_ignoring_the_pairs_misses_a_clear_gain() -> None:
    baseline, candidate = pairs(wins=6, losses=0, same=60)
    assert mcnemar_p_value(baseline, candidate, alternative="candidate_better") < 0.02
    first, second = (wilson_interval(sum(results), len(results)) for results in (baseline, candidate))
    assert first.high > second.low


def test_mcnemar_refuses_unpaired_results() -> None:
    with pytest.raises(BadDataError, match="one result per baseline result"):
        mcnemar_p_value([True], [True, False])
