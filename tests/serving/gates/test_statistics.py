"""The statistics: equations against direct computation, extremes, and simulated error rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import betaln
from scipy.stats import beta as beta_distribution

from serving.gates.statistics import (
    EventEProcess,
    cost_per_success_ratio,
    log_betainc,
    log_betaincc,
    look_at,
    mean_log_ratio,
    p95_ratio,
    quantile,
    rate_below_e_value,
    rate_upper_bound,
    reliability_score,
    sample_ratio_check,
)
from serving.split.record import slot_position
from tests.serving.fakes import make_sample, make_samples


def observed(num_canary: int, num_stable: int, share: float = 0.05, margin: float = 0.0) -> EventEProcess:
    process = EventEProcess(share, margin)
    for index in range(num_canary + num_stable):
        process.observe(index < num_canary)
    return process


def integrated_e_value(k: int, m: int, w: float, prior_mean: float, *, above: bool) -> float:
    """The e-value by numerical integration over theta: no special function involved."""
    a, b = 20 * prior_mean, 20 * (1 - prior_mean)
    low, high = (w, 1.0) if above else (0.0, w)

    def prior(theta: float) -> float:
        return theta ** (a - 1) * (1 - theta) ** (b - 1)

    def posterior(theta: float) -> float:
        return prior(theta) * (theta / w) ** k * ((1 - theta) / (1 - w)) ** m

    return quad(posterior, low, high, epsabs=0, limit=400)[0] / quad(prior, low, high, epsabs=0, limit=400)[0]


class TestEventEProcess:
    def test_no_event_is_no_evidence(self):
        process = EventEProcess(0.05, 0.5)
        assert process.e_fail == process.e_pass == 1.0
        assert process.num_events == process.num_canary_events == 0

    @pytest.mark.parametrize(("k", "m"), [(0, 5), (1, 0), (3, 20), (10, 40), (0, 100), (12, 3)])
    @pytest.mark.parametrize("share", [0.05, 0.25, 0.5])
    def test_e_fail_is_the_integral_of_the_design(self, k: int, m: int, share: float):
        expected = integrated_e_value(k, m, share, share, above=True)
        assert observed(k, m, share).e_fail == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize(("k", "m"), [(0, 5), (1, 10), (3, 60), (0, 100), (12, 30)])
    @pytest.mark.parametrize("margin", [0.1, 0.5, 1.0])
    def test_e_pass_is_the_mirror_image_at_the_margin(self, k: int, m: int, margin: float):
        share = 0.25
        shifted = share * (1 + margin) / (share * (1 + margin) + 1 - share)
        expected = integrated_e_value(k, m, shifted, share, above=False)
        assert observed(k, m, share, margin).e_pass == pytest.approx(expected, rel=1e-6)

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 40), st.integers(0, 200), st.sampled_from([0.05, 0.2, 0.5, 0.9]))
    def test_one_more_event_is_fair_or_worse_under_the_null(self, k: int, m: int, share: float):
        """The defining property: under theta = w the expected next value is at most the present one."""
        now = observed(k, m, share).e_fail
        after = share * observed(k + 1, m, share).e_fail + (1 - share) * observed(k, m + 1, share).e_fail
        assert after <= now * (1 + 1e-9)

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 40), st.integers(0, 200), st.floats(0.0, 2.0))
    def test_e_pass_is_fair_at_the_margin(self, k: int, m: int, margin: float):
        share = 0.2
        shifted = share * (1 + margin) / (share * (1 + margin) + 1 - share)
        now = observed(k, m, share, margin).e_pass
        hit, miss = observed(k + 1, m, share, margin).e_pass, observed(k, m + 1, share, margin).e_pass
        assert shifted * hit + (1 - shifted) * miss == pytest.approx(now, rel=1e-7)

    def test_order_of_events_does_not_matter(self):
        forward, backward = EventEProcess(0.1), EventEProcess(0.1)
        events = [True, False, False, True, False]
        for one, other in zip(events, reversed(events), strict=True):
            forward.observe(one)
            backward.observe(other)
        assert forward.log_e_fail == backward.log_e_fail

    def test_a_change_of_share_starts_a_factor_and_factors_multiply(self):
        process = EventEProcess(0.05, 0.5)
        for _ in range(3):
            process.observe(True)
        process.observe(True, share=0.25)
        process.observe(False)  # still at 25 %
        expected = observed(3, 0, 0.05, 0.5).log_e_fail + observed(1, 1, 0.25, 0.5).log_e_fail
        assert process.log_e_fail == pytest.approx(expected)
        assert (process.num_events, process.num_canary_events) == (5, 4)

    def test_a_late_event_counts_at_the_share_of_its_own_run(self):
        mixed, sorted_ = EventEProcess(0.05), EventEProcess(0.05)
        for is_canary, share in [(True, 0.05), (False, 0.5), (True, 0.05), (True, 0.5)]:
            mixed.observe(is_canary, share=share)
        for is_canary, share in [(True, 0.05), (True, 0.05), (False, 0.5), (True, 0.5)]:
            sorted_.observe(is_canary, share=share)
        assert mixed.log_e_fail == pytest.approx(sorted_.log_e_fail)

    def test_a_pooled_count_over_two_shares_would_be_wrong(self):
        """Negative control: the same counts read at one share give another answer."""
        process = observed(0, 20, 0.05)
        for _ in range(20):
            process.observe(True, share=0.5)
        assert process.e_fail < 1e7 < observed(20, 20, 0.05).e_fail

    @pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, math.nan])
    def test_a_share_without_two_arms_is_refused(self, share: float):
        with pytest.raises(ValueError, match="0 < share < 1"):
            EventEProcess(share)
        with pytest.raises(ValueError, match="0 < share < 1"):
            EventEProcess(0.05).observe(True, share=share)

    @pytest.mark.parametrize(("margin", "concentration"), [(-0.1, 20.0), (0.0, 0.0), (0.0, -1.0)])
    def test_bad_parameters_are_refused(self, margin: float, concentration: float):
        with pytest.raises(ValueError, match="must be >= 0"):
            EventEProcess(0.05, margin, concentration)

    @pytest.mark.parametrize(("k", "n"), [(0, 10**6), (50_000, 10**6), (10**6, 10**6), (1, 10**6), (49_000, 10**6)])
    def test_a_million_events_stay_finite(self, k: int, n: int):
        process = EventEProcess(0.05, 0.5)
        process._counts[0.05] = (k, n - k)
        assert math.isfinite(process.log_e_fail)
        assert math.isfinite(process.log_e_pass)
        assert math.isfinite(process.e_fail)

    def test_an_underflowing_tail_does_not_poison_later_evidence(self):
        """A canary that was far better at 5 % and then breaks at 50 % must still be caught."""
        process = EventEProcess(0.05)
        process._counts[0.05] = (0, 20_000)
        before = process.log_e_fail
        assert -50 < before < 0
        for _ in range(300):
            process.observe(True, share=0.5)
        assert process.e_fail > 1e6

    def test_much_harm_overflows_to_a_large_finite_number(self):
        process = EventEProcess(0.05)
        process._counts[0.05] = (2000, 0)
        assert process.log_e_fail > 700
        assert math.isfinite(process.e_fail)


class TestEProcessErrorRates:
    """Simulated with fixed seeds: 3,000 requests at a 5 % share, looked at after every event."""

    ALPHA, SHARE = 0.05, 0.05

    def alarm_after(self, rng: np.random.Generator, stable_rate: Any, canary_rate: Any, n: int = 3000) -> int | None:
        """Number of canary requests until the alarm; None without one."""
        is_canary = rng.random(n) < self.SHARE
        is_bad = rng.random(n) < np.where(is_canary, canary_rate, stable_rate)
        process = EventEProcess(self.SHARE)
        for index in np.flatnonzero(is_bad):
            process.observe(bool(is_canary[index]))
            if process.e_fail >= 1 / self.ALPHA:
                return int(is_canary[: index + 1].sum())
        return None

    def test_false_roll_backs_stay_below_alpha(self):
        alarms = [self.alarm_after(np.random.default_rng(seed), 0.15, 0.15) for seed in range(400)]
        assert sum(alarm is not None for alarm in alarms) / 400 <= self.ALPHA

    @pytest.mark.parametrize(("share", "rate"), [(0.05, 0.15), (0.05, 0.5), (0.25, 0.35), (0.5, 0.35), (0.5, 0.9)])
    def test_sessions_dealt_in_blocks_keep_both_alphas(self, share: float, rate: float):
        """Blocks leave a count less spread than coins (Hoeffding 1963, theorem 4): neither error becomes likelier.

        Looked at after every event: equal arms are not rolled back, and arms at the margin do not pass.
        """
        margin, num_sessions, num_releases = 0.5, 1000, 200
        false_alarms = false_passes = 0
        for seed in range(num_releases):
            rng = np.random.default_rng(seed)
            is_canary = np.array([slot_position(slot, f"r{seed}") < share for slot in range(num_sessions)])
            events = is_canary[rng.random(num_sessions) < rate]
            worse = is_canary[rng.random(num_sessions) < np.where(is_canary, rate, rate / (1 + margin))]
            false_alarms += self.ever(events, lambda process: process.e_fail, share, margin) >= 1 / self.ALPHA
            false_passes += self.ever(worse, lambda process: process.e_pass, share, margin) >= 1 / self.ALPHA
        assert false_alarms / num_releases <= self.ALPHA
        assert false_passes / num_releases <= self.ALPHA

    @pytest.mark.parametrize(("share", "rate"), [(0.05, 0.15), (0.25, 0.35), (0.5, 0.35)])
    def test_sessions_dealt_in_blocks_still_show_a_bad_arm(self, share: float, rate: float):
        """Negative control of the test above: its harness does fire, on an arm with 0.9 bad sessions."""
        caught = 0
        for seed in range(40):
            rng = np.random.default_rng(seed)
            is_canary = np.array([slot_position(slot, f"r{seed}") < share for slot in range(1000)])
            events = is_canary[rng.random(1000) < np.where(is_canary, 0.9, rate)]
            caught += self.ever(events, lambda process: process.e_fail, share, 0.5) >= 1 / self.ALPHA
        assert caught >= 38

    @staticmethod
    def ever(events: np.ndarray, e_value: Callable[[EventEProcess], float], share: float, margin: float) -> float:
        """The largest evidence ever seen, looking after every event."""
        process, largest = EventEProcess(share, margin), 0.0
        for is_canary in events:
            process.observe(bool(is_canary))
            largest = max(largest, e_value(process))
        return largest

    def test_a_base_rate_that_drifts_over_the_day_raises_no_alarm(self):
        drift = 0.05 + 0.3 * np.sin(np.linspace(0, np.pi, 3000)) ** 2
        alarms = [self.alarm_after(np.random.default_rng(seed), drift, drift) for seed in range(100)]
        assert sum(alarm is not None for alarm in alarms) / 100 <= self.ALPHA

    def test_doubled_failures_are_found_soon(self):
        alarms = [self.alarm_after(np.random.default_rng(1000 + seed), 0.15, 0.30) for seed in range(100)]
        found = [alarm for alarm in alarms if alarm is not None]
        assert len(found) >= 85
        assert 30 <= np.median(found) <= 90

    def test_a_collapse_is_found_within_a_few_requests(self):
        alarms = [self.alarm_after(np.random.default_rng(2000 + seed), 0.05, 0.9) for seed in range(50)]
        assert all(alarm is not None for alarm in alarms)
        assert np.median([alarm for alarm in alarms if alarm]) <= 8

    def test_a_repeated_z_test_would_cry_wolf(self):
        """Negative control for the harness: the naive test, looked at just as often, breaks its alpha by far."""

        def z_alarm(rng: np.random.Generator) -> bool:
            is_canary = rng.random(3000) < self.SHARE
            bad = np.flatnonzero(rng.random(3000) < 0.15)
            k, n = np.cumsum(is_canary[bad]), np.arange(1, len(bad) + 1)
            z = (k - n * self.SHARE) / np.sqrt(n * self.SHARE * (1 - self.SHARE))
            return bool((z[20:] > 1.645).any())

        assert np.mean([z_alarm(np.random.default_rng(seed)) for seed in range(200)]) > 0.2

    def test_false_passes_stay_below_alpha(self):
        """At a canary exactly as bad as the margin, `pass` must be rare however often one looks."""
        share, margin = 0.5, 0.5
        shifted = share * (1 + margin) / (share * (1 + margin) + 1 - share)
        passes = 0
        for seed in range(200):
            process = EventEProcess(share, margin)
            for is_canary in np.random.default_rng(seed).random(400) < shifted:
                process.observe(bool(is_canary))
                if process.e_pass >= 1 / self.ALPHA:
                    passes += 1
                    break
        assert passes / 200 <= self.ALPHA

    def test_an_equal_canary_passes_at_half_traffic(self):
        hits = np.random.default_rng(5).random(1500) < 0.5
        process = EventEProcess(0.5, 0.5)
        for is_canary in hits:
            process.observe(bool(is_canary))
        assert process.e_pass >= 20


class TestLogTails:
    @pytest.mark.parametrize(
        ("a", "b", "x"), [(1.0, 19.0, 0.05), (3.5, 40.0, 0.3), (200.0, 3000.0, 0.05), (5, 5, 0.99)]
    )
    def test_agrees_with_the_distribution_where_that_works(self, a: float, b: float, x: float):
        assert log_betainc(a, b, x) == pytest.approx(beta_distribution.logcdf(x, a, b), rel=1e-9)
        assert log_betaincc(a, b, x) == pytest.approx(beta_distribution.logsf(x, a, b), rel=1e-9)

    @pytest.mark.parametrize(
        ("a", "b", "x"), [(2000.0, 2000.0, 0.2), (50_001.0, 19.0, 0.5), (60_000.0, 940_000.0, 0.05)]
    )
    def test_the_far_lower_tail_is_the_integral(self, a: float, b: float, x: float):
        """Integrate theta^(a-1) (1-theta)^(b-1) relative to its value at x, where it is finite."""

        def relative(t: float) -> float:
            return math.exp((a - 1) * (math.log(t) - math.log(x)) + (b - 1) * (math.log1p(-t) - math.log1p(-x)))

        slope = (a - 1) / x - (b - 1) / (1 - x)
        integral = quad(relative, max(x - 60 / slope, 1e-12), x, epsabs=0, limit=400)[0]
        expected = math.log(integral) + (a - 1) * math.log(x) + (b - 1) * math.log1p(-x) - betaln(a, b)
        assert expected < -600
        assert log_betainc(a, b, x) == pytest.approx(expected, rel=1e-9)

    def test_the_upper_tail_mirrors_the_lower(self):
        assert log_betaincc(2000.0, 2000.0, 0.8) == pytest.approx(log_betainc(2000.0, 2000.0, 0.2), rel=1e-9)

    @settings(max_examples=80, deadline=None)
    @given(st.floats(0.5, 1e5), st.floats(0.5, 1e6), st.floats(0.01, 0.99))
    def test_always_a_log_probability(self, a: float, b: float, x: float):
        for value in (log_betainc(a, b, x), log_betaincc(a, b, x)):
            assert value <= 1e-12
            assert not math.isnan(value)

    def test_no_jump_where_the_series_takes_over(self):
        values = [log_betainc(a, 1000.0, 0.1) for a in np.linspace(700, 1000, 31)]
        steps = np.diff(values)
        assert (steps < 0).all()
        assert np.abs(np.diff(steps)).max() < 0.5


class TestSampleRatio:
    def test_the_declared_split_is_fine(self):
        assert sample_ratio_check(500, 10_000, 0.05) > 0.5

    @pytest.mark.parametrize(("num_canary", "num_total"), [(0, 10_000), (800, 10_000), (300, 10_000), (100, 100)])
    def test_another_split_is_not(self, num_canary: int, num_total: int):
        assert sample_ratio_check(num_canary, num_total, 0.05) < 1e-3

    def test_no_session_is_no_alarm(self):
        assert sample_ratio_check(0, 0, 0.05) == 1.0

    @pytest.mark.parametrize(("num_canary", "num_total"), [(-1, 5), (6, 5)])
    def test_impossible_counts_are_refused(self, num_canary: int, num_total: int):
        with pytest.raises(ValueError, match="sessions"):
            sample_ratio_check(num_canary, num_total, 0.05)

    def test_looking_all_the_time_keeps_alpha(self):
        alarms = 0
        for seed in range(200):
            counts = np.cumsum(np.random.default_rng(seed).random(2000) < 0.05)
            looks = range(20, 2000, 20)
            alarms += any(sample_ratio_check(int(counts[n - 1]), n, 0.05) < 0.05 for n in looks)
        assert alarms / 200 <= 0.05

    def test_blocks_raise_no_alarm_and_a_broken_split_still_does(self):
        for seed in range(20):
            counts = np.cumsum([slot_position(slot, f"r{seed}") < 0.05 for slot in range(2000)])
            assert min(sample_ratio_check(int(counts[n - 1]), n, 0.05) for n in range(1, 2001)) > 0.05
        lost = np.cumsum([slot_position(slot, "r") < 0.05 and slot % 2 == 0 for slot in range(2000)])
        assert sample_ratio_check(int(lost[-1]), 2000, 0.05) < 1e-3

    def test_a_huge_mismatch_is_zero_not_an_overflow(self):
        assert sample_ratio_check(10**6, 10**6, 0.05) == 0.0


class TestRates:
    def test_clean_trials_needed_for_five_percent(self):
        assert rate_below_e_value(0, 81, 0.05) < 20 <= rate_below_e_value(0, 82, 0.05)

    def test_no_trial_is_no_evidence(self):
        assert rate_below_e_value(0, 0, 0.05) == pytest.approx(1.0)

    def test_bad_trials_speak_against(self):
        assert rate_below_e_value(10, 100, 0.05) < 1

    def test_false_passes_at_the_limit_stay_below_alpha(self):
        passes = 0
        for seed in range(200):
            counts = np.cumsum(np.random.default_rng(seed).random(600) < 0.05)
            passes += any(rate_below_e_value(int(counts[n - 1]), n, 0.05) >= 20 for n in range(10, 600, 10))
        assert passes / 200 <= 0.05

    def test_rule_of_three(self):
        assert rate_upper_bound(0, 300, 0.05) == pytest.approx(3 / 300, rel=0.01)

    def test_no_trials_bound_nothing(self):
        assert rate_upper_bound(0, 0, 0.05) == 1.0


class TestLooks:
    def test_nothing_before_the_first(self):
        assert look_at(49, 50) is None

    @pytest.mark.parametrize(
        ("num", "samples", "fraction"),
        [(50, 50, 1 / 2), (99, 50, 1 / 2), (100, 100, 1 / 6), (399, 200, 1 / 12), (400, 400, 1 / 20)],
    )
    def test_doubling_samples_spend_less_and_less(self, num: int, samples: int, fraction: float):
        look = look_at(num, 50)
        assert look is not None
        assert look.num_samples == samples
        assert look.alpha_fraction == pytest.approx(fraction)

    def test_all_looks_together_spend_at_most_alpha(self):
        looks = [look_at(50 << j, 50) for j in range(60)]
        assert sum(look.alpha_fraction for look in looks if look) <= 1.0

    @given(st.integers(1, 10**7), st.integers(1, 1000))
    def test_a_look_never_needs_more_than_there_is(self, num: int, first: int):
        look = look_at(num, first)
        assert (look is None) == (num < first)
        if look:
            assert look.num_samples <= num < 2 * look.num_samples


class TestLatencyRatios:
    def draws(self, n: int, seed: int, factor: float = 1.0) -> list[float]:
        return [float(x) for x in factor * np.exp(np.random.default_rng(seed).normal(4.6, 0.5, n))]

    @pytest.mark.parametrize("ratio", [mean_log_ratio, p95_ratio])
    def test_a_constant_factor_is_found_exactly(self, ratio):
        stable = self.draws(500, 1)
        estimate = ratio(stable, [1.149 * x for x in stable], alpha=0.05)
        assert estimate.ratio == pytest.approx(1.149, rel=1e-12)
        assert estimate.low < 1.149 < estimate.high

    @pytest.mark.parametrize("ratio", [mean_log_ratio, p95_ratio])
    def test_the_bounds_hold_the_truth_nine_times_in_ten(self, ratio):
        estimates = [ratio(self.draws(2000, 2 * s), self.draws(200, 2 * s + 1, 1.2), alpha=0.05) for s in range(150)]
        covered = np.mean([estimate.low <= 1.2 <= estimate.high for estimate in estimates])
        assert 0.82 <= covered <= 0.98

    def test_the_mean_needs_fewer_samples_than_the_tail(self):
        stable, candidate = self.draws(2000, 1), self.draws(200, 2)
        mean, tail = (ratio(stable, candidate, alpha=0.05) for ratio in (mean_log_ratio, p95_ratio))
        assert math.log(tail.high / tail.low) > 1.5 * math.log(mean.high / mean.low)

    def test_too_few_for_a_tail_bound_nothing(self):
        estimate = p95_ratio(self.draws(500, 1), self.draws(10, 2), alpha=0.05)
        assert estimate.low == 0.0
        assert estimate.high > 1e100

    def test_equal_constant_durations_are_certain(self):
        assert mean_log_ratio([5.0] * 30, [5.0] * 30, alpha=0.05).high == pytest.approx(1.0)

    def test_durations_of_zero_do_not_break_the_logarithm(self):
        assert p95_ratio([0.0] * 100, [0.0] * 100, alpha=0.05).ratio == pytest.approx(1.0)

    def test_quantile_is_nearest_rank(self):
        values = [float(v) for v in range(1, 101)]
        assert quantile(values, 0.95) == 95.0
        assert quantile(values, 0.5) == 50.0
        assert quantile([7.0], 0.01) == 7.0
        assert math.isnan(quantile([], 0.5))


class TestCostPerSuccess:
    def ratio(self, stable, candidate, alpha: float = 0.05):
        return cost_per_success_ratio(stable, candidate, alpha=alpha, rng=np.random.default_rng(0))

    def test_hand_computed(self):
        """Stable: 10 runs at 2, 8 successes -> 2.5. Candidate: 10 runs at 3, 5 successes -> 6. Ratio 2.4."""
        stable = make_samples(10, success_rate=0.8, cost=2.0)
        candidate = make_samples(10, success_rate=0.5, cost=3.0)
        assert self.ratio(stable, candidate).ratio == pytest.approx(2.4)

    def test_equal_arms_have_ratio_one(self):
        samples = make_samples(200, success_rate=0.9)
        estimate = self.ratio(samples, samples)
        assert estimate.ratio == 1.0
        assert estimate.low < 1.0 < estimate.high

    def test_no_success_is_infinite_never_zero(self):
        good, bad = make_samples(50), make_samples(50, success_rate=0.0)
        assert self.ratio(good, bad).ratio == math.inf
        assert self.ratio(good, bad).low == math.inf
        assert self.ratio(bad, good).ratio == 0.0
        assert math.isnan(self.ratio(bad, bad).ratio)

    def test_no_runs_compare_with_nothing(self):
        assert math.isnan(self.ratio((), ()).ratio)
        assert self.ratio(make_samples(5), ()).ratio == math.inf

    def test_unlabelled_runs_cost_but_do_not_judge(self):
        """Half of the labels missing must not look like half of the successes."""
        stable = make_samples(200, success_rate=1.0)
        half = tuple(make_sample(i, success="yes" if i % 2 else "unknown") for i in range(200))
        assert self.ratio(stable, half).ratio == pytest.approx(1.0)

    def test_same_rng_same_bounds(self):
        arms = make_samples(300, success_rate=0.8), make_samples(60, success_rate=0.7)
        assert self.ratio(*arms) == self.ratio(*arms)

    def test_coverage_over_seeds(self):
        def arm(rng: np.random.Generator, n: int, rate: float):
            return tuple(
                make_sample(i, cost=float(c), success="yes" if ok else "no")
                for i, (c, ok) in enumerate(zip(rng.gamma(9, 1 / 9, n), rng.random(n) < rate, strict=True))
            )

        covered = 0
        for seed in range(40):
            rng = np.random.default_rng(seed)
            estimate = self.ratio(arm(rng, 800, 0.8), arm(rng, 150, 0.64))
            covered += estimate.low <= 0.8 / 0.64 <= estimate.high
        assert 32 <= covered <= 39

    def test_a_talkative_session_counts_once(self):
        """One session with 100 failures widens the interval; 100 sessions with one failure each move it for good."""
        stable = make_samples(300, success_rate=1.0)
        good = make_samples(100, success_rate=1.0)
        one = tuple(make_sample(i, session_key="angry", success="no") for i in range(100))
        many = tuple(make_sample(1000 + i, success="no") for i in range(100))
        assert self.ratio(stable, good + one).low < 1.05
        assert self.ratio(stable, good + many).low > 1.5

    def test_many_sessions_are_pooled_without_bias(self):
        stable, candidate = make_samples(6000, success_rate=0.9), make_samples(5000, success_rate=0.75)
        estimate = self.ratio(stable, candidate)
        assert estimate.ratio == pytest.approx(1.2, rel=1e-3)
        assert 1.15 < estimate.low < 1.2 < estimate.high < 1.25


class TestReliabilityScore:
    def test_the_worked_example(self):
        assert reliability_score(0.9, 0.1, 0.05) == pytest.approx(0.7695)

    rates = st.floats(0.0, 1.0)

    @given(rates, rates, rates)
    def test_bounds(self, success: float, override: float, tool_error: float):
        assert 0.0 <= reliability_score(success, override, tool_error) <= 1.0

    @given(rates, rates, rates, rates)
    def test_monotone_in_every_rate(self, low: float, high: float, one: float, other: float):
        low, high = sorted((low, high))
        assert reliability_score(low, one, other) <= reliability_score(high, one, other)
        assert reliability_score(one, low, other) >= reliability_score(one, high, other)
        assert reliability_score(one, other, low) >= reliability_score(one, other, high)

    @pytest.mark.parametrize("rates", [(1.1, 0, 0), (0.5, -0.1, 0), (0.5, 0, math.nan)])
    def test_a_rate_outside_zero_to_one_is_refused(self, rates: tuple[float, float, float]):
        with pytest.raises(ValueError, match="rates must lie"):
            reliability_score(*rates)
