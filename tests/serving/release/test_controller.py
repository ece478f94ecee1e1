"""The real controller on fakes and a fake clock: whole releases, kills between every two acts, and timed recoveries."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rl_actors.contracts.errors import BadInputError, EngineError, InfrastructureError, StageRefusedError
from rl_actors.durable.files import ChainedLog, file_lock
from serving.contracts.gates import LiveEvidence
from serving.contracts.release import (
    Canary,
    Drilling,
    FailedBack,
    Halted,
    Preparing,
    Promoted,
    Promoting,
    RampStep,
    Release,
    ReleaseState,
    Restoring,
    RolledBack,
    SplitRecord,
)
from serving.release.controller import LedgerEvidence, open_release
from serving.release.monitors.registry import evaluate_live
from serving.split.record import SplitStore, route, slot_position
from serving.store.decision_log import DecisionLog
from serving.store.ledger import RequestLedger
from tests.serving.fakes import (
    RELEASE,
    START,
    Harness,
    Killed,
    arm_events,
    good_evidence,
    harness,
    killed_at,
    make_evidence,
    make_plan,
    make_record,
    make_samples,
    record_run,
)


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill here is an exception, which loses no page cache: syncing to disk would only cost time."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def silent(state: Canary) -> LiveEvidence:
    return make_evidence(share=make_plan().ramp[state.step].share)


def unsafe(state: Canary) -> LiveEvidence:
    return make_evidence(share=0.05, failed_checks={"no_secret_leak": 1})


def rows(rig: Harness) -> list[dict]:
    return ChainedLog(rig.directory / "release" / "decisions.jsonl").rows()


def ticks(rig: Harness, count: int) -> ReleaseState:
    """Tick a fresh controller each time, as if every tick ran in a new process."""
    state: ReleaseState = Preparing(epoch=0)
    for _ in range(count):
        state = rig.controller().tick()
    return state


class TestWholeReleases:
    def test_a_good_candidate_is_promoted(self, tmp_path: Path):
        rig = harness(tmp_path)
        state = rig.controller().run()
        assert isinstance(state, Promoted)
        assert rig.platform.shares == [0.0, 0.05, 0.25, 0.0]
        assert rig.aliases.named == {"stable": "ppo-b"}
        record = rig.splits.read()
        assert record is not None
        assert (record.stable, record.candidate, record.share) == ("ppo-b", "", 0.0)
        assert [row["decision"] for row in rows(rig)] == ["Advance", "Advance", "Advance", "Promote", "Advance"]

    def test_the_drill_comes_before_any_user_traffic(self, tmp_path: Path):
        rig = harness(tmp_path)
        rig.platform.ack_delay_s = 1.5
        assert isinstance(ticks(rig, 1), Drilling)
        assert rig.platform.shares == [0.0]
        assert isinstance(ticks(rig, 1), Canary)
        (drill,) = rig.controller().log.drills()
        assert drill.seconds == pytest.approx(1.5, abs=0.06)

    def test_a_great_offline_candidate_with_a_bad_canary_is_not_promoted(self, tmp_path: Path):
        bad = replace(good_evidence(), failure_events=arm_events(40, 60))
        rig = harness(tmp_path, make=lambda state: bad)
        state = rig.controller().run()
        assert isinstance(state, RolledBack)
        assert "task_success_not_worse" in state.reason
        assert rig.aliases.named == {"stable": "sft-a"}

    def test_a_critical_violation_rolls_back_at_the_first_look(self, tmp_path: Path):
        rig = harness(tmp_path, make=unsafe)
        state = rig.controller().run()
        assert isinstance(state, RolledBack)
        assert "no_secret_leak" in state.reason
        assert len(rig.evidence.seen) == 1
        assert rig.platform.shares == [0.0, 0.05, 0.0]

    def test_silence_rolls_back_within_the_bound(self, tmp_path: Path):
        rig = harness(tmp_path, make=silent)
        state = rig.controller().run()
        assert isinstance(state, RolledBack)
        assert "no evidence within step 1: 600 s" in state.reason
        assert rig.clock.now - START <= 600 + 2 * rig.plan.tick_s

    def test_a_rollback_drill_never_promotes(self, tmp_path: Path):
        rig = harness(tmp_path, plan=make_plan(may_promote=False))
        state = rig.controller().run()
        assert isinstance(state, RolledBack)
        assert ("move", "stable", "ppo-b") not in rig.aliases.calls

    def test_a_broken_split_halts_for_a_human(self, tmp_path: Path):
        rig = harness(tmp_path, make=lambda state: replace(good_evidence(), epoch_sessions=(400, 1000)))
        state = rig.controller().run()
        assert isinstance(state, Halted)
        assert "sample-ratio mismatch" in state.reason
        assert rig.platform.shares[-1] == 0.0
        assert rig.aliases.named == {"stable": "sft-a"}

    def test_a_slow_drill_fails_its_gate(self, tmp_path: Path):
        """Gateways that need 200 s to follow, with 100 s allowed: found before promotion, whatever else passes."""
        rig = harness(tmp_path, plan=make_plan(max_rollback_s=100.0))
        rig.platform.ack_delay_s = 200.0
        state = rig.controller().run()
        assert isinstance(state, Halted)
        assert 0.05 not in rig.platform.shares

    def test_a_drill_just_too_slow_is_caught_by_the_gate(self, tmp_path: Path):
        rig = harness(tmp_path)
        ticks(rig, 1)
        rig.clock.now += 300.0
        assert isinstance(ticks(rig, 1), Canary)
        state = ticks(rig, 1)
        assert isinstance(state, Restoring)
        assert "rollback_under_5_minutes" in state.reason

    def test_the_wait_between_ticks_is_the_plan_s(self, tmp_path: Path):
        waits: list[float] = []
        rig = harness(tmp_path, make=silent)
        controller = rig.controller()
        controller.sleep = lambda seconds: (waits.append(seconds), rig.clock.sleep(seconds))[0]
        controller.run()
        assert set(waits) == {rig.plan.tick_s}

    def test_an_ended_release_stays_ended(self, tmp_path: Path):
        rig = harness(tmp_path)
        end = rig.controller().run()
        before = (len(rows(rig)), list(rig.platform.splits), list(rig.aliases.calls))
        rig.evidence.make = unsafe
        assert rig.controller().tick() == end
        assert before == (len(rows(rig)), list(rig.platform.splits), list(rig.aliases.calls))

    def test_a_second_release_follows_the_first(self, tmp_path: Path):
        rig = harness(tmp_path)
        rig.controller().run()
        follower = Release(release_id="release-2", stable="ppo-b", candidate="ppo-c")
        second = open_release(
            follower,
            rig.plan,
            directory=tmp_path / "second",
            split_directory=tmp_path / "split",
            ledger=RequestLedger(tmp_path / "l.sqlite", owner="o"),
            platform=rig.platform,
            aliases=rig.aliases,
            clock=rig.clock,
            sleep=rig.clock.sleep,
        )
        assert isinstance(second.tick(), Drilling)
        assert isinstance(second.tick(), Canary)
        record = rig.splits.read()
        assert record is not None
        assert (record.epoch, record.stable, record.candidate, record.salt) == (6, "ppo-b", "ppo-c", "release-2")
        assert isinstance(rig.controller().tick(), Promoted)
        with pytest.raises(StageRefusedError, match="is next"):
            rig.controller().roll_back(actor="ann", reason="too late: another release runs")


class TestLongSleep:
    """A controller that comes back late: what nobody watched, and no candidate served, is no canary time."""

    def test_time_without_a_controller_does_not_count(self, tmp_path: Path):
        rig = harness(tmp_path, make=silent)
        ticks(rig, 2)
        rig.clock.now += 7200.0
        state = rig.controller().tick()
        assert isinstance(state, Canary)
        assert (state.step_started_at, state.release_started_at) == (START + 7200.0, START + 7200.0)
        (row,) = [row for row in rows(rig) if row["reason"].startswith("resumed after 7200 s")]
        assert row["decision"] == "Hold"

    def test_the_bound_still_ends_a_resumed_canary(self, tmp_path: Path):
        rig = harness(tmp_path, make=silent)
        ticks(rig, 2)
        rig.clock.now += 7200.0
        state = rig.controller().run()
        assert isinstance(state, RolledBack)
        assert "no evidence within step 1: 600 s" in state.reason
        assert rig.clock.now - START <= 7200 + 600 + 2 * rig.plan.tick_s

    def test_a_controller_that_is_merely_slow_stretches_nothing(self, tmp_path: Path):
        rig = harness(tmp_path, make=silent)
        ticks(rig, 2)
        controller = rig.controller()
        controller.tick()
        rig.clock.now += 7200.0
        assert isinstance(controller.tick(), Restoring)

    @pytest.mark.parametrize(("asleep_s", "counts"), [(30.0, True), (30.5, False)])
    def test_the_gateways_bound_is_the_limit(self, tmp_path: Path, asleep_s: float, counts: bool):
        rig = harness(tmp_path, make=silent)
        ticks(rig, 2)
        rig.clock.now += asleep_s
        state = rig.controller().tick()
        assert isinstance(state, Canary)
        assert (state.step_started_at == START) is counts

    def test_a_kill_while_waking_counts_the_sleep_once(self, tmp_path: Path):
        rig = harness(tmp_path, make=silent)
        ticks(rig, 2)
        rig.clock.now += 7200.0
        for nth in range(6):
            with killed_at(nth, rig), suppress(Killed):
                rig.controller().tick()
        state = rig.controller().tick()
        assert isinstance(state, Canary)
        assert state.step_started_at == START + 7200.0

    def test_bad_news_after_a_long_sleep_still_rolls_back_at_once(self, tmp_path: Path):
        rig = harness(tmp_path, make=silent)
        ticks(rig, 2)
        rig.clock.now += 7200.0
        rig.evidence.make = unsafe
        assert isinstance(rig.controller().tick(), Restoring)


class TestSickCandidate:
    @pytest.mark.parametrize("ill", [{"is_healthy": False}, {"health_error": "engine core died"}])
    @pytest.mark.parametrize("healthy_ticks", [0, 1, 2, 3])
    def test_an_unhealthy_candidate_goes_at_once(self, tmp_path: Path, ill: dict[str, object], healthy_ticks: int):
        rig = harness(tmp_path, make=silent)
        ticks(rig, healthy_ticks)
        for name, value in ill.items():
            setattr(rig.platform, name, value)
        state = ticks(rig, 1)
        assert isinstance(state, Restoring)
        assert "candidate_healthy" in state.reason
        assert rig.platform.shares[-1] == 0.0
        assert isinstance(ticks(rig, 1), RolledBack)

    def test_while_it_is_promoted_too(self, tmp_path: Path):
        rig = harness(tmp_path)
        assert isinstance(ticks(rig, 4), Promoting)
        rig.platform.is_healthy = False
        assert isinstance(ticks(rig, 2), RolledBack)
        record = rig.splits.read()
        assert record is not None
        assert record.stable == "sft-a"
        assert rig.aliases.named == {"stable": "sft-a"}

    def test_the_engine_s_own_words_are_kept(self, tmp_path: Path):
        rig = harness(tmp_path)
        rig.platform.health_error = "engine core died"
        state = ticks(rig, 1)
        assert isinstance(state, Restoring)
        assert "engine core died" in state.reason

    def test_another_failure_of_the_platform_is_not_the_candidate_s(self, tmp_path: Path):
        rig = harness(tmp_path, make=silent)
        ticks(rig, 2)

        def lost() -> bool:
            raise InfrastructureError("no route to the head node")

        rig.platform.candidate_healthy = lost
        with pytest.raises(InfrastructureError, match="head node"):
            ticks(rig, 1)
        assert rows(rig)[-1]["next_state"]["kind"] == "Canary"
        assert issubclass(EngineError, InfrastructureError)


class TestRecovery:
    @pytest.mark.parametrize("delay", [0.0, 0.5, 7.0, 120.0])
    def test_time_to_recovery_is_the_injected_delay(self, tmp_path: Path, delay: float):
        rig = harness(tmp_path, make=unsafe)
        ticks(rig, 2)
        rig.platform.ack_delay_s = delay
        state = rig.controller().run()
        assert isinstance(state, RolledBack)
        assert state.time_to_recovery_s == pytest.approx(delay, abs=0.06)
        assert rows(rig)[-1]["next_state"]["time_to_recovery_s"] == state.time_to_recovery_s

    def test_split_first_then_acknowledgement_then_aliases(self, tmp_path: Path):
        rig = harness(tmp_path, make=unsafe)
        ticks(rig, 2)
        with killed_at(10**9, rig) as acts:
            rig.controller().run()
        assert acts.index("write_atomic") < acts.index("set_split") < acts.index("acknowledged_epoch")
        assert acts.index("acknowledged_epoch") < acts.index("move") < acts.index("clear")

    def test_traffic_is_safe_before_anything_is_recorded(self, tmp_path: Path):
        """The disk of the decision log is full: the split still goes to safety."""
        rig = harness(tmp_path, make=unsafe)
        ticks(rig, 2)
        log = rig.directory / "release" / "decisions.jsonl"
        controller = rig.controller()

        def fail(*args: object, **named: object) -> None:
            raise InfrastructureError(f"{log}: disk full")

        controller.log.append = fail
        with pytest.raises(InfrastructureError, match="disk full"):
            controller.tick()
        record = rig.splits.read()
        assert record is not None
        assert (record.share, record.stable) == (0.0, "sft-a")
        assert isinstance(rig.controller().run(), RolledBack)

    def test_gateways_that_never_answer_end_in_a_halt(self, tmp_path: Path):
        rig = harness(tmp_path, make=unsafe)
        ticks(rig, 2)
        rig.platform.ack_delay_s = 1e9
        state = rig.controller().run()
        assert isinstance(state, Halted)
        assert "not acknowledged within 300 s" in state.reason
        assert rig.aliases.named == {"stable": "sft-a"}

    def test_aliases_that_are_down_do_not_delay_the_split(self, tmp_path: Path):
        rig = harness(tmp_path, make=unsafe)
        ticks(rig, 2)
        move = rig.aliases.move

        def down(alias: str, version: str) -> None:
            raise InfrastructureError(f"registry is down: {alias} {version}")

        rig.aliases.move = down
        with pytest.raises(InfrastructureError, match="registry is down"):
            rig.controller().run()
        assert rig.platform.shares[-1] == 0.0
        rig.aliases.move = move
        assert isinstance(rig.controller().run(), RolledBack)


class TestEarlierPromotion:
    """The registry outlives a run: its `stable` may name a policy that another run promoted before this release."""

    EARLIER = "ppo-of-another-run"

    def rig(self, tmp_path: Path, make: Callable[[Canary], LiveEvidence] | None = None) -> Harness:
        rig = harness(tmp_path, make=make)
        rig.aliases.named["stable"] = self.EARLIER
        return rig

    def test_a_roll_back_leaves_it_alone(self, tmp_path: Path):
        rig = self.rig(tmp_path, unsafe)
        assert isinstance(rig.controller().run(), RolledBack)
        assert rig.aliases.named == {"stable": self.EARLIER}

    def test_a_halt_leaves_it_alone(self, tmp_path: Path):
        rig = self.rig(tmp_path, lambda state: replace(good_evidence(), epoch_sessions=(400, 1000)))
        assert isinstance(rig.controller().run(), Halted)
        assert rig.aliases.named == {"stable": self.EARLIER}

    def test_a_promotion_replaces_it_and_a_fail_back_names_this_release_s_stable(self, tmp_path: Path):
        rig = self.rig(tmp_path)
        assert isinstance(rig.controller().run(), Promoted)
        assert rig.aliases.named == {"stable": "ppo-b"}
        rig.controller().roll_back(actor="ann", reason="complaints")
        assert isinstance(rig.controller().run(), FailedBack)
        assert rig.aliases.named == {"stable": "sft-a"}

    def test_a_fail_back_after_a_later_promotion_elsewhere_leaves_that_alone(self, tmp_path: Path):
        rig = self.rig(tmp_path)
        rig.controller().run()
        rig.aliases.named["stable"] = "promoted-later"
        rig.controller().roll_back(actor="ann", reason="complaints")
        assert isinstance(rig.controller().run(), FailedBack)
        assert rig.aliases.named == {"stable": "promoted-later"}

    def test_where_nothing_is_named_a_roll_back_names_stable(self, tmp_path: Path):
        """Negative control: the alias is not left alone for its own sake."""
        rig = harness(tmp_path, make=unsafe)
        assert isinstance(rig.controller().run(), RolledBack)
        assert ("move", "stable", "sft-a") in rig.aliases.calls

    def test_a_promotion_killed_before_its_record_and_then_rolled_back_is_undone(self, tmp_path: Path):
        """The alias already names the candidate, the record does not say so: the roll back still takes it back."""
        rig = self.rig(tmp_path)
        assert isinstance(ticks(rig, 4), Promoting)
        rig.aliases.move("stable", "ppo-b")
        rig.platform.is_healthy = False
        assert isinstance(rig.controller().run(), RolledBack)
        assert rig.aliases.named == {"stable": "sft-a"}

    def test_a_registry_that_is_down_ends_nothing_and_loses_nothing(self, tmp_path: Path):
        rig = self.rig(tmp_path, unsafe)
        ticks(rig, 2)

        def down(alias: str) -> str:
            raise InfrastructureError(f"registry is down: {alias}")

        asked, rig.aliases.alias_version = rig.aliases.alias_version, down
        with pytest.raises(InfrastructureError, match="registry is down"):
            rig.controller().run()
        assert rig.platform.shares[-1] == 0.0
        rig.aliases.alias_version = asked
        assert isinstance(rig.controller().run(), RolledBack)
        assert rig.aliases.named == {"stable": self.EARLIER}


class TestHumans:
    @pytest.mark.parametrize("healthy_ticks", [0, 1, 2, 3, 4])
    def test_one_action_rolls_back_from_anywhere(self, tmp_path: Path, healthy_ticks: int):
        rig = harness(tmp_path)
        ticks(rig, healthy_ticks)
        state = rig.controller().roll_back(actor="ann", reason="complaints")
        assert isinstance(state, Restoring)
        assert state.reason == "ann: complaints"
        assert rig.platform.splits[-1][1].stable == "sft-a"
        assert isinstance(rig.controller().run(), RolledBack)
        assert rig.aliases.named == {"stable": "sft-a"}

    def test_a_promoted_release_fails_back(self, tmp_path: Path):
        rig = harness(tmp_path)
        rig.controller().run()
        rig.platform.ack_delay_s = 3.0
        rig.controller().roll_back(actor="ann", reason="night of complaints")
        state = rig.controller().run()
        assert isinstance(state, FailedBack)
        assert state.time_to_recovery_s == pytest.approx(3.0, abs=0.06)
        assert rig.aliases.named == {"stable": "sft-a"}

    def test_a_second_click_changes_nothing(self, tmp_path: Path):
        rig = harness(tmp_path, make=silent)
        ticks(rig, 2)
        first = rig.controller().roll_back(actor="ann", reason="complaints")
        count = len(rows(rig))
        assert rig.controller().roll_back(actor="bob", reason="me too") == first
        end = rig.controller().run()
        assert rig.controller().roll_back(actor="bob", reason="me too") == end
        assert len(rows(rig)) == count + 1

    def test_it_needs_neither_platform_nor_registry(self, tmp_path: Path):
        """With everything else down, one action still puts the safe split in force, which gateways poll."""
        rig = harness(tmp_path, make=silent)
        ticks(rig, 2)

        def down(*args: object, **named: object) -> None:
            raise InfrastructureError("head node is gone")

        set_split, rig.platform.set_split = rig.platform.set_split, down
        with pytest.raises(InfrastructureError, match="head node"):
            rig.controller().roll_back(actor="ann", reason="complaints")
        record = rig.splits.read()
        assert record is not None
        assert (record.share, record.stable) == (0.0, "sft-a")
        rig.platform.set_split = set_split
        assert isinstance(rig.controller().run(), RolledBack)

    def test_a_promoted_release_follows_a_split_written_by_hand(self, tmp_path: Path):
        rig = harness(tmp_path)
        rig.controller().run()
        current = rig.splits.read()
        assert current is not None
        rig.splits.compare_and_set(replace(current, epoch=5, stable="sft-a"))
        assert isinstance(rig.controller().run(), FailedBack)
        assert rig.aliases.named == {"stable": "sft-a"}

    def test_a_safe_split_written_by_hand_is_adopted(self, tmp_path: Path):
        """The last resort: write the record, tell nobody. The controller follows."""
        rig = harness(tmp_path, make=silent)
        ticks(rig, 2)
        current = rig.splits.read()
        assert current is not None
        safe = replace(current, epoch=current.epoch + 1, candidate="", share=0.0, updated_at=rig.clock.now)
        rig.splits.compare_and_set(safe)
        rig.platform.set_split(safe)
        assert isinstance(rig.controller().run(), RolledBack)
        assert "adopted" in rows(rig)[-2]["reason"]

    @pytest.mark.parametrize("change", [{"share": 0.5}, {"stable": "other"}, {"epoch": 4, "share": 0.0}])
    def test_any_other_foreign_split_is_refused(self, tmp_path: Path, change: dict[str, object]):
        rig = harness(tmp_path, make=silent)
        ticks(rig, 2)
        foreign = SplitRecord(epoch=3, stable="sft-a", candidate="ppo-x", share=0.0, salt="r9", updated_at=START)
        foreign = replace(foreign, **change)
        for epoch in range(3, foreign.epoch + 1):
            rig.splits.compare_and_set(replace(foreign, epoch=epoch))
        with pytest.raises(StageRefusedError, match="another release's"):
            rig.controller().tick()


class TestKills:
    """kill -9 before every single act, then resume with a new controller: the same end, and nothing done twice."""

    MAX_ACTS = 60

    def finish_with_kill(
        self, directory: Path, nth: int, make: Callable[[Canary], LiveEvidence] | None
    ) -> Harness | None:
        """Run a release killed before act `nth`, then resume it. None when there is no such act any more."""
        rig = harness(directory, make=make)
        was_killed = False
        with killed_at(nth, rig):
            try:
                rig.controller().run()
            except Killed:
                was_killed = True
        if not was_killed:
            return None
        rig.controller().run()
        return rig

    def all_kills(self, tmp_path: Path, make: Callable[[Canary], LiveEvidence] | None) -> list[Harness]:
        rigs: list[Harness] = []
        for nth in range(self.MAX_ACTS):
            rig = self.finish_with_kill(tmp_path / str(nth), nth, make)
            if rig is None:
                return rigs
            rigs.append(rig)
        raise AssertionError(f"a release takes more than {self.MAX_ACTS} acts")

    def test_a_promotion_survives_every_kill(self, tmp_path: Path):
        rigs = self.all_kills(tmp_path, None)
        assert len(rigs) > 20
        for nth, rig in enumerate(rigs):
            record = rig.splits.read()
            assert record is not None
            assert (record.epoch, record.stable, record.share) == (4, "ppo-b", 0.0), nth
            assert rig.platform.shares == [0.0, 0.05, 0.25, 0.0], nth
            assert rig.aliases.named == {"stable": "ppo-b"}, nth
            assert set(rig.splits.history()) == {1, 2, 3, 4}, nth
            assert rows(rig)[-1]["next_state"]["kind"] == "Promoted", nth

    def test_a_roll_back_survives_every_kill(self, tmp_path: Path):
        rigs = self.all_kills(tmp_path, unsafe)
        assert len(rigs) > 15
        for nth, rig in enumerate(rigs):
            record = rig.splits.read()
            assert record is not None
            assert (record.epoch, record.stable, record.share) == (3, "sft-a", 0.0), nth
            assert rig.platform.shares == [0.0, 0.05, 0.0], nth
            assert rig.aliases.named == {"stable": "sft-a"}, nth
            assert rows(rig)[-1]["next_state"]["kind"] == "RolledBack", nth

    def test_once_safe_no_kill_brings_the_candidate_back(self, tmp_path: Path):
        """After the safe split is written, the candidate turns good again: the roll back must still complete."""
        for nth in range(10):
            rig = harness(tmp_path / str(nth), make=unsafe)
            ticks(rig, 2)
            try:
                with killed_at(nth, rig):
                    rig.controller().run()
            except Killed:
                pass
            record = rig.splits.read()
            assert record is not None
            was_safe = record.share == 0.0
            rig.evidence.make = lambda state: good_evidence(share=0.25 if state.step else 0.05)
            state = rig.controller().run()
            assert isinstance(state, RolledBack if was_safe else Promoted), nth

    def test_a_torn_row_is_no_row(self, tmp_path: Path):
        rig = harness(tmp_path)
        ticks(rig, 2)
        log = tmp_path / "release" / "decisions.jsonl"
        log.write_bytes(log.read_bytes() + log.read_bytes()[:70])
        assert isinstance(rig.controller().run(), Promoted)
        assert [row["decision"] for row in rows(rig)] == ["Advance", "Advance", "Advance", "Promote", "Advance"]

    def test_a_controller_that_stays_dead_gives_the_candidate_nothing(self, tmp_path: Path):
        """The heartbeat is the tick: without it, gateways route by share 0 after `stale_after_s`."""
        rig = harness(
            tmp_path, plan=make_plan(ramp=(RampStep(share=0.9, min_requests=1, max_duration_s=1e6),)), make=silent
        )
        rig.evidence.make = lambda state: make_evidence(share=0.9)
        ticks(rig, 2)
        for _ in range(20):
            rig.clock.sleep(25.0)
            ticks(rig, 1)
        record = rig.splits.read()
        assert record is not None

        def canaries(now: float) -> int:
            return sum(route(record, i / 50, now, 30.0).release_channel == "canary" for i in range(50))

        assert canaries(rig.clock.now) == 45
        assert canaries(rig.clock.now + 31.0) == 0


class TestLog:
    def test_every_row_tells_the_whole_story(self, tmp_path: Path):
        rig = harness(tmp_path)
        rig.controller().run()
        for row in rows(rig):
            assert set(row) == {"at", "release", "state", "decision", "reason", "evidence", "next_state"}
            assert row["release"] == {"release_id": "release-1", "stable": "sft-a", "candidate": "ppo-b"}
        gates = {entry["gate"]: entry for entry in rows(rig)[3]["evidence"]}
        assert gates["no_safety_regression"]["evidence"]["e_fail"] <= 1.0
        assert gates["latency_delta_lt_15_percent"]["verdict"] == "pass"

    def test_infinities_are_spelled_out(self, tmp_path: Path):
        bad = make_evidence(make_samples(8000), make_samples(400, success_rate=0.0))
        rig = harness(tmp_path, make=lambda state: bad)
        rig.controller().run()
        text = (tmp_path / "release" / "decisions.jsonl").read_text(encoding="utf-8")
        found = [
            entry for row in rows(rig) for entry in row["evidence"] if entry["gate"] == "cost_per_success_not_worse"
        ]
        assert found[0]["evidence"]["ratio"] == "Infinity"

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        for line in text.splitlines():
            json.loads(line, parse_constant=refuse)

    def test_another_release_s_log_is_refused(self, tmp_path: Path):
        rig = harness(tmp_path)
        ticks(rig, 1)
        with pytest.raises(BadInputError, match="belongs to"):
            DecisionLog(tmp_path / "release").state(replace(RELEASE, candidate="ppo-z"))

    def test_a_misspelt_gate_starts_nothing(self, tmp_path: Path):
        with pytest.raises(BadInputError, match="did you mean"):
            harness(tmp_path, plan=make_plan(gates=("no_safty_regression",))).controller()
        assert not (tmp_path / "release").exists()

    def test_ticks_exclude_each_other(self, tmp_path: Path):
        rig = harness(tmp_path)
        done = threading.Event()
        thread = threading.Thread(target=lambda: (rig.controller().tick(), done.set()))
        with file_lock(tmp_path / "release" / "controller.lock"):
            thread.start()
            assert not done.wait(0.2)
            assert rig.platform.splits == []
        assert done.wait(10)
        thread.join()

    def test_many_impatient_controllers_make_one_release(self, tmp_path: Path):
        rig = harness(tmp_path)
        threads = [threading.Thread(target=rig.controller().run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert rig.platform.shares == [0.0, 0.05, 0.25, 0.0]
        assert [row["decision"] for row in rows(rig)] == ["Advance", "Advance", "Advance", "Promote", "Advance"]


class TestLedgerEvidence:
    """The whole path from rows to verdicts, with a real ledger and a real split."""

    @pytest.fixture
    def rig(self, tmp_path: Path):
        ledger = RequestLedger(tmp_path / "ledger.sqlite", owner="gateway-1")
        rig = harness(tmp_path)
        rig.evidence = LedgerEvidence(ledger, rig.splits)  # pyright: ignore[reportAttributeAccessIssue]
        yield rig, ledger
        ledger.close()

    def serve(self, rig: Harness, ledger: RequestLedger, numbers: range, *, canary_success: float = 0.9) -> None:
        """Route sessions by the split in force and record their runs, as a gateway does."""
        record = rig.splits.read()
        assert record is not None
        rng = np.random.default_rng(numbers.start)
        for number in numbers:
            found = route(record, slot_position(number, record.salt), record.updated_at, 30.0)
            rate = canary_success if found.release_channel == "canary" else 0.9
            record_run(
                ledger,
                number,
                policy_version=found.policy_version,
                release_channel=found.release_channel,
                split_epoch=found.split_epoch,
                success="yes" if rng.random() < rate else "no",
                duration_ms=float(100 * np.exp(rng.normal(0, 0.3))),
                cost=float(rng.gamma(20, 0.05)),
            )

    def plan(self, **changes: object):
        ramp = (RampStep(share=0.3, min_requests=100, max_duration_s=600.0),)
        return make_plan(ramp=ramp, full_samples=200, event_margin=0.8, cost_margin=0.15, **changes)

    def test_no_traffic_is_no_pass(self, rig):
        rig, ledger = rig
        rig.plan = self.plan()
        state = ticks(rig, 2)
        assert isinstance(state, Canary)
        evidence = LedgerEvidence(ledger, rig.splits).collect(RELEASE, state, rig.controller().log.drills(), START)
        verdicts = {result.gate: result.verdict for result in evaluate_live(evidence, rig.plan)}
        assert verdicts.pop("rollback_under_5_minutes") == "pass"
        assert set(verdicts.values()) == {"inconclusive"}

    def test_good_traffic_promotes(self, rig):
        rig, ledger = rig
        rig.plan = self.plan()
        ticks(rig, 2)
        self.serve(rig, ledger, range(1500))
        assert isinstance(rig.controller().run(), Promoted)

    def test_bad_traffic_goes_back_to_stable_without_a_human(self, rig):
        rig, ledger = rig
        rig.plan = self.plan()
        ticks(rig, 2)
        self.serve(rig, ledger, range(400), canary_success=0.5)
        state = rig.controller().run()
        assert isinstance(state, RolledBack)
        assert "task_success_not_worse" in state.reason

    def test_offline_wins_do_not_count(self, rig):
        """Hundreds of perfect offline runs of the candidate leave the live gates without data."""
        rig, ledger = rig
        rig.plan = self.plan()
        state = ticks(rig, 2)
        assert isinstance(state, Canary)
        for number in range(300):
            record_run(ledger, number, release_channel="offline_eval", split_epoch=state.epoch)
        evidence = LedgerEvidence(ledger, rig.splits).collect(RELEASE, state, (), START)
        assert evidence.candidate.num_runs == evidence.canary_sessions == 0
        assert evidence.epoch_sessions == (0, 0)

    def test_one_angry_session_is_one_event(self, rig):
        rig, ledger = rig
        rig.plan = self.plan()
        state = ticks(rig, 2)
        assert isinstance(state, Canary)
        for number in range(50):
            record_run(ledger, number, session_key="angry", success="no", split_epoch=state.epoch)
        evidence = LedgerEvidence(ledger, rig.splits).collect(RELEASE, state, (), START)
        assert len(evidence.failure_events) == 1
        assert evidence.failure_events[0].is_canary
        assert evidence.failure_events[0].share == 0.3

    def test_a_late_override_counts_at_the_share_of_its_run(self, rig):
        rig, ledger = rig
        ticks(rig, 2)
        record_run(ledger, 0, split_epoch=2)
        record = rig.splits.read()
        assert record is not None
        rig.splits.compare_and_set(replace(record, epoch=3, share=0.25))
        record_run(ledger, 1, split_epoch=3, policy_version="sft-a", release_channel="general")
        for run_id in ("run-0", "run-1"):
            ledger.override(run_id, actor="ann", reason="wrong", at=START + 900)
        state = Canary(step=1, epoch=3, step_started_at=START, release_started_at=START)
        evidence = LedgerEvidence(ledger, rig.splits).collect(RELEASE, state, (), START)
        assert [(event.is_canary, event.share) for event in evidence.safety_events] == [(True, 0.05), (False, 0.25)]
        assert evidence.share == 0.25

    def test_other_versions_and_stale_routes_stay_outside(self, rig):
        rig, ledger = rig
        state = ticks(rig, 2)
        assert isinstance(state, Canary)
        record_run(ledger, 0, success="no", split_epoch=0, release_channel="general", policy_version="sft-a")
        record_run(ledger, 1, success="no", split_epoch=state.epoch, policy_version="somebody-else")
        evidence = LedgerEvidence(ledger, rig.splits).collect(RELEASE, state, (), START)
        assert evidence.failure_events == ()
        assert evidence.stable.num_runs == evidence.candidate.num_runs == 0

    def test_a_gateway_that_ignores_the_split_is_found(self, rig):
        rig, ledger = rig
        rig.plan = self.plan()
        state = ticks(rig, 2)
        assert isinstance(state, Canary)
        for number in range(200):
            record_run(ledger, number, split_epoch=state.epoch)
        assert isinstance(rig.controller().run(), Halted)

    def test_runs_still_under_way_count_as_sessions_not_as_runs(self, rig):
        rig, ledger = rig
        state = ticks(rig, 2)
        assert isinstance(state, Canary)
        ledger.start(make_record(split_epoch=state.epoch))
        evidence = LedgerEvidence(ledger, rig.splits).collect(RELEASE, state, (), START)
        assert (evidence.candidate.num_runs, evidence.candidate.num_running) == (0, 1)
        assert evidence.epoch_sessions == (1, 1)


def test_the_store_is_shared_by_path(tmp_path: Path):
    rig = harness(tmp_path)
    ticks(rig, 2)
    other = SplitStore(tmp_path / "split")
    assert other.read() == rig.splits.read()
