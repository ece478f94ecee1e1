"""The state machine: every state with every kind of verdict, and no path to promotion without evidence."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_actors.contracts.errors import BadInputError
from serving.contracts.gates import ARTICLE_GATES, GateResult, Verdict
from serving.contracts.release import (
    Advance,
    Canary,
    Decision,
    Drilling,
    FailedBack,
    Halt,
    Halted,
    Hold,
    Preparing,
    Promote,
    Promoted,
    Promoting,
    RampStep,
    ReleaseState,
    Restoring,
    RollBack,
    RolledBack,
)
from serving.release.state_machine import (
    ACKNOWLEDGED,
    ENOUGH_TRAFFIC,
    HEALTHY,
    TERMINAL,
    decide,
    desired_split,
    next_state,
    traffic_result,
)
from tests.serving.fakes import RELEASE, START, make_plan

PLAN = make_plan()
FIRST = Canary(step=0, epoch=2, step_started_at=START, release_started_at=START)
LAST = Canary(step=1, epoch=3, step_started_at=START, release_started_at=START)
RESTORING = Restoring(ending="rolled_back", reason="bad", detected_at=START, epoch=3)
STATES: tuple[ReleaseState, ...] = (
    Preparing(epoch=0),
    Drilling(started_at=START, epoch=1),
    FIRST,
    LAST,
    Promoting(decided_at=START, epoch=4),
    RESTORING,
    Promoted(at=START, epoch=4),
    RolledBack(reason="bad", time_to_recovery_s=1.0),
    FailedBack(reason="bad", time_to_recovery_s=1.0),
    Halted(reason="broken"),
)
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


def result(gate: str, verdict: Verdict) -> GateResult:
    return GateResult(gate=gate, verdict=verdict, evidence={"n": 1.0}, reason=f"{gate} is {verdict}")


def results(**changed: Any) -> tuple[GateResult, ...]:
    """All pass, but for what is named."""
    names = (HEALTHY, ACKNOWLEDGED, ENOUGH_TRAFFIC, *ARTICLE_GATES, "task_success_not_worse")
    return tuple(result(name, changed.get(name, "pass")) for name in names)


def test_every_kind_of_state_is_covered():
    assert {type(state) for state in STATES} == set(get_args(ReleaseState))


class TestCanary:
    def test_all_pass_goes_on_to_the_next_share(self):
        decision = decide(FIRST, results(), PLAN, START)
        assert isinstance(decision, Advance)
        assert "25%" in decision.reason

    def test_all_pass_at_the_last_step_promotes(self):
        assert isinstance(decide(LAST, results(), PLAN, START), Promote)

    def test_a_drill_never_promotes(self):
        decision = decide(LAST, results(), make_plan(may_promote=False), START)
        assert isinstance(decision, RollBack)
        assert "drill" in decision.reason

    @pytest.mark.parametrize("gate", [*ARTICLE_GATES, "task_success_not_worse", HEALTHY])
    @pytest.mark.parametrize("state", [FIRST, LAST])
    def test_any_fail_rolls_back(self, gate: str, state: Canary):
        decision = decide(state, results(**{gate: "fail"}), PLAN, START)
        assert isinstance(decision, RollBack)
        assert f"{gate}: {gate} is fail" in decision.reason

    @pytest.mark.parametrize("gate", [*ARTICLE_GATES, ENOUGH_TRAFFIC])
    def test_any_inconclusive_gate_holds(self, gate: str):
        decision = decide(LAST, results(**{gate: "inconclusive"}), PLAN, START)
        assert isinstance(decision, Hold)
        assert gate in decision.reason

    @pytest.mark.parametrize("gate", [*ARTICLE_GATES, ENOUGH_TRAFFIC])
    def test_a_missing_gate_is_no_pass(self, gate: str):
        found = tuple(entry for entry in results() if entry.gate != gate)
        assert isinstance(decide(LAST, found, PLAN, START), Hold)

    def test_no_result_at_all_holds(self):
        assert isinstance(decide(LAST, (), PLAN, START), Hold)

    def test_a_stop_rule_need_not_pass(self):
        assert isinstance(decide(LAST, results(task_success_not_worse="inconclusive"), PLAN, START), Promote)

    def test_an_invalid_comparison_halts(self):
        decision = decide(LAST, results(no_safety_regression="invalid"), PLAN, START)
        assert isinstance(decision, Halt)

    def test_a_fail_outranks_an_invalid(self):
        found = results(no_safety_regression="fail", latency_delta_lt_15_percent="invalid")
        assert isinstance(decide(LAST, found, PLAN, START), RollBack)

    def test_a_decision_carries_all_its_evidence(self):
        for changed in ({}, {ARTICLE_GATES[0]: "fail"}, {ARTICLE_GATES[0]: "inconclusive"}):
            decision = decide(LAST, results(**changed), PLAN, START)
            assert decision.evidence == results(**changed)
            assert decision.reason

    @pytest.mark.parametrize(("waited", "kind"), [(600.0, Hold), (600.1, RollBack)])
    def test_the_wait_of_a_step_is_bounded(self, waited: float, kind: type):
        decision = decide(FIRST, results(no_safety_regression="inconclusive"), PLAN, START + waited)
        assert isinstance(decision, kind)
        if kind is RollBack:
            assert "no evidence within step 1: 600 s" in decision.reason
            assert "no_safety_regression" in decision.reason

    @pytest.mark.parametrize(("waited", "kind"), [(3600.0, Hold), (3600.1, RollBack)])
    def test_the_wait_of_a_release_is_bounded(self, waited: float, kind: type):
        now = START + waited
        state = Canary(step=1, epoch=3, step_started_at=now, release_started_at=START)
        decision = decide(state, results(enough_traffic="inconclusive"), PLAN, now)
        assert isinstance(decision, kind)

    def test_evidence_that_arrives_at_the_last_moment_counts(self):
        assert isinstance(decide(LAST, results(), PLAN, START + 10_000), Promote)


class TestWaitingStates:
    @pytest.mark.parametrize("state", [Drilling(started_at=START, epoch=1), Promoting(decided_at=START, epoch=4)])
    def test_acknowledgement_moves_on(self, state: ReleaseState):
        assert isinstance(decide(state, results(), PLAN, START), Advance)
        assert isinstance(decide(state, results(split_acknowledged="inconclusive"), PLAN, START + 300), Hold)

    @pytest.mark.parametrize("state", [Drilling(started_at=START, epoch=1), Promoting(decided_at=START, epoch=4)])
    def test_silence_and_sickness_roll_back(self, state: ReleaseState):
        silent = decide(state, results(split_acknowledged="inconclusive"), PLAN, START + 300.1)
        assert isinstance(silent, RollBack)
        assert "not acknowledged within 300 s" in silent.reason
        assert isinstance(decide(state, results(candidate_healthy="fail"), PLAN, START), RollBack)

    def test_preparing_goes_to_the_drill_unless_the_candidate_is_sick(self):
        assert isinstance(decide(Preparing(epoch=0), (result(HEALTHY, "pass"),), PLAN, START), Advance)
        assert isinstance(decide(Preparing(epoch=0), (result(HEALTHY, "fail"),), PLAN, START), RollBack)

    def test_nothing_turns_a_roll_back_around(self):
        """Passing gates, failing gates, a healthy candidate: only acknowledgement counts."""
        for verdict in VERDICTS:
            found = (*(result(gate, verdict) for gate in ARTICLE_GATES), result(ACKNOWLEDGED, "inconclusive"))
            assert isinstance(decide(RESTORING, found, PLAN, START), Hold)
        assert isinstance(decide(RESTORING, results(no_safety_regression="fail"), PLAN, START), Advance)

    def test_a_roll_back_nobody_acknowledges_calls_a_human(self):
        decision = decide(RESTORING, (result(ACKNOWLEDGED, "inconclusive"),), PLAN, START + 300.1)
        assert isinstance(decision, Halt)

    @pytest.mark.parametrize("state", [state for state in STATES if isinstance(state, TERMINAL)])
    def test_an_ended_release_holds_whatever_comes(self, state: ReleaseState):
        for verdict in VERDICTS:
            assert isinstance(decide(state, results(no_safety_regression=verdict), PLAN, START + 1e9), Hold)


class TestNextState:
    def advance(self, state: ReleaseState, now: float = START + 7) -> ReleaseState:
        return next_state(state, Advance(reason="r", evidence=()), now)

    def test_the_way_up(self):
        state = self.advance(Preparing(epoch=4))
        assert state == Drilling(started_at=START + 7, epoch=5)
        state = self.advance(state, START + 9)
        assert state == Canary(step=0, epoch=6, step_started_at=START + 9, release_started_at=START + 9)
        state = self.advance(state, START + 20)
        assert state == Canary(step=1, epoch=7, step_started_at=START + 20, release_started_at=START + 9)
        state = next_state(state, Promote(reason="r", evidence=()), START + 30)
        assert state == Promoting(decided_at=START + 30, epoch=8)
        assert self.advance(state, START + 31) == Promoted(at=START + 31, epoch=8)

    @pytest.mark.parametrize("state", STATES[:5])
    @pytest.mark.parametrize(("decision", "ending"), [(RollBack, "rolled_back"), (Halt, "halted")])
    def test_the_way_back(self, state: ReleaseState, decision: type, ending: str):
        after = next_state(state, decision(reason="bad", evidence=()), START + 5)
        assert isinstance(after, Restoring)
        assert (after.ending, after.reason, after.detected_at) == (ending, "bad", START + 5)
        assert after.epoch == state.epoch + 1  # pyright: ignore[reportAttributeAccessIssue]

    def test_a_promoted_release_fails_back(self):
        after = next_state(Promoted(at=START, epoch=4), RollBack(reason="bad", evidence=()), START + 5)
        assert after == Restoring(ending="failed_back", reason="bad", detected_at=START + 5, epoch=5)

    @pytest.mark.parametrize(("ending", "kind"), [("rolled_back", RolledBack), ("failed_back", FailedBack)])
    def test_time_to_recovery_runs_from_detection_to_acknowledgement(self, ending, kind: type):
        state = Restoring(ending=ending, reason="bad", detected_at=START, epoch=3)
        assert self.advance(state, START + 12.5) == kind(reason="bad", time_to_recovery_s=12.5)

    def test_a_halt_ends_halted(self):
        state = Restoring(ending="halted", reason="broken", detected_at=START, epoch=3)
        assert self.advance(state) == Halted(reason="broken")
        silent = next_state(RESTORING, Halt(reason="no answer", evidence=()), START)
        assert silent == Halted(reason="bad; no answer")

    @pytest.mark.parametrize("state", STATES)
    def test_hold_changes_nothing(self, state: ReleaseState):
        assert next_state(state, Hold(reason="r", evidence=()), START + 99) is state

    @pytest.mark.parametrize("state", [state for state in STATES if not isinstance(state, Canary)])
    def test_only_a_canary_is_promoted(self, state: ReleaseState):
        with pytest.raises(ValueError, match="Promote is not allowed"):
            next_state(state, Promote(reason="r", evidence=()), START)

    @pytest.mark.parametrize("state", [state for state in STATES if isinstance(state, TERMINAL)])
    def test_an_ended_release_does_not_advance(self, state: ReleaseState):
        with pytest.raises(ValueError, match="Advance is not allowed"):
            self.advance(state)

    @pytest.mark.parametrize("state", [*STATES[7:], RESTORING])
    def test_what_is_rolled_back_is_not_rolled_back_again(self, state: ReleaseState):
        with pytest.raises(ValueError, match="RollBack is not allowed"):
            next_state(state, RollBack(reason="r", evidence=()), START)


class TestWholeMachine:
    @settings(max_examples=300, deadline=None)
    @given(
        state=st.sampled_from(STATES),
        verdicts=st.lists(st.sampled_from(VERDICTS), min_size=8, max_size=8),
        dropped=st.sets(st.integers(0, 7)),
        waited=st.sampled_from([0.0, 299.0, 301.0, 601.0, 4000.0]),
    )
    def test_every_decision_can_be_followed(self, state, verdicts, dropped, waited: float):
        names = (HEALTHY, ACKNOWLEDGED, ENOUGH_TRAFFIC, *ARTICLE_GATES, "task_success_not_worse")
        pairs = [pair for index, pair in enumerate(zip(names, verdicts, strict=True)) if index not in dropped]
        found = tuple(result(name, verdict) for name, verdict in pairs)
        decision = decide(state, found, PLAN, START + waited)
        after = next_state(state, decision, START + waited)
        assert isinstance(decision, get_args(Decision))
        if isinstance(state, Canary) and isinstance(after, Promoting):
            assert {pair for pair in pairs if pair[0] in ARTICLE_GATES} == {(gate, "pass") for gate in ARTICLE_GATES}
            assert all(verdict not in {"fail", "invalid"} for _, verdict in pairs)
        if isinstance(state, Restoring):
            assert isinstance(after, Restoring | RolledBack | FailedBack | Halted)

    def test_promotion_needs_every_single_gate(self):
        """All 4^4 combinations: exactly one of them promotes."""
        promoted = [
            combination
            for combination in itertools.product(VERDICTS, repeat=4)
            if isinstance(
                decide(LAST, results(**dict(zip(ARTICLE_GATES, combination, strict=True))), PLAN, START), Promote
            )
        ]
        assert promoted == [("pass",) * 4]

    def test_with_silence_every_start_ends_in_bounded_time(self):
        """No evidence, no acknowledgement, no human: every state still reaches an end."""
        for start in STATES:
            state, now = start, START
            for _ in range(3000):
                state = next_state(state, decide(state, (), PLAN, now), now)
                now += 5.0
            assert isinstance(state, TERMINAL), start


class TestTraffic:
    @pytest.mark.parametrize(
        ("runs", "verdict"), [(0, "inconclusive"), (49, "inconclusive"), (50, "pass"), (51, "pass")]
    )
    def test_enough_candidate_runs(self, runs: int, verdict: str):
        assert traffic_result(runs, 50).verdict == verdict


class TestDesiredSplit:
    def split(self, state: ReleaseState):
        record = desired_split(state, RELEASE, PLAN, START)
        return record and (record.epoch, record.stable, record.candidate, record.share)

    def test_what_each_state_asks_for(self):
        assert [self.split(state) for state in STATES] == [
            None,
            (1, "sft-a", "ppo-b", 0.0),
            (2, "sft-a", "ppo-b", 0.05),
            (3, "sft-a", "ppo-b", 0.25),
            (4, "ppo-b", "", 0.0),
            (3, "sft-a", "", 0.0),
            (4, "ppo-b", "", 0.0),
            None,
            None,
            None,
        ]

    def test_the_salt_is_the_release_s(self):
        record = desired_split(FIRST, RELEASE, PLAN, START)
        assert record is not None
        assert (record.salt, record.updated_at) == ("release-1", START)


class TestPlan:
    @pytest.mark.parametrize("change", [{"gates": ()}, {"stop_rules": ()}])
    def test_a_canary_without_rules_is_refused(self, change: dict[str, object]):
        with pytest.raises(BadInputError, match="only with gates and stop rules"):
            make_plan(**change)

    @pytest.mark.parametrize("shares", [(), (0.0,), (1.0,), (0.05, 0.05), (0.25, 0.05), (-0.1, 0.5), (0.5, 1.2)])
    def test_a_ramp_that_does_not_rise_is_refused(self, shares: tuple[float, ...]):
        ramp = tuple(RampStep(share=share, min_requests=1, max_duration_s=1.0) for share in shares)
        with pytest.raises(BadInputError, match=r"plan\.ramp"):
            make_plan(ramp=ramp)

    @pytest.mark.parametrize("change", [{"alpha": 0.0}, {"alpha": 0.5}, {"min_samples": 1}])
    def test_statistics_without_meaning_are_refused(self, change: dict[str, object]):
        with pytest.raises(BadInputError, match=r"plan\.alpha"):
            make_plan(**change)

    def test_alpha_is_shared_by_the_rules(self):
        assert make_plan().alpha_per_rule == pytest.approx(0.05 / 5)
        assert make_plan(stop_rules=("no_safety_regression",)).alpha_per_rule == pytest.approx(0.05 / 4)
