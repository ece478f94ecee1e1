"""What holds along every path of a release: epochs, shares, clocks that jump, and values that are no state at all."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.contracts.gates import ARTICLE_GATES, GateResult, Verdict
from serving.contracts.release import (
    Advance,
    Canary,
    Drilling,
    Ending,
    FailedBack,
    Halt,
    Halted,
    Hold,
    Preparing,
    Promoted,
    Promoting,
    RampStep,
    ReleasePlan,
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
)
from tests.serving.fakes import RELEASE, START, make_plan

NAMES = (HEALTHY, ACKNOWLEDGED, ENOUGH_TRAFFIC, *ARTICLE_GATES, "task_success_not_worse")
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
RAMP = tuple(RampStep(share=share, min_requests=1, max_duration_s=60.0) for share in (0.01, 0.1, 0.3, 0.5))
PLAN = make_plan(ramp=RAMP, max_duration_s=400.0)
RESTORING = Restoring(ending="rolled_back", reason="bad", detected_at=START, epoch=3)
WAITING: tuple[ReleaseState, ...] = (
    Drilling(started_at=START, epoch=1),
    Canary(step=1, epoch=3, step_started_at=START, release_started_at=START),
    Promoting(decided_at=START, epoch=4),
    RESTORING,
)
Look = tuple[Verdict, ...]
GOOD: Look = tuple("pass" for _ in NAMES)
LOOKS = st.lists(st.tuples(*[st.sampled_from(VERDICTS) for _ in NAMES]), max_size=25)
MOSTLY_GOOD = st.lists(
    st.tuples(*[st.sampled_from(("pass", "pass", "pass", "pass", "pass", "inconclusive")) for _ in NAMES]), max_size=25
)


def found(look: Look) -> tuple[GateResult, ...]:
    return tuple(
        GateResult(gate=name, verdict=verdict, evidence={}, reason=verdict)
        for name, verdict in zip(NAMES, look, strict=True)
    )


def walk(looks: list[Look], plan: ReleasePlan = PLAN, tick_s: float = 5.0) -> list[ReleaseState]:
    """Every state a release goes through, from nothing, one look per tick."""
    states: list[ReleaseState] = [Preparing(epoch=7)]
    for number, look in enumerate(looks):
        now = START + number * tick_s
        states.append(next_state(states[-1], decide(states[-1], found(look), plan, now), now))
    return states


def splits(states: list[ReleaseState]) -> list[tuple[int, str, float]]:
    records = [desired_split(state, RELEASE, PLAN, START) for state in states]
    return [(record.epoch, record.stable, record.share) for record in records if record is not None]


class TestAlongEveryPath:
    @settings(max_examples=200, deadline=None)
    @given(LOOKS | MOSTLY_GOOD)
    def test_an_epoch_names_one_split_and_never_comes_back(self, looks: list[Look]):
        """A gateway that acknowledged epoch n did so for one record: two records of one epoch would be a lie."""
        seen = splits(walk(looks))
        epochs = [epoch for epoch, _, _ in seen]
        assert epochs == sorted(epochs)
        assert len(set(seen)) == len(set(epochs))
        assert set(epochs) == set(range(8, 8 + len(set(epochs))))

    @settings(max_examples=200, deadline=None)
    @given(LOOKS | MOSTLY_GOOD)
    def test_the_share_climbs_one_step_at_a_time_or_falls_to_nothing(self, looks: list[Look]):
        ladder = [0.0, *(step.share for step in RAMP)]
        shares = [share for _, _, share in splits(walk(looks))]
        for before, after in itertools.pairwise(shares):
            assert after in {0.0, before} or ladder.index(after) == ladder.index(before) + 1

    @settings(max_examples=200, deadline=None)
    @given(LOOKS | MOSTLY_GOOD)
    def test_whoever_left_never_returns(self, looks: list[Look]):
        """From the first roll back on, and after the end, no verdict moves a release towards the candidate again."""
        states = walk(looks)
        for index, state in enumerate(states):
            if isinstance(state, Restoring):
                assert all(isinstance(later, Restoring | RolledBack | Halted) for later in states[index:])
            if isinstance(state, TERMINAL):
                assert set(states[index:]) == {state}

    def test_the_straight_way_up_takes_every_step_once(self):
        states = walk([GOOD] * 8)
        kinds = [type(state).__name__ for state in states]
        assert kinds == ["Preparing", "Drilling", *["Canary"] * 4, "Promoting", "Promoted", "Promoted"]
        assert splits(states)[:6] == [
            (8, "sft-a", 0.0), (9, "sft-a", 0.01), (10, "sft-a", 0.1), (11, "sft-a", 0.3), (12, "sft-a", 0.5),
            (13, "ppo-b", 0.0),
        ]  # fmt: skip

    @settings(max_examples=100, deadline=None)
    @given(LOOKS)
    def test_the_same_looks_at_the_same_times_give_the_same_release(self, looks: list[Look]):
        assert walk(looks) == walk(looks)

    def test_a_new_step_starts_its_own_wait_but_not_a_new_release(self):
        """Four steps of 60 s at most may not add up to more than the plan's bound for the whole release."""
        plan = make_plan(ramp=RAMP, max_duration_s=100.0)
        silent: Look = ("pass", "pass", "inconclusive", "pass", "pass", "pass", "pass", "pass")
        looks = [GOOD, GOOD, *[silent] * 11, GOOD, *[silent] * 20]
        states = walk(looks, plan)
        canaries = [state for state in states if isinstance(state, Canary)]
        assert {state.step for state in canaries} == {0, 1}
        assert {state.release_started_at for state in canaries} == {START + 5.0}
        ended = next(state for state in states if isinstance(state, Restoring))
        assert ended.detected_at - START == 110.0
        assert "100 s" in ended.reason


class TestClocks:
    @pytest.mark.parametrize("state", WAITING)
    @pytest.mark.parametrize("jump_s", [-1.0, -3600.0, -1e9])
    def test_a_clock_that_jumps_back_ends_nothing(self, state: ReleaseState, jump_s: float):
        """A wait is over when its time has passed, not when the clock looks strange."""
        assert isinstance(decide(state, (), PLAN, START + jump_s), Hold)

    @pytest.mark.parametrize("state", WAITING)
    def test_a_clock_that_jumps_ahead_ends_in_safety(self, state: ReleaseState):
        assert isinstance(decide(state, (), PLAN, START + 1e9), RollBack | Halt)

    @pytest.mark.parametrize("state", [WAITING[0], WAITING[2], RESTORING])
    def test_the_bound_of_an_acknowledgement_belongs_to_the_wait(self, state: ReleaseState):
        assert isinstance(decide(state, (), PLAN, START + PLAN.max_rollback_s), Hold)
        assert not isinstance(decide(state, (), PLAN, START + PLAN.max_rollback_s + 0.001), Hold)

    @settings(max_examples=50, deadline=None)
    @given(MOSTLY_GOOD, st.integers(-(10**6), 10**6))
    def test_only_differences_of_time_count(self, looks: list[Look], shift: int):
        """The same release an hour later takes the same way: no absolute time hides in a decision."""
        state = Canary(step=0, epoch=9, step_started_at=START, release_started_at=START)
        moved = Canary(step=0, epoch=9, step_started_at=START + shift, release_started_at=START + shift)
        for number, look in enumerate(looks):
            here = decide(state, found(look), PLAN, START + 10 * number)
            there = decide(moved, found(look), PLAN, START + shift + 10 * number)
            assert (type(here), here.reason) == (type(there), there.reason)


class TestWhatIsSaid:
    def test_a_roll_back_names_every_gate_that_failed_and_no_other(self):
        results = found(("pass", "pass", "pass", "fail", "inconclusive", "fail", "invalid", "pass"))
        decision = decide(WAITING[1], results, PLAN, START)
        assert isinstance(decision, RollBack)
        assert decision.reason == f"{ARTICLE_GATES[0]}: fail; {ARTICLE_GATES[2]}: fail"

    def test_a_hold_names_what_is_waited_for_in_the_plan_s_order(self):
        results = found(("pass", "pass", "inconclusive", "pass", "inconclusive", "inconclusive", "pass", "pass"))
        decision = decide(WAITING[1], results, PLAN, START)
        assert isinstance(decision, Hold)
        assert decision.reason == f"waiting for {ARTICLE_GATES[1]}, {ARTICLE_GATES[2]}, {ENOUGH_TRAFFIC}"

    def test_a_pass_beside_a_doubt_of_the_same_name_is_still_a_pass(self):
        """Two results of one gate: a fail stops, but a second inconclusive one withdraws nothing."""
        results = (
            *found(GOOD),
            GateResult(gate=NAMES[3], verdict="inconclusive", evidence={}, reason=""),
        )
        assert isinstance(decide(WAITING[1], results, PLAN, START), Advance)
        worse = (*results, GateResult(gate=NAMES[3], verdict="fail", evidence={}, reason=""))
        assert isinstance(decide(WAITING[1], worse, PLAN, START), RollBack)


class TestClosed:
    """Negative controls of the matches: a value that is none of the known kinds is never taken for one."""

    @pytest.mark.parametrize("stranger", [None, "Canary", object()])
    def test_a_state_of_no_known_kind_is_refused(self, stranger: Any):
        with pytest.raises(AssertionError, match="unreachable"):
            decide(stranger, (), PLAN, START)
        with pytest.raises(AssertionError, match="unreachable"):
            next_state(stranger, Advance(reason="r", evidence=()), START)
        with pytest.raises(AssertionError, match="unreachable"):
            desired_split(stranger, RELEASE, PLAN, START)

    def test_a_decision_of_no_known_kind_moves_nothing(self):
        stranger: Any = "Advance"
        with pytest.raises(AssertionError, match="unreachable"):
            next_state(Preparing(epoch=0), stranger, START)

    def test_an_ending_of_no_known_name_ends_nothing(self):
        misspelt: Any = "rolledback"
        state = Restoring(ending=misspelt, reason="r", detected_at=START, epoch=3)
        with pytest.raises(AssertionError, match="unreachable"):
            next_state(state, Advance(reason="r", evidence=()), START)

    def test_every_ending_has_an_end_of_its_own(self):
        ends = {
            type(
                next_state(
                    Restoring(ending=ending, reason="r", detected_at=START, epoch=3),
                    Advance(reason="", evidence=()),
                    START,
                )
            )
            for ending in get_args(Ending)
        }
        assert ends == {RolledBack, FailedBack, Halted}

    def test_a_halt_of_what_is_over_is_refused(self):
        for state in (Halted(reason="r"), RolledBack(reason="r", time_to_recovery_s=1.0)):
            with pytest.raises(ValueError, match="Halt is not allowed"):
                next_state(state, Halt(reason="again", evidence=()), START)

    def test_a_promoted_release_that_halts_fails_back(self):
        """It is the way out that differs, not the reason: a promoted version leaves as a fail-back."""
        after = next_state(Promoted(at=START, epoch=4), Halt(reason="routing broke", evidence=()), START + 1)
        assert after == Restoring(ending="failed_back", reason="routing broke", detected_at=START + 1, epoch=5)
