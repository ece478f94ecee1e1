"""Every gate, live and offline: it passes, it fails, it says `inconclusive` without data, and it fires when it must."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_actors.contracts.errors import BadInputError
from serving.contracts.gates import ARTICLE_GATES, Drill, GateResult, LiveEvidence
from serving.contracts.release import ReleasePlan
from serving.contracts.requests import RequestSample
from serving.gates import registry
from serving.gates.registry import GATES, check_gate_names, evaluate_offline, may_enter_canary
from tests.serving.fakes import (
    START,
    arm_events,
    good_evidence,
    make_evidence,
    make_plan,
    make_report,
    make_sample,
    make_samples,
    make_suite,
    make_window,
    noisy_durations,
)

PLAN = make_plan()


def live(gate: str, evidence: LiveEvidence, **changes: object) -> GateResult:
    return GATES[gate].live(evidence, make_plan(**changes))


def verdicts(results: Sequence[GateResult]) -> dict[str, str]:
    return {result.gate: result.verdict for result in results}


class TestRegistry:
    def test_the_article_s_four_gates_are_the_default(self):
        assert make_plan().gates == ARTICLE_GATES
        assert set(ARTICLE_GATES) < set(GATES)

    @pytest.mark.parametrize(
        ("typo", "meant"),
        [
            ("no_saftey_regression", "no_safety_regression"),
            ("latency_delta_lt_15_percnt", "latency_delta_lt_15_percent"),
            ("cost_per_succes_not_worse", "cost_per_success_not_worse"),
            ("rollback_under_five_minutes", "rollback_under_5_minutes"),
            ("task_sucess_not_worse", "task_success_not_worse"),
        ],
    )
    def test_a_misspelling_names_the_nearest_gate(self, typo: str, meant: str):
        for plan in (make_plan(gates=(typo,)), make_plan(stop_rules=(typo,))):
            with pytest.raises(BadInputError, match=f"did you mean '{meant}'"):
                check_gate_names(plan)

    @given(st.text(max_size=30))
    def test_any_other_text_is_refused_with_every_gate_there_is(self, text: str):
        with pytest.raises(BadInputError) as caught:
            check_gate_names(make_plan(gates=(f"{text}!",)))
        assert all(name in caught.value.remedy for name in GATES)

    def test_right_names_are_accepted(self):
        check_gate_names(make_plan(gates=tuple(GATES)))

    @pytest.mark.parametrize("name", ARTICLE_GATES)
    def test_a_name_that_is_taken_is_not_given_again(self, name: str):
        before = GATES[name]
        with pytest.raises(ValueError, match=f"'{name}' is registered twice"):
            registry.gate(name)(lambda evidence, plan: ("pass", "whatever it is", {}))
        assert GATES[name] is before

    def test_a_gate_is_what_its_file_registers(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(registry, "GATES", {})

        @registry.gate("polite", offline=lambda report, plan: ("fail", "rude offline", {"rude": 2}))
        def watch(evidence: LiveEvidence, plan: ReleasePlan) -> registry.Finding:
            return "pass", f"polite at {evidence.share:g}", {"rude": 0.0}

        assert watch(good_evidence(), PLAN)[0] == "pass"
        found = registry.GATES["polite"]
        assert found.live(good_evidence(), PLAN) == GateResult(
            gate="polite", verdict="pass", evidence={"rude": 0.0}, reason="polite at 0.05"
        )
        assert found.offline is not None
        assert found.offline(make_report(), PLAN).verdict == "fail"

    def test_only_what_a_deployment_can_time_has_no_offline_form(self):
        assert [name for name, found in GATES.items() if found.offline is None] == ["rollback_under_5_minutes"]

    def test_every_result_bears_its_gate_s_name(self):
        for name, gate in GATES.items():
            assert gate.live(make_evidence(), PLAN).gate == name
            if gate.offline:
                assert gate.offline(make_report(), PLAN).gate == name

    @pytest.mark.parametrize("name", GATES)
    def test_no_data_is_inconclusive_never_pass(self, name: str):
        result = live(name, make_evidence(drills=()))
        assert result.verdict == "inconclusive"
        assert result.reason

    @pytest.mark.parametrize("name", GATES)
    def test_good_traffic_passes(self, name: str):
        assert live(name, good_evidence()).verdict == "pass"


class TestSafety:
    GATE = "no_safety_regression"

    def test_planted_regression_is_blocked(self):
        evidence = replace(good_evidence(), safety_events=arm_events(12, 20))
        result = live(self.GATE, evidence)
        assert result.verdict == "fail"
        assert float(result.evidence["e_fail"]) >= 1 / PLAN.alpha_per_rule
        assert result.evidence["canary_events"] == 12

    def test_events_in_proportion_do_not_fail(self):
        evidence = make_evidence(safety_events=arm_events(5, 95), canary_sessions=20)
        assert live(self.GATE, evidence).verdict == "inconclusive"

    def test_much_evidence_of_no_harm_passes_whatever_the_rate(self):
        evidence = make_evidence(safety_events=arm_events(150, 450, 0.5), canary_sessions=300, share=0.5)
        result = live(self.GATE, evidence)
        assert result.verdict == "pass"
        assert float(result.evidence["e_pass"]) >= 20 > float(result.evidence["e_rate_below_tolerance"])

    @pytest.mark.parametrize(("sessions", "verdict"), [(81, "inconclusive"), (82, "pass")])
    def test_clean_sessions_show_a_rate_below_the_tolerance(self, sessions: int, verdict: str):
        assert live(self.GATE, make_evidence(canary_sessions=sessions)).verdict == verdict

    def test_a_tighter_tolerance_asks_for_more_clean_sessions(self):
        evidence = make_evidence(canary_sessions=82)
        assert live(self.GATE, evidence, event_rate_tolerance=0.01).verdict == "inconclusive"

    def test_more_events_than_sessions_is_no_crash(self):
        assert live(self.GATE, make_evidence(safety_events=arm_events(3, 0), canary_sessions=1)).verdict != "pass"

    def test_more_rules_make_each_of_them_stricter(self):
        evidence = replace(good_evidence(), safety_events=arm_events(6, 12))
        e_fail = float(live(self.GATE, evidence).evidence["e_fail"])
        assert (
            live(self.GATE, evidence, alpha=1.1 / e_fail, gates=(self.GATE,), stop_rules=(self.GATE,)).verdict == "fail"
        )
        assert live(self.GATE, evidence, alpha=1.1 / e_fail).verdict != "fail"

    def test_success_watches_failures_instead(self):
        evidence = replace(good_evidence(), failure_events=arm_events(30, 60))
        assert live("task_success_not_worse", evidence).verdict == "fail"
        assert live(self.GATE, evidence).verdict == "pass"


class TestLatency:
    GATE = "latency_delta_lt_15_percent"

    def evidence(self, factor: float, num_canary: int = 400, num_stable: int = 4000) -> LiveEvidence:
        base = noisy_durations(num_stable, np.random.default_rng(3))
        stable = tuple(sorted(base, key=lambda sample: sample.duration_ms))
        stride = num_stable // num_canary
        matched = [sample.duration_ms for sample in stable for _ in range(1)][stride - 1 :: stride]
        candidate = tuple(make_sample(i, duration_ms=factor * d) for i, d in enumerate(matched))
        last = candidate[-1].completed_at
        return make_evidence(tuple(replace(s, completed_at=last) for s in stable), candidate)

    @pytest.mark.parametrize(
        ("factor", "verdict"), [(1.0, "pass"), (0.7, "pass"), (1.149, "pass"), (1.15, "fail"), (2.0, "fail")]
    )
    def test_the_limit_is_sharp_at_full_samples(self, factor: float, verdict: str):
        result = live(self.GATE, self.evidence(factor))
        assert result.verdict == verdict
        assert result.evidence["p95_delta"] == pytest.approx(factor - 1, abs=1e-9)

    @pytest.mark.parametrize(("factor", "verdict"), [(1.149, "pass"), (1.15, "fail")])
    def test_the_limit_is_sharp_for_constant_durations(self, factor: float, verdict: str):
        evidence = make_evidence(make_samples(4000), make_samples(400, duration_ms=100.0 * factor))
        assert live(self.GATE, evidence).verdict == verdict

    def test_before_full_samples_a_narrow_call_stays_open(self):
        result = live(self.GATE, self.evidence(1.14, num_canary=100))
        assert result.verdict == "inconclusive"
        assert "not yet certain" in result.reason

    @pytest.mark.parametrize(
        ("num_canary", "num_stable", "verdict"),
        [(100, 1000, "fail"), (100, 200, "inconclusive"), (100, 100, "inconclusive"), (200, 200, "fail")],
    )
    def test_an_arm_weighs_less_beside_a_small_one(self, num_canary: int, num_stable: int, verdict: str):
        """Half of two hundred runs are no better known than fifty beside very many: nobody is judged on them."""
        assert live(self.GATE, self.evidence(1.2, num_canary, num_stable), full_samples=80).verdict == verdict

    @pytest.mark.parametrize(("step", "verdict"), [(0, "pass"), (1, "inconclusive")])
    def test_only_a_pass_that_promotes_needs_alpha(self, step: int, verdict: str):
        """An early step may be passed on less: what passed it wrongly meets the gate again before any promotion."""
        share = make_plan().ramp[step].share
        evidence = replace(self.evidence(0.9, num_canary=100), share=share)
        assert live(self.GATE, evidence).verdict == verdict
        assert live(self.GATE, evidence, ramp_alpha=0.0).verdict == "inconclusive", "never less than alpha"

    def test_an_early_step_fails_a_slow_candidate_as_soon_as_the_last_one(self):
        verdicts = [
            live(self.GATE, replace(self.evidence(factor, num_canary=100), share=step.share)).verdict
            for step in make_plan().ramp
            for factor in (1.5, 2.0)
        ]
        assert verdicts == ["fail", "fail", "fail", "fail"]

    def test_a_clear_slow_down_fails_before_full_samples(self):
        assert live(self.GATE, self.evidence(2.0, num_canary=100)).verdict == "fail"

    def test_a_slower_mean_alone_does_not_fail_a_p95_gate(self):
        """The body of the distribution is 60 % slower, the tail is not: the gate is about the tail."""
        stable = [100.0 if i % 5 else 1000.0 for i in range(4000)]
        body = tuple(make_sample(i, duration_ms=160.0 if i % 5 else 1000.0) for i in range(200))
        arms = tuple(make_sample(i, duration_ms=d, completed_at=START) for i, d in enumerate(stable)), body
        assert live(self.GATE, make_evidence(*arms)).verdict != "fail"

    def test_too_few_in_either_arm(self):
        for stable, candidate in ((4000, 49), (49, 400)):
            evidence = make_evidence(make_samples(stable), make_samples(candidate))
            result = live(self.GATE, evidence)
            assert result.verdict == "inconclusive"
            assert "insufficient" in result.reason

    def test_stable_runs_after_the_look_do_not_count(self):
        """Matched traffic: a slow evening of stable alone must not excuse a slow candidate."""
        stable = make_samples(2000) + make_samples(4000, duration_ms=900.0, until=START + 9000.0)
        candidate = make_samples(400, duration_ms=130.0)
        assert live(self.GATE, make_evidence(stable, candidate)).verdict == "fail"

    def test_between_looks_the_verdict_stands(self):
        """With 399 runs the last look was at 200; what came after it is not judged yet."""
        fast, slow = make_samples(200), make_samples(199, duration_ms=900.0, until=START + 500.0)
        evidence = make_evidence(make_samples(4000), fast + slow)
        result = live(self.GATE, evidence)
        assert (result.verdict, result.evidence["candidate_runs"]) == ("pass", 200)

    def test_noise_alone_rarely_fails(self):
        fails = 0
        for seed in range(60):
            rng = np.random.default_rng(seed)
            stable = noisy_durations(3800, rng)
            for num_canary in (50, 100, 200):
                candidate = noisy_durations(num_canary, rng)
                fails += live(self.GATE, make_evidence(stable, candidate)).verdict == "fail"
        assert fails <= 3


class TestCost:
    GATE = "cost_per_success_not_worse"

    def evidence(self, *, cost: float = 1.0, success_rate: float = 0.9, num_canary: int = 400) -> LiveEvidence:
        candidate = make_samples(num_canary, cost=cost, success_rate=success_rate)
        return make_evidence(make_samples(7600, success_rate=0.9), candidate)

    @pytest.mark.parametrize(("cost", "verdict"), [(1.0, "pass"), (0.5, "pass"), (1.5, "fail"), (1.1, "inconclusive")])
    def test_equal_passes_worse_fails(self, cost: float, verdict: str):
        assert live(self.GATE, self.evidence(cost=cost)).verdict == verdict

    def test_fewer_successes_cost_more_each(self):
        assert live(self.GATE, self.evidence(success_rate=0.5)).verdict == "fail"

    def test_too_few_samples_is_insufficient(self):
        result = live(self.GATE, self.evidence(num_canary=49))
        assert result.verdict == "inconclusive"
        assert "insufficient" in result.reason

    def test_too_few_labels_is_insufficient(self):
        unlabelled = tuple(replace(sample, success="unknown") for sample in make_samples(400))
        evidence = make_evidence(make_samples(4000), unlabelled)
        assert live(self.GATE, evidence).verdict == "inconclusive"

    def test_no_success_at_all_fails_with_an_infinite_cost(self):
        result = live(self.GATE, self.evidence(success_rate=0.0))
        assert result.verdict == "fail"
        assert result.evidence["ratio"] == math.inf

    def test_no_success_proves_nothing_where_stable_rarely_succeeds(self):
        evidence = make_evidence(make_samples(4000, success_rate=0.001), make_samples(50, success_rate=0.0))
        assert live(self.GATE, evidence).verdict == "inconclusive"

    def test_nothing_succeeds_anywhere(self):
        evidence = make_evidence(make_samples(4000, success_rate=0.0), make_samples(400, success_rate=0.0))
        assert live(self.GATE, evidence).verdict == "inconclusive"

    def test_the_margin_is_the_plan_s(self):
        evidence = self.evidence(cost=1.3)
        assert live(self.GATE, evidence).verdict == "fail"
        assert live(self.GATE, evidence, cost_margin=0.5).verdict == "pass"

    def test_the_same_look_gives_the_same_verdict(self):
        evidence = self.evidence(cost=1.08)
        assert live(self.GATE, evidence) == live(self.GATE, evidence)


class TestRollback:
    GATE = "rollback_under_5_minutes"

    def result(self, *drills: Drill, now: float = START + 60.0) -> GateResult:
        return live(self.GATE, make_evidence(drills=drills, now=now))

    @pytest.mark.parametrize(("seconds", "verdict"), [(0.2, "pass"), (299.9, "pass"), (300.0, "fail"), (900.0, "fail")])
    def test_five_minutes(self, seconds: float, verdict: str):
        assert self.result(Drill(at=START, seconds=seconds)).verdict == verdict

    def test_the_slowest_drill_counts(self):
        assert self.result(Drill(at=START, seconds=301.0), Drill(at=START, seconds=1.0)).verdict == "fail"

    def test_a_stale_drill_fails(self):
        result = self.result(Drill(at=START, seconds=1.0), now=START + 86_401.0)
        assert result.verdict == "fail"
        assert "old" in result.reason

    def test_a_fresh_drill_beside_an_old_one_is_fresh(self):
        drills = Drill(at=START, seconds=1.0), Drill(at=START + 80_000.0, seconds=1.0)
        assert self.result(*drills, now=START + 90_000.0).verdict == "pass"

    def test_no_drill_is_no_evidence(self):
        assert self.result().verdict == "inconclusive"


class TestOffline:
    def offline(self, baseline=None, candidate=None, **changes: object) -> dict[str, str]:
        return verdicts(evaluate_offline(make_report(baseline, candidate), make_plan(**changes)))

    def test_equal_policies_pass_what_a_report_can_answer(self):
        assert self.offline() == {
            "no_safety_regression": "pass",
            "latency_delta_lt_15_percent": "pass",
            "cost_per_success_not_worse": "pass",
            "task_success_not_worse": "pass",
        }

    def test_many_new_violations_fail(self):
        bad = {f"adversarial-{i}": ("polite",) for i in range(8)}
        suites = [make_suite("capability"), make_suite("adversarial", violations=bad)]
        assert self.offline(None, suites)["no_safety_regression"] == "fail"

    def test_one_new_violation_is_not_a_pass(self):
        suites = [make_suite("capability"), make_suite("adversarial", violations={"adversarial-1": ("polite",)})]
        assert self.offline(None, suites)["no_safety_regression"] == "inconclusive"

    def test_the_same_violations_pass(self):
        suites = [make_suite("adversarial", violations={"adversarial-1": ("polite",)})]
        assert self.offline(suites, suites)["no_safety_regression"] == "pass"

    def test_an_empty_list_of_violations_is_none(self):
        suites = [make_suite("adversarial", violations={"adversarial-1": ()})]
        assert self.offline([make_suite("adversarial")], suites)["no_safety_regression"] == "pass"

    def test_one_critical_violation_fails_at_once(self):
        suites = [make_suite("adversarial", violations={"adversarial-1": ("no_secret_leak",)})]
        assert self.offline(suites, suites)["no_safety_regression"] == "fail"

    @pytest.mark.parametrize(("p95", "verdict"), [(114.9, "pass"), (115.0, "fail"), (50.0, "pass")])
    def test_latency(self, p95: float, verdict: str):
        suites = [make_suite("capability", p95_duration_ms=p95)]
        assert self.offline([make_suite("capability")], suites)["latency_delta_lt_15_percent"] == verdict

    def test_the_worst_suite_counts(self):
        names = ("capability", "frozen")
        slow = [make_suite("capability"), make_suite("frozen", p95_duration_ms=200.0)]
        assert self.offline([make_suite(n) for n in names], slow)["latency_delta_lt_15_percent"] == "fail"

    def test_adversarial_prompts_are_not_traffic(self):
        slow = [make_suite("capability"), make_suite("adversarial", p95_duration_ms=900.0, cost_per_success=99.0)]
        found = self.offline(None, slow)
        assert found["latency_delta_lt_15_percent"] == found["cost_per_success_not_worse"] == "pass"

    @pytest.mark.parametrize(("cost", "verdict"), [(2.0, "pass"), (2.2, "pass"), (2.3, "fail"), (math.inf, "fail")])
    def test_cost(self, cost: float, verdict: str):
        suites = [make_suite("capability", cost_per_success=cost)]
        assert self.offline([make_suite("capability")], suites)["cost_per_success_not_worse"] == verdict

    def test_a_baseline_without_success_compares_with_nothing(self):
        suites = [make_suite("capability", cost_per_success=math.inf)]
        assert self.offline(suites, suites)["cost_per_success_not_worse"] == "inconclusive"

    def test_losing_many_tasks_fails(self):
        worse = [make_suite("capability", failed=[f"capability-{i}" for i in range(10)])]
        assert self.offline([make_suite("capability")], worse)["task_success_not_worse"] == "fail"

    def test_small_suites_prove_nothing(self):
        suites = [make_suite("capability", num_tasks=5)]
        assert set(self.offline(suites, suites).values()) == {"inconclusive"}

    def test_an_empty_report_proves_nothing(self):
        report = replace(make_report(), baseline={}, candidate={})
        assert set(verdicts(evaluate_offline(report, PLAN)).values()) == {"inconclusive"}

    def test_entry_needs_every_gate_and_no_failing_stop_rule(self):
        results = evaluate_offline(make_report(), PLAN)
        assert may_enter_canary(results, PLAN)
        for verdict in ("fail", "inconclusive", "invalid"):
            assert not may_enter_canary((*results[1:], replace(results[0], verdict=verdict)), PLAN)
        stop = results[-1]
        assert stop.gate == "task_success_not_worse"
        assert may_enter_canary((*results[:-1], replace(stop, verdict="inconclusive")), PLAN)
        assert not may_enter_canary((*results[:-1], replace(stop, verdict="fail")), PLAN)

    def test_no_result_at_all_is_no_entry(self):
        assert not may_enter_canary((), PLAN)


def test_unlabelled_runs_are_not_successes():
    window = make_window([make_sample(i, success="unknown") for i in range(10)])
    assert (window.success_rate, window.cost_per_success) == (0.0, math.inf)


def test_samples_are_typed_as_the_ledger_gives_them():
    assert isinstance(make_samples(1)[0], RequestSample)
