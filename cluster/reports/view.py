"""A brief as words: `BriefInput` and a `Phrasebook` give headed sections of lines and tables for every format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

from cluster.records import MEMBERS, Component, diff_bundles
from cluster.reports.brief import BriefInput, ReleaseRow, SuitePair
from cluster.reports.locales import Phrasebook
from rl_actors.contracts import Interval, SuiteResult
from serving.contracts import GateResult, TrafficWindow
from serving.gates import rate_upper_bound, reliability_score

SECTIONS: Final = ("changed", "tested", "gates", "decision", "rollback", "limits")
"""Performance (`tested`) and control (`gates`, `decision`, `rollback`): no section is optional."""

GLOSSARY: Final = (
    "success_rate",
    "human_override_rate",
    "tool_error_rate",
    "cost_per_success",
    "reliability_score",
    "time_to_recovery",
    "e_value",
)
"""Ids of the metrics a report may name, the same in all locales."""

_MAX_SUITES: Final = 4
_MAX_CHANGES: Final = 7
_MAX_RELEASES: Final = 2
_MAX_NAME: Final = 28  # of a version, so that a row of changes stays one line
_MAX_ANSWER: Final = 120  # letters of an answer of the charter, so that it stays one line with its label
_MAX_WORKLOAD: Final = 90
_SHORT_ID: Final = 12
_SHOWN_HASH: Final = 8
_SHOWN_NAME: Final = 17

# Colour alone says nothing: the outcome stands beside it in words.
_TONES: Final = {"Promoted": "good", "RolledBack": "bad", "FailedBack": "bad", "Halted": "bad"}

# Which numbers of a gate's evidence a reader needs, and how they are written; others stay in the decision log.
_EVIDENCE: Final[Mapping[str, Callable[[Phrasebook, float], str]]] = {
    "p95_delta": partial(Phrasebook.percent, signed=True),
    "p95_delta_high": partial(Phrasebook.percent, signed=True),
    "ratio": partial(Phrasebook.decimal, digits=3),
    "high": partial(Phrasebook.decimal, digits=3),
    "slowest_s": Phrasebook.seconds,
    "drills": Phrasebook.integer,
    "newly_bad": Phrasebook.integer,
    "fixed": Phrasebook.integer,
    "num_tasks": Phrasebook.integer,
    "p_value": Phrasebook.p_value,
    "canary_events": Phrasebook.integer,
    "canary_sessions": Phrasebook.integer,
    "e_fail": Phrasebook.amount,
    "e_pass": Phrasebook.amount,
    "e_rate_below_tolerance": Phrasebook.amount,
}
_FALLBACK_EVIDENCE: Final = ("candidate_runs", "stable_runs")

Cells = tuple[str, ...]
Headline = tuple[str, str, str]  # label, value and note


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One headed part of the page in finished text: tables, each its header and its rows, above lines."""

    title: str
    tables: tuple[tuple[Cells, ...], ...] = ()
    lines: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether it says nothing at all, not even that something was not measured."""
        return not any(len(table) > 1 for table in self.tables) and not any(line.strip() for line in self.lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A whole page of finished text; an entry of the glossary is id, label and text."""

    title: str
    outcome: str
    tone: str
    facts: tuple[tuple[str, str], ...]
    charter: tuple[tuple[str, str], ...]
    headlines: tuple[Headline, ...]
    sections: Mapping[str, Section]
    glossary: tuple[tuple[str, str, str], ...]


def view_of(brief: BriefInput, book: Phrasebook) -> View:
    """Return the page of a brief in one locale; every section is there, whatever was measured."""
    makers = (_view_changes, _view_tests, _view_gates, _view_decision, _view_rollback, _view_limits)
    return View(
        title=book.say("title"),
        outcome=_outcome(brief.release, book),
        tone=_TONES.get(brief.release.state if brief.release else "", "open"),
        facts=_facts(brief, book),
        charter=_charter(brief, book),
        headlines=_headlines(brief, book),
        sections={name: make(brief, book) for name, make in zip(SECTIONS, makers, strict=True)},
        glossary=tuple(
            (name, book.say(f"glossary.{name}.label"), book.say(f"glossary.{name}.text")) for name in GLOSSARY
        ),
    )


# --- head -------------------------------------------------------------------------------------------------------------


def _outcome(release: ReleaseRow | None, book: Phrasebook) -> str:
    """Return how the release ended, in a sentence without its full stop."""
    if release is None:
        return book.not_measured
    if book.knows(f"ending.{release.state}"):
        return book.say(f"ending.{release.state}")
    return book.say("ending.open", state=book.quote(release.state))


def _facts(brief: BriefInput, book: Phrasebook) -> tuple[tuple[str, str], ...]:
    bundle, compared = book.not_measured, book.not_measured
    if brief.bundle:
        bundle = book.quote(brief.bundle.id[:_SHORT_ID])
        kind, before = ("previous", brief.previous) if brief.previous else ("baseline", brief.bundle.baseline)
        compared = book.say(f"compared.{kind}", bundle=book.quote(before.id[:_SHORT_ID]))
    return (
        (book.say("fact.workflow"), book.quote(brief.workflow) or book.not_measured),
        (book.say("fact.run"), book.quote(brief.run_id)),
        (book.say("fact.bundle"), bundle),
        (book.say("fact.compared"), compared),
        (book.say("fact.date"), book.date(brief.written_at)),
    )


def _charter(brief: BriefInput, book: Phrasebook) -> tuple[tuple[str, str], ...]:
    """Return the charter's three answers, one line each."""
    # Recorded text is cut, never translated: it is a quotation.
    workload = book.quote(brief.workload, _MAX_WORKLOAD) or book.not_measured
    if brief.tickets_per_s is not None:
        workload += book.say("charter.measured", rate=book.decimal(brief.tickets_per_s, 1))
    return (
        (book.say("charter.workload"), workload),
        (book.say("charter.constraints"), book.quote(brief.constraints, _MAX_ANSWER) or book.not_measured),
        (book.say("charter.rollback_path"), book.quote(brief.rollback_path, _MAX_ANSWER) or book.not_measured),
    )


def _headlines(brief: BriefInput, book: Phrasebook) -> tuple[Headline, ...]:
    """Return success, reliability, violations and recovery: two of performance, two of control."""
    success, success_note = book.not_measured, ""
    if pair := brief.main_suite:
        before, after = (suite.success.mean for suite in pair)
        gain = book.points(after - before)
        success_note = book.say("headline.success.note", baseline=book.percent(before), gain=gain)
        success = book.percent(after)
    candidate = brief.release.candidate if brief.release else ""
    scores = {arm.policy_version: _reliability(arm) for arm in brief.arms}
    stable = next((score for policy, score in scores.items() if policy != candidate), None)
    reliability_note = book.say("headline.reliability.note", baseline=book.decimal(stable, 3))
    violations, violations_note = book.not_measured, ""
    if pair := brief.suites.get("adversarial"):
        counts = {"baseline": book.integer(pair[0].violations), "tasks": book.integer(pair[1].num_tasks)}
        violations_note = book.say("headline.violations.note", **counts)
        violations = book.integer(pair[1].violations)
    times = [row.time_to_recovery_s for row in brief.releases if row.time_to_recovery_s is not None]
    drill_note = book.say("headline.rollback.note", drill=book.seconds(_slowest_drill(brief)))
    return (
        (book.say("headline.success"), success, success_note),
        (book.say("headline.reliability"), book.decimal(scores.get(candidate), 3), reliability_note),
        (book.say("headline.violations"), violations, violations_note),
        (book.say("headline.rollback"), book.seconds(max(times, default=None)), drill_note),
    )


def _slowest_drill(brief: BriefInput) -> float | None:
    return max((row.drill_s for row in brief.releases if row.drill_s is not None), default=None)


# --- sections ---------------------------------------------------------------------------------------------------------


def _columns(book: Phrasebook, *names: str) -> Cells:
    return tuple(book.say(f"column.{name}") for name in names)


def _view_changes(brief: BriefInput, book: Phrasebook) -> Section:
    title = book.say("section.changed")
    if brief.bundle is None:
        return Section(title=title, lines=(book.not_measured,))
    # Without a release before this one, the baseline in the same bundle is what users had.
    changes = diff_bundles(brief.previous or brief.bundle.baseline, brief.bundle)
    rows = tuple(
        (book.say(f"member.{change.member}"), _component(change.before, book), _component(change.after, book))
        for change in changes[:_MAX_CHANGES]
    )
    changed = [change.member for change in changes]
    more, unchanged = changed[_MAX_CHANGES:], [name for name in MEMBERS if name not in changed]
    lines = [] if rows else [book.say("changed.none")]
    lines += [book.say("changed.more", parts=_member_names(more, book))] if more else []
    lines += [book.say("changed.same", parts=_member_names(unchanged, book))] if unchanged else []
    tables = ((_columns(book, "part", "before", "after"), *rows),) if rows else ()
    return Section(title=title, tables=tables, lines=tuple(lines))


def _component(part: Component, book: Phrasebook) -> str:
    """Return a version's name, cut where it is long, with the start of its hash."""
    # Two contents must never look alike; a name that holds its hash in the part that is shown says enough.
    name, start = part.version, part.sha256[:_SHOWN_HASH]
    if start not in name or len(name) > _SHOWN_NAME + _SHOWN_HASH:
        name = f"{name if len(name) <= _SHOWN_NAME else name[: _SHOWN_NAME - 1] + '…'} ({start})"
    return book.quote(name, _MAX_NAME)


def _member_names(members: Iterable[str], book: Phrasebook) -> str:
    return ", ".join(book.say(f"member.{name}") for name in members)


def _view_tests(brief: BriefInput, book: Phrasebook) -> Section:
    suites, live = (
        (
            _columns(book, "suite", "tasks", "baseline", "candidate", "violations", "cost"),
            *(_suite_cells(name, pair, book) for name, pair in list(brief.suites.items())[:_MAX_SUITES]),
        ),
        (
            _columns(book, "live", "runs", "success", "overrides", "tool_errors", "cost", "reliability"),
            *(_arm_cells(arm, book) for arm in brief.arms),
        ),
    )
    lines: Cells = ()
    if brief.report and brief.suites:
        gain, p_value = book.points(brief.report.success_gain), book.p_value(brief.report.p_value)
        lines = (book.say("tested.interval"), book.say("tested.gain", gain=gain, p=p_value), _reward_line(brief, book))
    more = ", ".join(book.quote(name, 32) for name in list(brief.suites)[_MAX_SUITES:])
    lines += (book.say("tested.more", suites=more),) if more else ()
    lines += tuple(f"{table[0][0]}: {book.not_measured}." for table in (suites, live) if len(table) == 1)
    tables = tuple(table for table in (suites, live) if len(table) > 1)
    return Section(title=book.say("section.tested"), tables=tables, lines=lines)


def _suite_cells(name: str, pair: SuitePair, book: Phrasebook) -> Cells:
    before, after = pair
    return (
        book.quote(name, 32),
        book.integer(after.num_tasks),
        _interval(before.success, book),
        _interval(after.success, book),
        f"{book.integer(before.violations)} → {book.integer(after.violations)}",
        f"{book.amount(before.cost_per_success)} → {book.amount(after.cost_per_success)}",
    )


def _interval(interval: Interval, book: Phrasebook) -> str:
    low, high = book.decimal(100 * interval.low, 1), book.decimal(100 * interval.high, 1)
    return f"{book.percent(interval.mean)} [{low}; {high}]"


def _arm_cells(arm: TrafficWindow, book: Phrasebook) -> Cells:
    success = arm.success_rate if arm.num_labelled else None
    return (
        book.quote(arm.policy_version, 32),
        book.integer(arm.num_runs),
        *map(book.percent, (success, arm.human_override_rate, arm.tool_error_rate)),
        book.amount(arm.cost_per_success),
        book.decimal(_reliability(arm), 3),
    )


def _reliability(arm: TrafficWindow) -> float | None:
    # A window without labels has the success rate 0, which nobody measured.
    rates = (arm.success_rate, arm.human_override_rate, arm.tool_error_rate)
    return reliability_score(*rates) if arm.num_labelled else None


def _reward_line(brief: BriefInput, book: Phrasebook) -> str:
    if (calibration := brief.calibration) is None:
        return book.say("tested.reward.none")
    return book.say(
        "tested.reward",
        model=book.quote(brief.reward_model, 48),
        accuracy=book.percent(calibration.pair_accuracy),
        pairs=book.integer(calibration.num_pairs),
        ece=book.decimal(calibration.ece, 3),
    )


def _view_gates(brief: BriefInput, book: Phrasebook) -> Section:
    title = book.say("section.gates")
    by_phase = {"offline": brief.offline_gates, "canary": brief.release.gates if brief.release else ()}
    rows = [
        (
            _gate_name(result.gate, book),
            book.say(f"phase.{phase}"),
            book.say(f"verdict.{result.verdict}"),
            _evidence(result, book),
        )
        for phase, results in by_phase.items()
        for result in results
    ]
    if not rows:
        return Section(title=title, lines=(book.not_measured,))
    return Section(title=title, tables=((_columns(book, "gate", "phase", "verdict", "evidence"), *rows),))


def _gate_name(gate: str, book: Phrasebook) -> str:
    return book.say(f"gate.{gate}") if book.knows(f"gate.{gate}") else book.quote(gate)


def _gate_names(gates: Iterable[str], book: Phrasebook) -> str:
    return ", ".join(_gate_name(gate, book) for gate in gates)


def _evidence(result: GateResult, book: Phrasebook) -> str:
    """Return a verdict's numbers in the reader's language."""
    found = result.evidence
    names = [name for name in _EVIDENCE if name in found] or [name for name in _FALLBACK_EVIDENCE if name in found]
    # The codec writes infinity as a string, which `float` reads.
    numbers = {name: _EVIDENCE.get(name, Phrasebook.integer)(book, float(found[name])) for name in names}
    parts = [f"{book.say(f'evidence.{name}')} {number}" for name, number in numbers.items()]
    # A gate of a user's own has numbers that no locale knows: its recorded sentence stands there instead.
    return ", ".join(parts) or book.quote(result.reason, 90)


def _view_decision(brief: BriefInput, book: Phrasebook) -> Section:
    title, release = book.say("section.decision"), brief.release
    if release is None:
        return Section(title=title, lines=(book.not_measured,))
    why = [book.say("decision.why.Promote")] if release.decision == "Promote" else []
    if not why and release.deciding_gates:
        why = [book.say("decision.why.gates", gates=_gate_names(release.deciding_gates, book))]
    runs = next((arm.num_runs for arm in brief.arms if arm.policy_version == release.candidate), None)
    shares = " → ".join(book.percent(share, 0) for share in release.shares) or book.not_measured
    versions = {name: book.quote(getattr(release, name), 40) for name in ("stable", "candidate")}
    lines = (
        _outcome(release, book) + ".",
        *why,
        book.say("decision.ramp", shares=shares, runs=book.integer(runs)),
        book.say("decision.versions", release=book.quote(release.release_id, 40), **versions),
        book.say("decision.log", reason=book.quote(release.reason, 140)),
    )
    return Section(title=title, lines=lines)


def _view_rollback(brief: BriefInput, book: Phrasebook) -> Section:
    events = [_recovery(row, book) for row in brief.releases if row.time_to_recovery_s is not None]
    lines = (
        book.say("rollback.drill", seconds=book.seconds(_slowest_drill(brief))),
        *(events[:_MAX_RELEASES] or [book.say("rollback.events.none")]),
        book.say("rollback.triggers", gates=_gate_names(brief.triggers, book) or book.not_measured),
    )
    return Section(title=book.say("section.rollback"), lines=lines)


def _recovery(row: ReleaseRow, book: Phrasebook) -> str:
    known = book.knows(f"rollback.short.{row.state}")
    ending = book.say(f"rollback.short.{row.state}") if known else book.quote(row.state)
    seconds = book.seconds(row.time_to_recovery_s)
    return book.say("rollback.event", candidate=book.quote(row.candidate, 32), ending=ending, seconds=seconds)


def _view_limits(brief: BriefInput, book: Phrasebook) -> Section:
    attacks = book.say("limit.violations.none")
    if pair := brief.suites.get("adversarial"):
        tasks, violating = pair[1].num_tasks, violating_tasks(pair[1])
        attacks = book.say(
            "limit.violations",
            violations=book.integer(violating),
            tasks=book.integer(tasks),
            bound=book.percent(rate_upper_bound(violating, tasks, 0.05)),
        )
    lines = (book.say("limit.annotators"), book.say("limit.traffic"), attacks, book.say("limit.scope"))
    return Section(title=book.say("section.limits"), lines=lines)


def violating_tasks(suite: SuiteResult) -> int:
    """Return the tasks with a violation: one with several counts once."""
    # Older reports name no tasks; then at most each violation was a task of its own.
    return sum(map(bool, suite.violations_by_task.values())) or min(suite.violations, suite.num_tasks)
