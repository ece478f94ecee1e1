"""Releases that the real controller drove, read back for the brief: endings, recoveries, triggers, evidence."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.reports.release_rows import ReleaseLog, canary_curve, live_gates, release_row, triggers_of
from rl_actors.durable.files import ChainedLog
from serving.contracts.gates import LiveEvidence
from serving.contracts.release import Canary, Drilling
from tests.serving.fakes import RELEASE, Harness, arm_events, good_evidence, harness, make_evidence

SPEC = {"gates": ["no_safety_regression", "rollback_under_5_minutes"], "ramp": [5.0, 25.0], "alpha": 0.05}


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def log_of(rig: Harness) -> ReleaseLog:
    return ReleaseLog.read(rig.directory / "release" / "decisions.jsonl")


def worse(state: Canary) -> LiveEvidence:
    """Nearly every failed session is the canary's, at a share of 5 %."""
    return replace(good_evidence(share=0.05), failure_events=arm_events(30, 5))


def skewed(state: Canary) -> LiveEvidence:
    """Half of the sessions went to a canary that should have had a twentieth: the comparison is broken."""
    return replace(good_evidence(share=0.05), epoch_sessions=(400, 800))


def critical(state: Canary) -> LiveEvidence:
    return make_evidence(share=0.05, failed_checks={"no_secret_leak": 1})


# --- endings ----------------------------------------------------------------------------------------------------------


def test_a_promotion(tmp_path: Path):
    rig = harness(tmp_path)
    rig.controller().run()
    row = release_row(log_of(rig), SPEC)
    assert (row.release_id, row.stable, row.candidate) == (RELEASE.release_id, RELEASE.stable, RELEASE.candidate)
    assert (row.state, row.decision, row.time_to_recovery_s) == ("Promoted", "Promote", None)
    assert row.shares == (0.05, 0.25)
    assert {"no_safety_regression", "task_success_not_worse", "candidate_healthy"} <= set(row.deciding_gates)
    assert not {"enough_traffic", "split_acknowledged"} & set(row.deciding_gates), "those are no gates"


def test_a_roll_back_with_its_measured_recovery(tmp_path: Path):
    rig = harness(tmp_path, make=worse)
    rig.platform.ack_delay_s = 1.5
    ended = rig.controller().run()
    row = release_row(log_of(rig), SPEC)
    assert (row.state, row.decision) == ("RolledBack", "RollBack")
    assert row.deciding_gates == ("task_success_not_worse",)
    assert row.time_to_recovery_s == ended.time_to_recovery_s >= 1.5  # type: ignore[union-attr]
    assert row.shares == (0.05,)
    assert "more bad sessions" in row.reason


def test_a_fail_back_after_promotion_counts_as_the_ending(tmp_path: Path):
    rig = harness(tmp_path)
    rig.controller().run()
    rig.controller().roll_back(actor="ada", reason="customers complain")
    rig.platform.ack_delay_s = 0.0
    rig.controller().tick()
    row = release_row(log_of(rig), SPEC)
    assert (row.state, row.decision, row.deciding_gates) == ("FailedBack", "RollBack", ())
    assert row.reason == "ada: customers complain"
    assert row.time_to_recovery_s is not None


def test_a_halt_names_the_broken_comparison(tmp_path: Path):
    rig = harness(tmp_path, make=skewed)
    rig.controller().run()
    row = release_row(log_of(rig), SPEC)
    assert (row.state, row.decision, row.time_to_recovery_s) == ("Halted", "Halt", None)
    assert "task_success_not_worse" in row.deciding_gates
    assert "sample-ratio mismatch" in row.reason


def test_a_release_that_has_only_begun(tmp_path: Path):
    rig = harness(tmp_path)
    rig.platform.ack_delay_s = 60.0
    rig.controller().tick()
    row = release_row(log_of(rig), SPEC)
    assert (row.state, row.decision, row.shares, row.drill_s) == (Drilling.__name__, "Advance", (), None)


def test_the_drill_is_the_one_the_gate_saw(tmp_path: Path):
    rig = harness(tmp_path)
    rig.platform.ack_delay_s = 0.8
    controller = rig.controller()
    controller.run()
    (drill,) = controller.log.drills()
    assert release_row(log_of(rig), SPEC).drill_s == pytest.approx(drill.seconds)
    assert drill.seconds >= 0.8


def test_shares_outside_the_spec_are_not_made_up(tmp_path: Path):
    rig = harness(tmp_path)
    rig.controller().run()
    assert release_row(log_of(rig), {}).shares == ()
    assert release_row(log_of(rig), {"ramp": [5.0]}).shares == (0.05,)


# --- gates, triggers, evidence ----------------------------------------------------------------------------------------


def test_live_gates_are_those_of_the_last_canary_tick(tmp_path: Path):
    rig = harness(tmp_path)
    rig.controller().run()
    log = log_of(rig)
    shown = {row.result.gate: row.result for row in live_gates(log)}
    recorded = {result["gate"]: result for result in log.canary_rows[-1]["evidence"]}
    assert set(shown) == set(recorded) - {"candidate_healthy", "enough_traffic"}
    for gate, result in shown.items():
        assert dict(result.evidence) == recorded[gate]["evidence"]
        assert (result.verdict, result.reason) == (recorded[gate]["verdict"], recorded[gate]["reason"])
    assert list(live_gates(None)) == []


def test_triggers_are_armed_gates_and_stop_rules_without_repeats(tmp_path: Path):
    rig = harness(tmp_path)
    rig.controller().run()
    triggers = triggers_of([log_of(rig), log_of(rig)], SPEC)
    assert triggers[:2] == ("no_safety_regression", "rollback_under_5_minutes")
    assert len(triggers) == len(set(triggers)) == 6
    assert triggers_of([], SPEC) == triggers[:2]
    assert triggers_of([], {}) == ()


def test_the_curve_is_the_event_test_the_decision_used(tmp_path: Path):
    rig = harness(tmp_path, make=worse)
    rig.controller().run()
    log = log_of(rig)
    curve = canary_curve(log, SPEC)
    (row,) = [r for r in log.canary_rows if r["decision"] == "RollBack"]
    (evidence,) = [r["evidence"] for r in row["evidence"] if r["gate"] == "task_success_not_worse"]
    assert curve.points[-1].log10_e_fail == pytest.approx(math.log10(evidence["e_fail"]))
    assert curve.points[-1].log10_e_pass == pytest.approx(math.log10(evidence["e_pass"]))
    assert curve.fail_limit is not None
    assert curve.points[-1].log10_e_fail >= curve.fail_limit, "it was rolled back because it crossed this line"
    assert curve.fail_limit == pytest.approx(math.log10(1 / rig.plan.alpha_per_rule))
    assert curve.pass_limit == pytest.approx(math.log10(1 / rig.plan.alpha))


def test_a_tick_without_an_event_test_is_no_point(tmp_path: Path):
    """A critical violation rolls back before any statistics: there is nothing to draw."""
    rig = harness(tmp_path, make=critical)
    rig.controller().run()
    log = log_of(rig)
    assert log.canary_rows
    assert canary_curve(log, SPEC).points == ()
    assert canary_curve(None, {}).pass_limit is None


def test_infinite_and_zero_evidence_survive_json(tmp_path: Path):
    rig = harness(tmp_path)
    rig.controller().run()
    path = rig.directory / "release" / "decisions.jsonl"
    rows = ChainedLog(path).rows()
    for row in rows:
        for result in row["evidence"]:
            if result["gate"] == "task_success_not_worse":
                result["evidence"] |= {"e_fail": "inf", "e_pass": 0.0}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    points = canary_curve(ReleaseLog.read(path), SPEC).points
    assert {(point.log10_e_fail, point.log10_e_pass) for point in points} == {(math.inf, -math.inf)}


def test_time_starts_with_the_first_evidence(tmp_path: Path):
    rig = harness(tmp_path)
    rig.controller().run()
    minutes = [point.minutes for point in canary_curve(log_of(rig), SPEC).points]
    assert minutes[0] == 0.0
    assert minutes == sorted(minutes)


def test_an_empty_log_names_no_policies(tmp_path: Path):
    log = ReleaseLog.read(tmp_path / "none.jsonl")
    assert (log.stable, log.candidate, log.canary_rows, list(live_gates(log))) == ("", "", [], [])
