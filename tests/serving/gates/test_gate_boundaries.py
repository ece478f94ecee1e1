"""Where a gate changes its mind: the last value on either side of each bound, and the alpha that each look spends."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from rl_actors.contracts.reports import SuiteResult
from serving.contracts.gates import Drill, GateResult, LiveEvidence
from serving.contracts.release import ReleasePlan
from serving.contracts.requests import RequestSample
from serving.gates import comparison
from serving.gates.registry import GATES, evaluate_offline
from serving.gates.statistics import EventEProcess, cost_per_success_ratio, mean_log_ratio, p95_ratio
from tests.serving.fakes import (
    START,
    arm_events,
    make_evidence,
    make_plan,
    make_report,
    make_samples,
    make_suite,
    noisy_durations,
)

SAFETY, LATENCY = "no_safety_regression", "latency_delta_lt_15_percent"
COST, ROLLBACK = "cost_per_success_not_worse", "rollback_under_5_minutes"
ALONE = make_plan(gates=(SAFETY,), stop_rules=(SAFETY,))
"""One rule, so that it fails and passes at the same 1 / alpha = 20."""


def live(gate: str, evidence: LiveEvidence, plan: ReleasePlan | None = None) -> GateResult:
    return GATES[gate].live(evidence, plan or make_plan())


def offline(gate: str, baseline: list[SuiteResult], candidate: list[SuiteResult], **changes: object) -> GateResult:
    results = evaluate_offline(make_report(baseline, candidate), make_plan(**changes))
    return next(result for result in results if result.gate == gate)


def below(value: float) -> float:
    return math.nextafter(value, 0.0)


class TestEventBounds:
    @pytest.mark.parametrize(
        ("e_fail", "e_pass", "e_rate", "verdict"),
        [
            (20.0, 0.0, 0.0, "fail"),
            (below(20.0), 0.0, 0.0, "inconclusive"),
            (0.0, 20.0, 0.0, "pass"),
            (0.0, below(20.0), 0.0, "inconclusive"),
            (0.0, 0.0, 20.0, "pass"),
            (0.0, 0.0, below(20.0), "inconclusive"),
            (20.0, 1e9, 1e9, "fail"),
        ],
        ids=["proof", "nearly", "no worse", "nearly no worse", "rare", "nearly rare", "harm outranks all"],
    )
    def test_ville_s_bound_is_reached_not_passed(
        self, monkeypatch: pytest.MonkeyPatch, e_fail: float, e_pass: float, e_rate: float, verdict: str
    ):
        monkeypatch.setattr(EventEProcess, "e_fail", property(lambda process: e_fail))
        monkeypatch.setattr(EventEProcess, "e_pass", property(lambda process: e_pass))
        monkeypatch.setattr(comparison, "rate_below_e_value", lambda *counts: e_rate)
        assert live(SAFETY, make_evidence(), ALONE).verdict == verdict

    def test_a_pass_needs_alpha_itself_a_fail_only_a_rule_s_part_of_it(self, monkeypatch: pytest.MonkeyPatch):
        """Swapping the two would let any one of five rules throw a good candidate out five times as often."""
        plan = make_plan()
        assert plan.alpha_per_rule == plan.alpha / 5
        monkeypatch.setattr(EventEProcess, "e_pass", property(lambda process: 0.0))
        monkeypatch.setattr(comparison, "rate_below_e_value", lambda *counts: 0.0)
        for e_fail, verdict in ((20.0, "inconclusive"), (99.9, "inconclusive"), (100.1, "fail")):
            monkeypatch.setattr(EventEProcess, "e_fail", property(lambda process, value=e_fail: value))
            assert live(SAFETY, make_evidence(), plan).verdict == verdict

    def test_clean_sessions_are_the_canary_s_of_the_whole_release(self):
        """Neither this step's sessions nor those of stable make the candidate look rare in its faults."""
        evidence = make_evidence(make_samples(4000), make_samples(200), canary_sessions=10)
        result = live(SAFETY, evidence)
        assert (result.verdict, result.evidence["canary_sessions"]) == ("inconclusive", 10)

    def test_bad_sessions_of_the_other_arm_speak_for_the_candidate(self):
        theirs = live(SAFETY, make_evidence(safety_events=arm_events(0, 40, 0.5), share=0.5)).evidence
        ours = live(SAFETY, make_evidence(safety_events=arm_events(40, 0, 0.5), share=0.5)).evidence
        assert float(theirs["e_pass"]) > 1.0 > float(theirs["e_fail"])
        assert float(ours["e_fail"]) > 1.0 > float(ours["e_pass"])
        assert (theirs["canary_events"], ours["canary_events"]) == (0, 40)


class TestLatencyLooks:
    def arms(
        self, num_candidate: int, factor: float = 1.0
    ) -> tuple[tuple[RequestSample, ...], tuple[RequestSample, ...]]:
        rng = np.random.default_rng(11)
        return noisy_durations(2000, rng), noisy_durations(num_candidate, rng, factor=factor)

    @pytest.mark.parametrize("step", [0, 1])
    @pytest.mark.parametrize(("num_candidate", "fraction"), [(50, 1 / 2), (100, 1 / 6), (200, 1 / 12)])
    def test_each_look_spends_its_own_part_of_alpha(self, num_candidate: int, fraction: float, step: int):
        """The bounds are those of a rule's alpha below, and above of `ramp_alpha`, or of alpha before promotion."""
        plan = make_plan()
        samples = self.arms(num_candidate)
        last = samples[1][-1].completed_at
        stable = [sample.duration_ms for sample in samples[0] if sample.completed_at <= last]
        candidate = [sample.duration_ms for sample in samples[1]]
        strict, loose = plan.alpha_per_rule * fraction, (plan.ramp_alpha, plan.alpha)[step] * fraction
        tail = p95_ratio(stable, candidate, alpha=strict, alpha_high=loose)
        mean = mean_log_ratio(stable, candidate, alpha=strict)
        evidence = live(LATENCY, make_evidence(*samples, share=plan.ramp[step].share), plan).evidence
        assert evidence["p95_delta"] == pytest.approx(tail.ratio - 1)
        assert evidence["p95_delta_high"] == pytest.approx(tail.high - 1)
        assert evidence["mean_delta"] == pytest.approx(mean.ratio - 1)
        assert evidence["delta_low"] == pytest.approx(max(tail.low, mean.low) - 1)

    @pytest.mark.parametrize(("num_stable", "is_enough"), [(49, False), (50, True)])
    def test_stable_needs_as_many_as_the_first_look(self, num_stable: int, is_enough: bool):
        result = live(LATENCY, make_evidence(make_samples(num_stable), make_samples(400)))
        assert ("insufficient" in result.reason) != is_enough

    def test_a_stable_run_that_ended_with_the_look_is_inside_it(self):
        candidate = make_samples(50)
        at = candidate[-1].completed_at
        for ended, num_stable in ((at, 50), (math.nextafter(at, math.inf), 0)):
            stable = tuple(replace(sample, completed_at=ended) for sample in make_samples(50))
            result = live(LATENCY, make_evidence(stable, candidate))
            assert ("insufficient" in result.reason) == (num_stable == 0)

    def test_a_faster_candidate_never_fails_however_noisy(self):
        for num_candidate in (50, 100, 200, 400):
            assert live(LATENCY, make_evidence(*self.arms(num_candidate, 0.6))).verdict in {"pass", "inconclusive"}


class TestCostBounds:
    @pytest.mark.parametrize(("cost", "verdict"), [(1.10, "pass"), (1.10 + 1e-6, "fail"), (0.2, "pass")])
    def test_the_margin_itself_is_still_not_worse(self, cost: float, verdict: str):
        """Constant costs and no failures: both bounds are the ratio, so the limit is sharp."""
        evidence = make_evidence(make_samples(4000), make_samples(400, cost=cost))
        assert live(COST, evidence).verdict == verdict

    @pytest.mark.parametrize(("labelled", "verdict"), [(49, "inconclusive"), (50, "pass")])
    @pytest.mark.parametrize("arm", ["stable", "candidate"])
    def test_what_is_counted_is_labels_not_runs(self, arm: str, labelled: int, verdict: str):
        full = make_samples(400)
        few = tuple(replace(sample, success="yes" if i < labelled else "unknown") for i, sample in enumerate(full))
        evidence = make_evidence(few, full) if arm == "stable" else make_evidence(full, few)
        result = live(COST, evidence)
        assert result.verdict == verdict
        assert ("insufficient" in result.reason) == (verdict == "inconclusive")

    @pytest.mark.parametrize("step", [0, 1])
    @pytest.mark.parametrize(("num_candidate", "fraction"), [(50, 1 / 2), (100, 1 / 6), (200, 1 / 12)])
    def test_each_look_spends_its_own_part_of_alpha(self, num_candidate: int, fraction: float, step: int):
        plan = make_plan(seed=5)
        stable = make_samples(1000, success_rate=0.8)
        candidate = make_samples(num_candidate, success_rate=0.6)
        estimate = cost_per_success_ratio(
            tuple(sample for sample in stable if sample.completed_at <= candidate[-1].completed_at),
            candidate,
            alpha=plan.alpha_per_rule * fraction,
            alpha_high=(plan.ramp_alpha, plan.alpha)[step] * fraction,
            rng=np.random.default_rng(5),
        )
        evidence = live(COST, make_evidence(stable, candidate, share=plan.ramp[step].share), plan).evidence
        assert (evidence["ratio"], evidence["low"], evidence["high"]) == (estimate.ratio, estimate.low, estimate.high)

    def test_dear_successes_fail_even_where_success_is_rare(self):
        """A hundred times the cost is proof by itself; that no success at all might be chance is another question."""
        stable = make_samples(4000, success_rate=0.04)
        candidate = make_samples(50, success_rate=0.04, cost=100.0)
        assert sum(sample.success == "yes" for sample in candidate) == 2
        assert live(COST, make_evidence(stable, candidate)).verdict == "fail"

    @pytest.mark.parametrize(("num_candidate", "verdict"), [(50, "inconclusive"), (400, "fail")])
    def test_no_success_is_proof_only_where_it_would_be_unlikely(self, num_candidate: int, verdict: str):
        """Stable succeeds in 4 of 100: 50 failures in a row may happen to it too, 400 do not."""
        evidence = make_evidence(make_samples(4000, success_rate=0.04), make_samples(num_candidate, success_rate=0.0))
        assert live(COST, evidence).verdict == verdict


class TestDrillAge:
    @pytest.mark.parametrize(("age_s", "verdict"), [(86_400.0, "pass"), (86_400.5, "fail"), (-5.0, "pass")])
    def test_a_drill_lasts_a_day(self, age_s: float, verdict: str):
        """Also where the clock that judges is a little behind the one that drilled."""
        evidence = make_evidence(drills=(Drill(at=START, seconds=1.0),), now=START + age_s)
        assert live(ROLLBACK, evidence).verdict == verdict


class TestOfflineBounds:
    @pytest.mark.parametrize("gate", [SAFETY, LATENCY, COST, "task_success_not_worse"])
    @pytest.mark.parametrize(("num_tasks", "verdict"), [(19, "inconclusive"), (20, "pass")])
    def test_twenty_tasks_are_enough(self, gate: str, num_tasks: int, verdict: str):
        suites = [make_suite("capability", num_tasks=num_tasks)]
        assert offline(gate, suites, suites).verdict == verdict

    @pytest.mark.parametrize("gate", [LATENCY, COST])
    def test_both_sides_of_a_pair_need_them(self, gate: str):
        big, small = [make_suite("capability")], [make_suite("capability", num_tasks=19)]
        assert offline(gate, big, small).verdict == "inconclusive"
        assert offline(gate, small, big).verdict == "inconclusive"

    def test_a_suite_that_only_one_side_ran_compares_with_nothing(self):
        both, extra = make_suite("capability"), make_suite("held_out", p95_duration_ms=9e9, cost_per_success=9e9)
        for gate in (LATENCY, COST):
            assert offline(gate, [both], [both, extra]).verdict == "pass"

    def test_the_worst_suite_counts_for_cost_too(self):
        names = ("capability", "held_out")
        dear = [make_suite("capability", cost_per_success=0.5), make_suite("held_out", cost_per_success=9.0)]
        result = offline(COST, [make_suite(name) for name in names], dear)
        assert (result.verdict, result.evidence["ratio"]) == ("fail", 4.5)

    @pytest.mark.parametrize("cost", [0.0, math.inf])
    def test_one_suite_without_a_price_leaves_the_whole_comparison_open(self, cost: float):
        """The suites that can be compared must not speak for the one that cannot."""
        baseline = [make_suite("capability"), make_suite("held_out", cost_per_success=cost)]
        assert offline(COST, baseline, [make_suite("capability"), make_suite("held_out")]).verdict == "inconclusive"

    def test_small_prices_and_short_runs_compare_like_any_other(self):
        tiny = [make_suite("capability", cost_per_success=0.001, p95_duration_ms=0.001)]
        assert offline(COST, tiny, tiny).verdict == offline(LATENCY, tiny, tiny).verdict == "pass"

    @pytest.mark.parametrize("p95", [0.0, -1.0])
    def test_a_baseline_that_was_never_timed_compares_with_nothing(self, p95: float):
        untimed = [make_suite("capability", p95_duration_ms=p95), make_suite("held_out")]
        assert offline(LATENCY, untimed, untimed).verdict == "inconclusive"

    def test_a_p_value_at_alpha_is_no_proof(self):
        """Five tasks lost and none won: p = 1/32."""
        good, bad = [make_suite("capability")], [make_suite("capability", failed=[f"capability-{i}" for i in range(5)])]
        p_value = float(offline("task_success_not_worse", good, bad).evidence["p_value"])
        assert p_value == pytest.approx(1 / 32)
        assert offline("task_success_not_worse", good, bad, alpha=p_value).verdict == "inconclusive"
        assert offline("task_success_not_worse", good, bad, alpha=math.nextafter(p_value, 1.0)).verdict == "fail"

    @pytest.mark.parametrize(("lost", "won", "verdict"), [(3, 3, "pass"), (3, 4, "pass"), (4, 3, "inconclusive")])
    def test_as_many_won_as_lost_is_not_worse(self, lost: int, won: int, verdict: str):
        stable = [make_suite("capability", failed=[f"capability-{i}" for i in range(won)])]
        candidate = [make_suite("capability", failed=[f"capability-{i}" for i in range(won, won + lost)])]
        result = offline("task_success_not_worse", stable, candidate)
        assert (result.verdict, result.evidence["newly_bad"], result.evidence["fixed"]) == (verdict, lost, won)

    def test_the_same_task_name_in_two_suites_is_two_tasks(self):
        """Otherwise a task won in one suite would hide the same name lost in another."""
        names = ("one", "two")
        stable = [replace(make_suite(name), success_by_task={"t": name == "two"}, num_tasks=40) for name in names]
        candidate = [replace(make_suite(name), success_by_task={"t": name == "one"}, num_tasks=40) for name in names]
        evidence = offline("task_success_not_worse", stable, candidate).evidence
        assert (evidence["newly_bad"], evidence["fixed"]) == (1, 1)
