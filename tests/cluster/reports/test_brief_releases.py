"""Releases that the real controller drove, read back for the brief: endings, recoveries, triggers, evidence."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.records import RunFolder
from cluster.reports.brief import ReleaseRow, collect_brief_input, read_release
from rl_actors.durable.files import ChainedLog, write_json
from serving.contracts.gates import LiveEvidence
from serving.contracts.release import Canary, Drilling
from tests.serving.fakes import RELEASE, Harness, arm_events, good_evidence, harness, make_evidence

SPEC = {"gates": ["no_safety_regression", "rollback_under_5_minutes"], "ramp": [5.0, 25.0], "alpha": 0.05}


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def log_path(rig: Harness) -> Path:
    return rig.directory / "release" / "decisions.jsonl"


def row_of(rig: Harness, spec: Mapping[str, Any] = SPEC) -> ReleaseRow:
    row = read_release(log_path(rig), spec)
    assert row is not None
    return row


def canary_ticks(rig: Harness) -> list[dict[str, Any]]:
    return [row for row in ChainedLog(log_path(rig)).rows() if row["state"]["kind"] == "Canary"]


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
    row = row_of(rig)
    assert (row.release_id, row.stable, row.candidate) == (RELEASE.release_id, RELEASE.stable, RELEASE.candidate)
    assert (row.state, row.decision, row.time_to_recovery_s) == ("Promoted", "Promote", None)
    assert row.shares == (0.05, 0.25)
    assert {"no_safety_regression", "task_success_not_worse", "candidate_healthy"} <= set(row.deciding_gates)
    assert not {"enough_traffic", "split_acknowledged"} & set(row.deciding_gates), "those are no gates"


def test_a_roll_back_with_its_measured_recovery(tmp_path: Path):
    rig = harness(tmp_path, make=worse)
    rig.platform.ack_delay_s = 1.5
    ended = rig.controller().run()
    row = row_of(rig)
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
    row = row_of(rig)
    assert (row.state, row.decision, row.deciding_gates) == ("FailedBack", "RollBack", ())
    assert row.reason == "ada: customers complain"
    assert row.time_to_recovery_s is not None


def test_a_halt_names_the_broken_comparison(tmp_path: Path):
    rig = harness(tmp_path, make=skewed)
    rig.controller().run()
    row = row_of(rig)
    assert (row.state, row.decision, row.time_to_recovery_s) == ("Halted", "Halt", None)
    assert "task_success_not_worse" in row.deciding_gates
    assert "sample-ratio mismatch" in row.reason


def test_a_release_that_has_only_begun(tmp_path: Path):
    rig = harness(tmp_path)
    rig.platform.ack_delay_s = 60.0
    rig.controller().tick()
    row = row_of(rig)
    assert (row.state, row.decision, row.shares, row.drill_s) == (Drilling.__name__, "Advance", (), None)


def test_the_drill_is_the_one_the_gate_saw(tmp_path: Path):
    rig = harness(tmp_path)
    rig.platform.ack_delay_s = 0.8
    controller = rig.controller()
    controller.run()
    (drill,) = controller.log.drills()
    assert row_of(rig).drill_s == pytest.approx(drill.seconds)
    assert drill.seconds >= 0.8


def test_shares_outside_the_spec_are_not_made_up(tmp_path: Path):
    rig = harness(tmp_path)
    rig.controller().run()
    assert row_of(rig, {}).shares == ()
    assert row_of(rig, {"ramp": [5.0]}).shares == (0.05,)


# --- gates, triggers, evidence ----------------------------------------------------------------------------------------


def test_live_gates_are_those_of_the_last_canary_tick(tmp_path: Path):
    rig = harness(tmp_path)
    rig.controller().run()
    shown = {result.gate: result for result in row_of(rig).gates}
    recorded = {result["gate"]: result for result in canary_ticks(rig)[-1]["evidence"]}
    assert set(shown) == set(recorded) - {"candidate_healthy", "enough_traffic"}
    for gate, result in shown.items():
        assert dict(result.evidence) == recorded[gate]["evidence"]
        assert (result.verdict, result.reason) == (recorded[gate]["verdict"], recorded[gate]["reason"])


def test_triggers_are_armed_gates_and_stop_rules_without_repeats(tmp_path: Path):
    rig = harness(tmp_path)
    rig.controller().run()
    run = rig.directory
    shutil.copytree(run / "release", run / "release-2")
    write_json(RunFolder(root=run).spec, {"release": SPEC})
    triggers = collect_brief_input(run).triggers
    assert triggers[:2] == ("no_safety_regression", "rollback_under_5_minutes")
    assert len(triggers) == len(set(triggers)) == 6
    for name in ("release", "release-2"):
        shutil.rmtree(run / name)
    assert collect_brief_input(run).triggers == triggers[:2]
    RunFolder(root=run).spec.unlink()
    assert collect_brief_input(run).triggers == ()


def test_the_curve_is_the_event_test_the_decision_used(tmp_path: Path):
    rig = harness(tmp_path, make=worse)
    rig.controller().run()
    curve = row_of(rig)
    (row,) = [r for r in canary_ticks(rig) if r["decision"] == "RollBack"]
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
    assert canary_ticks(rig)
    assert row_of(rig).points == ()
    assert row_of(rig, {}).pass_limit is None


def test_infinite_and_zero_evidence_survive_json(tmp_path: Path):
    rig = harness(tmp_path)
    rig.controller().run()
    path = log_path(rig)
    rows = ChainedLog(path).rows()
    for row in rows:
        for result in row["evidence"]:
            if result["gate"] == "task_success_not_worse":
                result["evidence"] |= {"e_fail": "inf", "e_pass": 0.0}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    points = row_of(rig).points
    assert {(point.log10_e_fail, point.log10_e_pass) for point in points} == {(math.inf, -math.inf)}


def test_time_starts_with_the_first_evidence(tmp_path: Path):
    rig = harness(tmp_path)
    rig.controller().run()
    minutes = [point.minutes for point in row_of(rig).points]
    assert minutes[0] == 0.0
    assert minutes == sorted(minutes)


def test_an_empty_log_is_no_release(tmp_path: Path):
    assert read_release(tmp_path / "none.jsonl", SPEC) is None
