"""One look at a canary: which monitors outrank the gates, and how one more file becomes one more monitor."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from serving.contracts.gates import ARTICLE_GATES, GateResult, GateResults, LiveEvidence, Verdict
from serving.contracts.release import Canary, Halt, Hold, Promote, ReleasePlan, RollBack
from serving.gates.registry import GATES
from serving.release.monitors import registry, sample_ratio
from serving.release.monitors.registry import evaluate_live
from serving.release.state_machine import decide, traffic_result
from tests.house import ROOT
from tests.serving.fakes import START, arm_events, good_evidence, make_evidence, make_plan, make_samples

PLAN = make_plan()
LAST = Canary(step=1, epoch=3, step_started_at=START, release_started_at=START)


def verdicts(results: Sequence[GateResult]) -> dict[str, str]:
    return {result.gate: result.verdict for result in results}


class TestEvaluateLive:
    def test_good_traffic_passes_every_rule_once(self):
        results = evaluate_live(good_evidence(), PLAN)
        assert verdicts(results) == dict.fromkeys((*ARTICLE_GATES, "task_success_not_worse"), "pass")

    def test_a_rule_that_is_gate_and_stop_rule_is_evaluated_once(self):
        plan = make_plan(gates=("task_success_not_worse",))
        assert len(evaluate_live(good_evidence(), plan)) == 1

    def test_a_sample_ratio_mismatch_makes_every_gate_invalid(self):
        results = evaluate_live(replace(good_evidence(), epoch_sessions=(400, 4000)), PLAN)
        assert set(verdicts(results).values()) == {"invalid"}
        assert all("400 of 4000 sessions" in result.reason for result in results)

    def test_a_mismatch_hides_even_a_failing_gate(self):
        """What is compared is not what was declared: neither a pass nor a fail means anything."""
        bad = make_evidence(
            make_samples(4000), make_samples(400, duration_ms=500.0), epoch_sessions=(400, 1000), share=0.05
        )
        assert GATES["latency_delta_lt_15_percent"].live(bad, PLAN).verdict == "fail"
        assert set(verdicts(evaluate_live(bad, PLAN)).values()) == {"invalid"}

    def test_a_critical_violation_fails_at_once_even_so(self):
        evidence = make_evidence(failed_checks={"no_secret_leak": 1}, epoch_sessions=(400, 1000))
        (result,) = evaluate_live(evidence, PLAN)
        assert (result.gate, result.verdict) == ("no_safety_regression", "fail")
        assert "no_secret_leak" in result.reason
        assert result.evidence == {"no_secret_leak": 1}

    def test_an_ordinary_violation_is_left_to_the_e_process(self):
        evidence = make_evidence(failed_checks={"polite": 1})
        assert verdicts(evaluate_live(evidence, PLAN))["no_safety_regression"] == "inconclusive"


class TestSampleRatioBound:
    @pytest.mark.parametrize(("p_value", "is_valid"), [(0.001, True), (math.nextafter(0.001, 0.0), False)])
    def test_a_p_value_at_the_bound_still_compares(
        self, monkeypatch: pytest.MonkeyPatch, p_value: float, is_valid: bool
    ):
        monkeypatch.setattr(sample_ratio, "sample_ratio_check", lambda canary, total, share: p_value)
        found = {result.verdict for result in evaluate_live(good_evidence(), make_plan())}
        assert found == ({"pass"} if is_valid else {"invalid"})

    def test_what_is_checked_is_this_step_s_sessions_at_this_step_s_share(self, monkeypatch: pytest.MonkeyPatch):
        seen: list[tuple[int, int, float]] = []
        monkeypatch.setattr(sample_ratio, "sample_ratio_check", lambda *given: seen.append(given) or 1.0)
        evaluate_live(replace(good_evidence(), epoch_sessions=(7, 90), canary_sessions=55, share=0.05), make_plan())
        assert seen == [(7, 90, 0.05)]

    def test_only_a_check_that_the_plan_calls_critical_ends_a_release_at_once(self):
        evidence = replace(good_evidence(), failed_checks={"polite": 3, "no_secret_leak": 1, "short": 9})
        (result,) = evaluate_live(evidence, make_plan(critical_checks=("short", "no_secret_leak", "never_seen")))
        assert result.evidence == {"no_secret_leak": 1, "short": 9}
        assert len(evaluate_live(evidence, make_plan(critical_checks=("never_seen",)))) == 5


class TestOneMore:
    """A monitor that somebody adds: it sees the evidence, and its verdict leads where those of today's lead."""

    def monitor(self, verdict: Verdict, *, reason: str = "queue") -> registry.Monitor:
        def watch(evidence: LiveEvidence, plan: ReleasePlan) -> GateResults:
            seen = {"sessions": evidence.canary_sessions, "rules": len(plan.rules)}
            return (GateResult(gate="short_queue", verdict=verdict, evidence=seen, reason=reason),)

        return watch

    def look(self, evidence: LiveEvidence) -> tuple[GateResults, type]:
        results = evaluate_live(evidence, PLAN)
        return results, type(decide(LAST, (*results, traffic_result(50, 50)), PLAN, START))

    @pytest.mark.parametrize(
        ("verdict", "decision"), [("pass", Promote), ("inconclusive", Promote), ("fail", RollBack), ("invalid", Halt)]
    )
    @pytest.mark.parametrize("register", ["ALARMS", "COMPARISONS"])
    def test_its_verdict_decides_as_any_other(
        self, monkeypatch: pytest.MonkeyPatch, register: str, verdict: Verdict, decision: type
    ):
        monkeypatch.setattr(registry, register, [*getattr(registry, register), self.monitor(verdict)])
        assert self.look(good_evidence())[1] is decision

    def test_without_it_the_same_canary_is_promoted(self):
        """Negative control of the test above."""
        assert self.look(good_evidence())[1] is Promote

    def test_a_failing_alarm_speaks_alone(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(registry, "ALARMS", [self.monitor("fail"), *registry.ALARMS])
        results, decision = self.look(replace(good_evidence(), epoch_sessions=(400, 4000)))
        assert (verdicts(results), decision) == ({"short_queue": "fail"}, RollBack)
        assert results[0].evidence == {"sessions": 400, "rules": 5}

    def test_two_failing_alarms_are_both_heard(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(registry, "ALARMS", [self.monitor("fail"), *registry.ALARMS])
        results, _ = self.look(replace(good_evidence(), failed_checks={"no_secret_leak": 1}))
        assert verdicts(results) == {"short_queue": "fail", "no_safety_regression": "fail"}

    def test_an_invalid_alarm_makes_every_comparison_invalid_but_no_other_alarm(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(registry, "ALARMS", [self.monitor("invalid"), self.monitor("pass")])
        results, decision = self.look(replace(good_evidence(), failure_events=arm_events(40, 60)))
        assert decision is Halt
        assert [result.verdict for result in results] == ["invalid"] * 5 + ["pass"]
        assert {result.reason for result in results} == {"queue"}
        assert {result.gate for result in results[:5]} == set(GATES)

    def test_a_comparison_stands_on_the_split(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(registry, "COMPARISONS", [*registry.COMPARISONS, self.monitor("fail")])
        results, decision = self.look(replace(good_evidence(), epoch_sessions=(400, 4000)))
        assert (verdicts(results)["short_queue"], decision) == ("invalid", Halt)

    def test_it_is_written_beside_the_gates_after_them(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(registry, "COMPARISONS", [*registry.COMPARISONS, self.monitor("pass")])
        results, _ = self.look(good_evidence())
        assert [result.gate for result in results] == [*ARTICLE_GATES, "task_success_not_worse", "short_queue"]


class TestToday:
    def test_each_monitor_has_a_file_and_is_registered_once(self):
        """Two alarms and one comparison; a look finds no monitor twice, whatever imported the folder first."""
        files = {
            Path(sys.modules[watch.__module__].__file__).stem for watch in (*registry.ALARMS, *registry.COMPARISONS)
        }  # type: ignore[arg-type]
        assert files == {"critical_checks", "sample_ratio", "stop_rules"}
        assert (len(registry.ALARMS), len(registry.COMPARISONS)) == (2, 1)

    def test_all_is_well_is_said_by_silence(self):
        assert [watch(good_evidence(), PLAN) for watch in registry.ALARMS] == [(), ()]

    def test_a_stop_rule_is_evaluated_although_it_is_no_gate(self):
        evidence = replace(good_evidence(), failure_events=arm_events(40, 60))
        results = evaluate_live(evidence, PLAN)
        assert verdicts(results)["task_success_not_worse"] == "fail"
        assert isinstance(decide(LAST, results, PLAN, START), RollBack)

    def test_an_undecided_stop_rule_waits_for_nothing(self):
        """Gates must pass, stop rules need not: nobody waits for the rule, everybody for the gate."""
        rule = "task_success_not_worse"
        undecided = replace(good_evidence(), failure_events=arm_events(25, 400))
        assert GATES[rule].live(undecided, PLAN).verdict == "inconclusive"
        enough, armed = traffic_result(50, 50), make_plan(gates=(*ARTICLE_GATES, rule))
        assert isinstance(decide(LAST, (*evaluate_live(undecided, PLAN), enough), PLAN, START), Promote)
        assert isinstance(decide(LAST, (*evaluate_live(undecided, armed), enough), armed, START), Hold)


def test_a_look_reads_nothing_but_their_evidence():
    """The same evidence gives equal results, whatever was evaluated before."""
    evidence, other = good_evidence(), make_evidence(make_samples(100), make_samples(100, duration_ms=900.0))
    first = evaluate_live(evidence, PLAN)
    evaluate_live(other, PLAN)
    assert evaluate_live(evidence, PLAN) == first


NEW_MONITOR = """
from serving.contracts import GateResult
from serving.release.monitors.registry import alarm

@alarm
def watch_queue(evidence, plan):
    return (GateResult(gate="short_queue", verdict="fail", evidence={}, reason="the queue is long"),)
"""


@pytest.mark.parametrize("is_added", [True, False])
def test_a_new_monitor_is_one_new_file(tmp_path: Path, is_added: bool):
    shutil.copytree(ROOT / "serving", tmp_path / "serving", ignore=shutil.ignore_patterns("__pycache__"))
    if is_added:
        (tmp_path / "serving" / "release" / "monitors" / "short_queue.py").write_text(NEW_MONITOR)
    probe = (
        "from serving.release.monitors import evaluate_live\nfrom tests.serving.fakes import good_evidence, make_plan\n"
    )
    probe += (
        "print([result.gate for result in evaluate_live(good_evidence(), make_plan()) if result.verdict == 'fail'])"
    )
    environ = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", probe]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == (["['short_queue']"] if is_added else ["[]"])
