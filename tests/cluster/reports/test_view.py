"""The words of a brief: headlines, facts and sections say what the rows say, or that nothing was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.reports.brief import BriefInput, collect_brief_input
from cluster.reports.locales import Phrasebook
from cluster.reports.view import GLOSSARY, SECTIONS, Section, view_of
from tests.cluster.reports.run_folders import CANDIDATE, STABLE, write_run


@pytest.fixture(scope="module")
def brief(tmp_path_factory: pytest.TempPathFactory) -> BriefInput:
    run, ledger = write_run(tmp_path_factory.mktemp("home"))
    return collect_brief_input(run, ledger=ledger)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> BriefInput:
    return collect_brief_input(tmp_path_factory.mktemp("run"))


@pytest.fixture
def book() -> Phrasebook:
    return Phrasebook("en-US")


# --- head -------------------------------------------------------------------------------------------------------------


def test_the_headlines_are_two_of_performance_and_two_of_control(brief: BriefInput, book: Phrasebook):
    assert view_of(brief, book).headlines == (
        ("Held-out task success", "89.2%", "baseline 71.2%, +18.0\u00a0points"),
        ("Reliability score in canary", "0.967", "stable 0.474"),
        ("Adversarial violations", "6", "baseline 31, of 200 tasks"),
        ("Time to recovery, worst", "0.61\u00a0s", "slowest drill 0.42\u00a0s"),
    )


def test_unmeasured_headlines_have_no_number(empty: BriefInput, book: Phrasebook):
    shown = view_of(empty, book).headlines
    assert [value for _, value, _ in shown] == ["not measured"] * 4
    assert not any(character.isdigit() for _, _, note in shown for character in note)


def test_the_worst_recovery_of_all_releases_is_shown(brief: BriefInput, book: Phrasebook):
    (bad,) = brief.other_releases
    slower = replace(bad, time_to_recovery_s=7.25, drill_s=3.5)
    shown = view_of(replace(brief, other_releases=(bad, slower)), book).headlines[3]
    assert shown[1:] == ("7.25\u00a0s", "slowest drill 3.50\u00a0s")


def test_without_live_traffic_the_reliability_score_is_not_measured(brief: BriefInput, book: Phrasebook):
    assert view_of(replace(brief, arms=()), book).headlines[1][1:] == ("not measured", "stable not measured")
    unlabelled = replace(brief, arms=tuple(replace(arm, num_labelled=0, num_successes=0) for arm in brief.arms))
    assert view_of(unlabelled, book).headlines[1][1:] == ("not measured", "stable not measured")
    assert [row[2] for row in view_of(unlabelled, book).sections["tested"].tables[1][1:]] == ["not measured"] * 2


def test_the_facts_name_bundle_run_and_comparison(brief: BriefInput, book: Phrasebook):
    assert brief.bundle is not None
    facts = dict(view_of(brief, book).facts)
    assert facts["Workflow"] == "support_desk"
    assert facts["Bundle"] == brief.bundle.id[:12]
    assert facts["Compared with"] == f"frozen baseline {brief.bundle.baseline.id[:12]}"
    assert facts["Date"] == "November 22, 2026"
    previous = dict(view_of(replace(brief, previous=brief.bundle), book).facts)
    assert previous["Compared with"].startswith("previous release")


def test_unknown_facts_are_not_measured(empty: BriefInput, book: Phrasebook):
    facts = dict(view_of(empty, book).facts)
    assert {facts[name] for name in ("Workflow", "Bundle", "Compared with", "Date")} == {"not measured"}
    assert facts["Run"] == empty.run_id


@pytest.mark.parametrize(
    ("state", "tone", "words"),
    [
        ("Promoted", "good", "Promoted"),
        ("RolledBack", "bad", "Rolled back"),
        ("FailedBack", "bad", "Failed back"),
        ("Halted", "bad", "Halted"),
        ("Promoting", "open", "Not decided yet: Promoting"),
    ],
)
def test_the_outcome_is_said_in_words_beside_its_colour(
    brief: BriefInput, book: Phrasebook, state: str, tone: str, words: str
):
    assert brief.release is not None
    view = view_of(replace(brief, release=replace(brief.release, state=state)), book)
    assert (view.tone, view.outcome.startswith(words)) == (tone, True)
    undecided = view_of(replace(brief, release=None), book)
    assert (undecided.tone, undecided.outcome) == ("open", "not measured")


# --- sections ---------------------------------------------------------------------------------------------------------


def test_the_sections_stand_in_their_order(brief: BriefInput, book: Phrasebook):
    assert tuple(view_of(brief, book).sections) == SECTIONS
    titles = [section.title for section in view_of(brief, book).sections.values()]
    assert titles == [book.say(f"section.{name}") for name in SECTIONS]


def test_suites_show_both_policies_with_intervals(brief: BriefInput, book: Phrasebook):
    suites, live = view_of(brief, book).sections["tested"].tables
    assert suites[2] == (
        "adversarial",
        "200",
        "64.0% [57.3; 70.7]",
        "83.0% [77.8; 88.2]",
        "31 → 6",
        "2,210 → 1,702",
    )
    assert live[2] == (CANDIDATE, "40", "100.0%", "0.0%", "3.3%", "1,200", "0.967")
    assert live[1][0] == STABLE


def test_what_was_not_tested_says_so(brief: BriefInput, book: Phrasebook):
    offline_only = view_of(replace(brief, arms=()), book).sections["tested"]
    assert len(offline_only.tables) == 1
    assert offline_only.lines[-1] == "Live traffic: not measured."
    live_only = view_of(replace(brief, report=None), book).sections["tested"]
    assert live_only.lines == ("Suite: not measured.",)
    blind = view_of(replace(brief, calibration=None), book).sections["tested"]
    assert "Reward model calibration: not measured." in blind.lines


def test_the_release_decision_cites_its_log(brief: BriefInput, book: Phrasebook):
    assert view_of(brief, book).sections["decision"].lines == (
        "Promoted: the candidate carries all traffic.",
        "All gates passed at the last ramp step.",
        "Canary shares: 5% → 25% → 50%; 40 candidate runs in the canary.",
        f"Stable {STABLE}, candidate {CANDIDATE}, release release-{CANDIDATE}.",
        "Decision log: “all gates passed at the last step”",
    )


def test_the_rollback_guarantee_is_drill_recovery_and_triggers(brief: BriefInput, book: Phrasebook):
    drill, recovery, triggers = view_of(brief, book).sections["rollback"].lines
    assert drill.startswith("Rollback drill before any user traffic: 0.42\u00a0s")
    assert recovery == "degraded-77ab01cd: rolled back, time to recovery 0.61\u00a0s."
    assert triggers.startswith("Automatic triggers: no safety regression, latency within its limit")
    assert "task success not worse" in triggers


def test_a_guarantee_without_evidence_is_none(empty: BriefInput, book: Phrasebook):
    assert view_of(empty, book).sections["rollback"].lines == (
        "Rollback drill before any user traffic: not measured from order to acknowledgement by every gateway.",
        "Time to recovery of a real roll back: not measured.",
        "Automatic triggers: not measured.",
    )


@pytest.mark.parametrize(
    ("violating", "tasks", "bound"), [(0, 200, "1.5%"), (6, 200, "5.8%"), (200, 200, "100.0%"), (0, 20, "13.9%")]
)
def test_few_clean_attacks_prove_little(brief: BriefInput, book: Phrasebook, violating: int, tasks: int, bound: str):
    """Zero violations in n clean prompts only show a rate below about 3/n."""
    assert brief.report is not None
    by_task = {f"task {i}": ("leak",) for i in range(violating)}
    suite = replace(brief.report.candidate["adversarial"], violations=violating, num_tasks=tasks)
    attacked = replace(brief.report, candidate={"adversarial": replace(suite, violations_by_task=by_task)})
    limit = view_of(replace(brief, report=attacked), book).sections["limits"].lines[2]
    assert (
        limit
        == f"{violating} of {tasks} adversarial tasks violated policy: the true rate may reach {bound} (95% bound)."
    )


def test_the_glossary_has_every_id_in_the_same_order():
    ids = {locale: [entry[0] for entry in view_glossary(locale)] for locale in ("en-US", "en-GB", "fr")}
    assert ids["en-US"] == ids["en-GB"] == ids["fr"] == list(GLOSSARY)


def view_glossary(locale: str) -> tuple[tuple[str, str, str], ...]:
    return view_of(collect_brief_input(Path("/nonexistent/run")), Phrasebook(locale)).glossary  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("section", "is_empty"),
    [
        (Section(title="t"), True),
        (Section(title="t", lines=("", " ")), True),
        (Section(title="t", tables=((("h",),),)), True),
        (Section(title="t", lines=("not measured",)), False),
        (Section(title="t", tables=((("h",), ("v",)),)), False),
    ],
)
def test_a_section_is_empty_when_it_says_nothing(section: Section, is_empty: bool):
    assert section.is_empty == is_empty
