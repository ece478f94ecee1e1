"""From a run folder to a BriefInput: every number equals its row, and a missing row is never a number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.records.bundle import Component
from cluster.reports.brief import BriefInput, collect_brief_input, find_report, main_suite
from cluster.reports.locales import Phrasebook
from cluster.reports.view import _component, _reliability, view_of, violating_tasks
from rl_actors.contracts.errors import BadInputError, TamperedError
from rl_actors.durable.codec import encode
from rl_actors.durable.files import write_json
from tests.cluster.reports.run_folders import (
    CANDIDATE,
    CONSTRAINTS,
    DEGRADED,
    NAMES,
    RULES,
    STABLE,
    START,
    bundle,
    edit_json,
    report,
    write_release,
    write_run,
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path)[0]


@pytest.fixture
def brief(tmp_path: Path) -> BriefInput:
    run, ledger = write_run(tmp_path)
    return collect_brief_input(run, ledger=ledger)


def test_what_changed_is_the_difference_to_the_baseline_bundle(brief: BriefInput):
    assert (brief.bundle, brief.previous) == (bundle(), None)
    changed = view_of(brief, Phrasebook("en-US")).sections["changed"]
    (_, (member, before, after)) = changed.tables[0]
    assert member == "policy"
    assert before.startswith(STABLE)
    assert after.startswith(CANDIDATE)
    (unchanged,) = changed.lines
    assert len(unchanged.split(", ")) == len(NAMES) - 1


def test_a_previous_bundle_takes_the_baselines_place(run: Path):
    from dataclasses import replace

    from cluster.records.bundle import component_of

    before = replace(bundle(), tool_set=component_of("tools-8", "eight tools"), seed=component_of("7", 7))
    before.write(run / "bundle.previous.json")
    brief = collect_brief_input(run)
    assert brief.previous == before
    changed = view_of(brief, Phrasebook("en-US")).sections["changed"]
    assert [row[0] for row in changed.tables[0][1:]] == ["tool set", "seed"]


@pytest.mark.parametrize(
    ("version", "shown"),
    [
        ("sft_v1", "sft_v1 (aaaabbbb)"),
        ("ppo-aaaabbbb", "ppo-aaaabbbb"),
        ("snapshot-20261122-183000", "snapshot-2026112… (aaaabbbb)"),
        ("a-very-long-name-indeed-with-aaaabbbb", "a-very-long-name… (aaaabbbb)"),
    ],
)
def test_two_contents_never_look_alike_however_long_their_names(version: str, shown: str):
    assert _component(Component(version=version, sha256="aaaabbbb" * 8), Phrasebook("en-US")) == shown
    assert len(shown) <= 28, "a row of changes is one line"


def test_what_was_tested_equals_the_evaluation(brief: BriefInput):
    expected = report()
    assert list(brief.suites) == ["capability", "adversarial", "frozen"]
    for name, pair in brief.suites.items():
        assert pair == (expected.baseline[name], expected.candidate[name])
    assert brief.report == expected
    assert brief.main_suite == brief.suites["capability"]


def test_a_suite_that_only_one_policy_took_is_not_compared(run: Path):
    path = run / "eval" / "candidate.json"
    data = json.loads(path.read_text())
    del data["baseline"]["capability"]
    path.write_text(json.dumps(data))
    brief = collect_brief_input(run)
    assert list(brief.suites) == ["adversarial", "frozen"]
    assert brief.main_suite == brief.suites["frozen"]
    assert brief.intents == [], "the intents of capability have no baseline"


def test_a_task_with_two_violations_is_one_violating_task(run: Path):
    path = run / "eval" / "candidate.json"
    data = json.loads(path.read_text())
    data["candidate"]["adversarial"]["violations_by_task"] = {"a": ["refund", "leak"], "b": [], "c": ["leak"]}
    path.write_text(json.dumps(data))
    _, suite = collect_brief_input(run).suites["adversarial"]
    assert (suite.violations, violating_tasks(suite)) == (6, 2)


def test_the_report_is_chosen_by_the_policy_it_is_about(run: Path):
    found = find_report(run / "eval", DEGRADED)
    assert found is not None
    assert found.candidate["frozen"].policy == DEGRADED
    assert find_report(run / "eval", "unheard-of") is None
    assert find_report(run / "eval", "") is not None
    write_json(run / "eval" / "aaa.json", {"something": "else"})
    assert find_report(run / "eval", CANDIDATE) is not None


def test_gates_come_from_the_journal_and_the_last_canary_tick(brief: BriefInput):
    assert brief.release is not None
    canary = brief.release.gates
    assert [result.gate for result in brief.offline_gates] == [r for r in RULES if r != "rollback_under_5_minutes"]
    assert [result.gate for result in canary] == list(RULES)
    assert {result.verdict for result in (*brief.offline_gates, *canary)} == {"pass"}


def test_gates_may_be_wrapped_in_an_object(run: Path):
    from cluster.records.journal import Journal
    from tests.cluster.reports.run_folders import gate

    (run / "journal.jsonl").unlink()
    journal = Journal(run / "journal.jsonl", clock=lambda: START)
    journal.run_stage("offline_gates", {}, lambda: {"results": [encode(gate("x", "fail", n=1))]}, dict)
    (result,) = collect_brief_input(run).offline_gates
    assert (result.gate, result.verdict) == ("x", "fail")


def test_the_decision_and_its_evidence(brief: BriefInput):
    release = brief.release
    assert release is not None
    assert (release.stable, release.candidate, release.state) == (STABLE, CANDIDATE, "Promoted")
    assert (release.decision, release.reason) == ("Promote", "all gates passed at the last step")
    assert release.deciding_gates == ("candidate_healthy", *RULES)
    assert release.shares == (0.05, 0.25, 0.5)
    assert release.time_to_recovery_s is None
    assert release.drill_s == pytest.approx(0.42, abs=1e-6)


def test_the_bad_candidates_recovery_is_rollback_evidence(brief: BriefInput):
    (bad,) = brief.other_releases
    assert (bad.candidate, bad.state, bad.decision) == (DEGRADED, "RolledBack", "RollBack")
    assert bad.time_to_recovery_s == 0.613
    assert set(bad.deciding_gates) == {"no_safety_regression", "task_success_not_worse"}
    assert bad.reason.startswith("task_success_not_worse")


def test_triggers_are_what_was_armed(brief: BriefInput):
    assert set(brief.triggers) == {*RULES, "candidate_healthy"}
    assert brief.triggers[:4] == RULES[:4]


def test_live_arms_equal_the_ledger(brief: BriefInput):
    stable, candidate = brief.arms
    assert (stable.policy_version, candidate.policy_version) == (STABLE, CANDIDATE)
    assert (stable.num_runs, candidate.num_runs) == (200, 40)
    assert candidate.success_rate == 1.0
    expected = stable.success_rate * (1 - stable.human_override_rate) * (1 - stable.tool_error_rate)
    assert _reliability(stable) == pytest.approx(expected)
    assert stable.cost_per_success == pytest.approx(1200 * 200 / 120)


def test_the_learning_curve_is_the_ppo_stages(brief: BriefInput):
    assert [point.step for point in brief.learning] == list(range(1, 41))
    assert brief.learning[9].kl == pytest.approx(0.012)
    assert brief.calibration is not None
    assert (brief.reward_model, brief.calibration.ece) == ("rm_v1", 0.031)


def test_a_ppo_row_without_kl_still_draws_success(run: Path):
    (run / "metrics.jsonl").write_text(
        '{"stage": "ppo", "step": 1, "at": 0, "success": 0.5, "kl": 0.25}\n'
        '{"stage": "ppo", "step": 2, "at": 0, "success": 0.6}\n{"stage": "ppo", "step": 3, "at": 0}\n'
    )
    assert [(p.step, p.success, p.kl) for p in collect_brief_input(run).learning] == [(1, 0.5, 0.25), (2, 0.6, None)]


def test_canary_evidence_over_time(brief: BriefInput):
    curve = brief.release
    assert curve is not None
    points = curve.points
    assert len(points) == 9
    assert points[0].minutes == 0.0
    assert points[-1].minutes == pytest.approx(160 / 60)
    assert points[3].log10_e_pass == pytest.approx(1.4)
    assert [point.share for point in points] == [0.05] * 3 + [0.25] * 3 + [0.5] * 3
    assert curve.pass_limit == pytest.approx(1.301, abs=1e-3)
    assert curve.fail_limit == pytest.approx(2.0)


def test_an_empty_folder_measures_nothing(tmp_path: Path):
    brief = collect_brief_input(tmp_path, ledger=tmp_path / "absent.sqlite")
    assert (brief.bundle, brief.previous) == (None, None)
    assert (brief.suites, brief.intents, brief.main_suite) == ({}, [], None)
    assert (brief.offline_gates, brief.arms, brief.releases, brief.learning) == ((), (), (), ())
    assert (brief.release, brief.report, brief.written_at, brief.calibration) == (None, None, None, None)
    assert not (tmp_path / "absent.sqlite").exists(), "reading a ledger must not create one"


def test_a_release_of_another_candidate_is_not_this_briefs(tmp_path: Path):
    run, ledger = write_run(tmp_path)
    (run / "release" / "decisions.jsonl").unlink()
    brief = collect_brief_input(run, ledger=ledger)
    assert brief.release is None
    assert [row.candidate for row in brief.other_releases] == [DEGRADED]
    assert brief.arms == ()


def test_an_unfinished_release_shows_its_state(run: Path):
    log = run / "release" / "decisions.jsonl"
    log.write_text("".join(f"{line}\n" for line in log.read_text().splitlines()[:4]))
    release = collect_brief_input(run).release
    assert release is not None
    assert (release.state, release.decision, release.deciding_gates) == ("Canary", "Hold", ())
    log.write_text("")
    assert collect_brief_input(run).release is None


def test_a_release_beside_the_first_is_found_by_folder(run: Path):
    write_release(run / "release-2", "ppo-other", is_bad=True)
    assert {row.candidate for row in collect_brief_input(run).other_releases} == {DEGRADED, "ppo-other"}


def test_a_tampered_bundle_or_log_stops_the_brief(run: Path):
    edit_json(run / "bundle.json", bundle_id="0" * 64)
    with pytest.raises(TamperedError, match=r"bundle\.json"):
        collect_brief_input(run)
    (run / "bundle.json").write_text("{}")
    with pytest.raises(BadInputError, match="bundle"):
        collect_brief_input(run)
    (run / "bundle.json").unlink()
    (run / "release" / "decisions.jsonl").write_text("not json\n")
    with pytest.raises(TamperedError, match=r"decisions\.jsonl"):
        collect_brief_input(run)


@pytest.mark.parametrize(
    ("names", "found"),
    [(["frozen", "capability"], "capability"), (["frozen", "held_out"], "held_out"), (["adversarial"], ""), ([], "")],
)
def test_the_suite_of_ordinary_work(names: list[str], found: str):
    assert main_suite(names) == found


def test_the_charter_is_the_specs_and_the_rate_this_releases_own(brief: BriefInput):
    assert brief.workload.startswith("order support tickets")
    assert brief.constraints == CONSTRAINTS
    assert brief.tickets_per_s == pytest.approx(1380 / 180.4), "not the drill's 77 tickets"


def test_without_a_release_or_its_row_no_rate_is_made_up(run: Path):
    rows = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    others = [row for row in rows if row["stage"] != "canary"]
    (run / "journal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others))
    assert collect_brief_input(run).tickets_per_s is None
    for log in run.glob("release*/**/decisions.jsonl"):
        log.unlink()
    assert collect_brief_input(run).tickets_per_s is None


def test_a_run_from_before_the_charter_has_no_answers(run: Path):
    edit_json(run / "spec.resolved.json", charter={}, workflow={"name": "support_desk"})
    brief = collect_brief_input(run)
    assert (brief.workload, brief.constraints, brief.rollback_path) == ("", "", "")
