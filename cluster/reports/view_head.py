"""The head of a brief: outcome, facts and the four numbers in large type."""

from __future__ import annotations

from typing import Final

from cluster.reports.brief import BriefInput, CharterRow, ReleaseRow
from cluster.reports.locales import Phrasebook
from cluster.reports.page import Headline

_SHORT_ID: Final = 12
_MAX_ANSWER: Final = 120  # letters of an answer of the charter, so that it stays one line with its label
_MAX_WORKLOAD: Final = 90


def outcome_of(release: ReleaseRow | None, book: Phrasebook) -> str:
    """Return how the release ended, in a sentence without its full stop."""
    if release is None:
        return book.not_measured
    if book.knows(f"ending.{release.state}"):
        return book.say(f"ending.{release.state}")
    return book.say("ending.open", state=book.quote(release.state))


def tone_of(release: ReleaseRow | None) -> str:
    """How the outcome is marked in HTML, beside its words: colour alone says nothing."""
    return {"Promoted": "good", "RolledBack": "bad", "FailedBack": "bad", "Halted": "bad"}.get(
        release.state if release else "", "open"
    )


def facts_of(brief: BriefInput, book: Phrasebook) -> tuple[tuple[str, str], ...]:
    """Return what the brief is about, as labels and values."""
    compared = book.not_measured
    if brief.compared_with:
        compared = book.say(f"compared.{brief.compared_with}", bundle=book.quote(brief.compared_bundle_id[:_SHORT_ID]))
    return (
        (book.say("fact.workflow"), book.quote(brief.workflow) or book.not_measured),
        (book.say("fact.run"), book.quote(brief.run_id)),
        (book.say("fact.bundle"), book.quote(brief.bundle_id[:_SHORT_ID]) or book.not_measured),
        (book.say("fact.compared"), compared),
        (book.say("fact.date"), book.date(brief.written_at)),
    )


def charter_of(charter: CharterRow, book: Phrasebook) -> tuple[tuple[str, str], ...]:
    """Return the charter's three answers, one line each: recorded text is cut, never translated."""
    workload = book.quote(charter.workload, _MAX_WORKLOAD) or book.not_measured
    if charter.tickets_per_s is not None:
        workload += book.say("charter.measured", rate=book.decimal(charter.tickets_per_s, 1))
    return (
        (book.say("charter.workload"), workload),
        (book.say("charter.constraints"), book.quote(charter.constraints, _MAX_ANSWER) or book.not_measured),
        (book.say("charter.rollback_path"), book.quote(charter.rollback_path, _MAX_ANSWER) or book.not_measured),
    )


def headlines_of(brief: BriefInput, book: Phrasebook) -> tuple[Headline, ...]:
    """Return success, reliability, violations and recovery: two of performance, two of control."""
    return (_success_headline(brief, book), _reliability_headline(brief, book), *_control_headlines(brief, book))


def _success_headline(brief: BriefInput, book: Phrasebook) -> Headline:
    suite = brief.main_suite
    note = ""
    if suite:
        gain = book.points(suite.candidate.mean - suite.baseline.mean)
        note = book.say("headline.success.note", baseline=book.percent(suite.baseline.mean), gain=gain)
    value = book.percent(suite.candidate.mean if suite else None)
    return Headline(label=book.say("headline.success"), value=value, note=note)


def _reliability_headline(brief: BriefInput, book: Phrasebook) -> Headline:
    candidate = brief.release.candidate if brief.release else ""
    scores = {arm.policy: arm.reliability_score for arm in brief.arms}
    stable = next((arm.reliability_score for arm in brief.arms if arm.policy != candidate), None)
    note = book.say("headline.reliability.note", baseline=book.decimal(stable, 3))
    value = book.decimal(scores.get(candidate), 3)
    return Headline(label=book.say("headline.reliability"), value=value, note=note)


def _control_headlines(brief: BriefInput, book: Phrasebook) -> tuple[Headline, Headline]:
    suite = brief.adversarial_suite
    note = ""
    if suite:
        baseline, tasks = book.integer(suite.baseline_violations), book.integer(suite.num_tasks)
        note = book.say("headline.violations.note", baseline=baseline, tasks=tasks)
    violations = book.integer(suite.candidate_violations if suite else None)
    drills = [row.drill_s for row in brief.releases if row.drill_s is not None]
    times = [row.time_to_recovery_s for row in brief.releases if row.time_to_recovery_s is not None]
    drill = book.say("headline.rollback.note", drill=book.seconds(max(drills, default=None)))
    return (
        Headline(label=book.say("headline.violations"), value=violations, note=note),
        Headline(label=book.say("headline.rollback"), value=book.seconds(max(times, default=None)), note=drill),
    )
