"""A brief as words: `BriefInput` and a `Phrasebook` give headed sections of lines and tables for every format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from cluster.reports.brief import GLOSSARY, SECTIONS, ArmRow, BriefInput, GateRow, ReleaseRow, SuiteRow
from cluster.reports.locales import Phrasebook
from cluster.reports.page import Section, Table, View
from cluster.reports.view_head import charter_of, facts_of, headlines_of, outcome_of, tone_of
from rl_actors.contracts import Interval
from serving.gates import rate_upper_bound

_MAX_SUITES: Final = 4
_MAX_CHANGES: Final = 7
_MAX_RELEASES: Final = 2
_MAX_NAME: Final = 28  # of a version, so that a row of changes stays one line

# Which numbers of a gate's evidence a reader needs, and how they are written; others stay in the decision log.
_EVIDENCE: Final[Mapping[str, str]] = {
    "p95_delta": "signed_percent",
    "p95_delta_high": "signed_percent",
    "ratio": "decimal",
    "high": "decimal",
    "slowest_s": "seconds",
    "drills": "integer",
    "newly_bad": "integer",
    "fixed": "integer",
    "num_tasks": "integer",
    "p_value": "p_value",
    "canary_events": "integer",
    "canary_sessions": "integer",
    "e_fail": "amount",
    "e_pass": "amount",
    "e_rate_below_tolerance": "amount",
}
_FALLBACK_EVIDENCE: Final = ("candidate_runs", "stable_runs")


def view_of(brief: BriefInput, book: Phrasebook) -> View:
    """Return the page of a brief in one locale; every section is there, whatever was measured."""
    makers = {
        "changed": _changed,
        "tested": _tested,
        "gates": _gates,
        "decision": _decision,
        "rollback": _rollback,
        "limits": _limits,
    }
    return View(
        title=book.say("title"),
        outcome=outcome_of(brief.release, book),
        tone=tone_of(brief.release),
        facts=facts_of(brief, book),
        charter=charter_of(brief.charter, book),
        headlines=headlines_of(brief, book),
        sections={name: makers[name](brief, book) for name in SECTIONS},
        glossary=tuple(
            (name, book.say(f"glossary.{name}.label"), book.say(f"glossary.{name}.text")) for name in GLOSSARY
        ),
    )


# --- sections ---------------------------------------------------------------------------------------------------------


def _columns(book: Phrasebook, *names: str) -> tuple[str, ...]:
    return tuple(book.say(f"column.{name}") for name in names)


def _changed(brief: BriefInput, book: Phrasebook) -> Section:
    title = book.say("section.changed")
    if brief.changes is None:
        return Section(id="changed", title=title, lines=(book.not_measured,))
    rows = tuple(
        (book.say(f"member.{change.member}"), book.quote(change.before, _MAX_NAME), book.quote(change.after, _MAX_NAME))
        for change in brief.changes[:_MAX_CHANGES]
    )
    more = [change.member for change in brief.changes[_MAX_CHANGES:]]
    lines = [] if rows else [book.say("changed.none")]
    lines += [book.say("changed.more", parts=_member_names(more, book))] if more else []
    lines += [book.say("changed.same", parts=_member_names(brief.unchanged, book))] if brief.unchanged else []
    tables = (Table(headers=_columns(book, "part", "before", "after"), rows=rows),) if rows else ()
    return Section(id="changed", title=title, tables=tables, lines=tuple(lines))


def _member_names(members: Sequence[str], book: Phrasebook) -> str:
    return ", ".join(book.say(f"member.{name}") for name in members)


def _tested(brief: BriefInput, book: Phrasebook) -> Section:
    suites = Table(
        headers=_columns(book, "suite", "tasks", "baseline", "candidate", "violations", "cost"),
        rows=tuple(_suite_cells(row, book) for row in brief.suites[:_MAX_SUITES]),
    )
    live = Table(
        headers=_columns(book, "live", "runs", "success", "overrides", "tool_errors", "cost", "reliability"),
        rows=tuple(_arm_cells(arm, book) for arm in brief.arms),
    )
    gain = book.say("tested.gain", gain=book.points(brief.success_gain), p=book.p_value(brief.p_value))
    lines = (book.say("tested.interval"), gain, _reward_line(brief, book)) if brief.suites else ()
    more = ", ".join(book.quote(row.suite, 32) for row in brief.suites[_MAX_SUITES:])
    lines += (book.say("tested.more", suites=more),) if more else ()
    missing = tuple(f"{table.headers[0]}: {book.not_measured}." for table in (suites, live) if not table.rows)
    tables = tuple(table for table in (suites, live) if table.rows)
    return Section(id="tested", title=book.say("section.tested"), tables=tables, lines=(*lines, *missing))


def _suite_cells(row: SuiteRow, book: Phrasebook) -> tuple[str, ...]:
    return (
        book.quote(row.suite, 32),
        book.integer(row.num_tasks),
        _interval(row.baseline, book),
        _interval(row.candidate, book),
        f"{book.integer(row.baseline_violations)} → {book.integer(row.candidate_violations)}",
        f"{book.amount(row.baseline_cost)} → {book.amount(row.candidate_cost)}",
    )


def _interval(interval: Interval, book: Phrasebook) -> str:
    low, high = book.decimal(100 * interval.low, 1), book.decimal(100 * interval.high, 1)
    return f"{book.percent(interval.mean)} [{low}; {high}]"


def _arm_cells(arm: ArmRow, book: Phrasebook) -> tuple[str, ...]:
    rates = (arm.success_rate, arm.human_override_rate, arm.tool_error_rate)
    return (
        book.quote(arm.policy, 32),
        book.integer(arm.num_runs),
        *map(book.percent, rates),
        book.amount(arm.cost_per_success),
        book.decimal(arm.reliability_score, 3),
    )


def _reward_line(brief: BriefInput, book: Phrasebook) -> str:
    calibration = brief.calibration
    if calibration is None:
        return book.say("tested.reward.none")
    return book.say(
        "tested.reward",
        model=book.quote(brief.reward_model, 48),
        accuracy=book.percent(calibration.pair_accuracy),
        pairs=book.integer(calibration.num_pairs),
        ece=book.decimal(calibration.ece, 3),
    )


def _gates(brief: BriefInput, book: Phrasebook) -> Section:
    title = book.say("section.gates")
    if not brief.gates:
        return Section(id="gates", title=title, lines=(book.not_measured,))
    rows = tuple(_gate_cells(row, book) for row in brief.gates)
    return Section(
        id="gates",
        title=title,
        tables=(Table(headers=_columns(book, "gate", "phase", "verdict", "evidence"), rows=rows),),
    )


def _gate_cells(row: GateRow, book: Phrasebook) -> tuple[str, ...]:
    verdict = book.say(f"verdict.{row.result.verdict}")
    return _gate_name(row.result.gate, book), book.say(f"phase.{row.phase}"), verdict, _evidence(row, book)


def _gate_name(gate: str, book: Phrasebook) -> str:
    return book.say(f"gate.{gate}") if book.knows(f"gate.{gate}") else book.quote(gate)


def _evidence(row: GateRow, book: Phrasebook) -> str:
    """Write the numbers in the reader's language; a verdict without known numbers keeps its recorded sentence."""
    found = row.result.evidence
    names = [name for name in _EVIDENCE if name in found] or [name for name in _FALLBACK_EVIDENCE if name in found]
    parts = [f"{book.say(f'evidence.{name}')} {_amount(name, found[name], book)}" for name in names]
    return ", ".join(parts) or book.quote(row.result.reason, 90)


def _amount(name: str, value: float | str, book: Phrasebook) -> str:
    number = float(value)
    match _EVIDENCE.get(name, "integer"):
        case "signed_percent":
            return book.percent(number, signed=True)
        case "seconds":
            return book.seconds(number)
        case "integer":
            return book.integer(number)
        case "p_value":
            return book.p_value(number)
        case "decimal":
            return book.decimal(number, 3)
        case _:
            return book.amount(number)


def _decision(brief: BriefInput, book: Phrasebook) -> Section:
    title, release = book.say("section.decision"), brief.release
    if release is None:
        return Section(id="decision", title=title, lines=(book.not_measured,))
    why = [book.say("decision.why.Promote")] if release.decision == "Promote" else []
    if not why and release.deciding_gates:
        why = [book.say("decision.why.gates", gates=_gate_names(release.deciding_gates, book))]
    runs = next((arm.num_runs for arm in brief.arms if arm.policy == release.candidate), None)
    shares = " → ".join(book.percent(share, 0) for share in release.shares) or book.not_measured
    stable, candidate = book.quote(release.stable, 40), book.quote(release.candidate, 40)
    return Section(
        id="decision",
        title=title,
        lines=(
            outcome_of(release, book) + ".",
            *why,
            book.say("decision.ramp", shares=shares, runs=book.integer(runs)),
            book.say(
                "decision.versions", stable=stable, candidate=candidate, release=book.quote(release.release_id, 40)
            ),
            book.say("decision.log", reason=book.quote(release.reason, 140)),
        ),
    )


def _gate_names(gates: Sequence[str], book: Phrasebook) -> str:
    return ", ".join(_gate_name(gate, book) for gate in gates)


def _rollback(brief: BriefInput, book: Phrasebook) -> Section:
    drills = [row.drill_s for row in brief.releases if row.drill_s is not None]
    events = [_recovery(row, book) for row in brief.releases if row.time_to_recovery_s is not None]
    triggers = _gate_names(brief.triggers, book) or book.not_measured
    lines = (
        book.say("rollback.drill", seconds=book.seconds(max(drills, default=None))),
        *(events[:_MAX_RELEASES] or [book.say("rollback.events.none")]),
        book.say("rollback.triggers", gates=triggers),
    )
    return Section(id="rollback", title=book.say("section.rollback"), lines=lines)


def _recovery(row: ReleaseRow, book: Phrasebook) -> str:
    known = book.knows(f"rollback.short.{row.state}")
    ending = book.say(f"rollback.short.{row.state}") if known else book.quote(row.state)
    seconds = book.seconds(row.time_to_recovery_s)
    return book.say("rollback.event", candidate=book.quote(row.candidate, 32), ending=ending, seconds=seconds)


def _limits(brief: BriefInput, book: Phrasebook) -> Section:
    suite = brief.adversarial_suite
    attacks = book.say("limit.violations.none")
    if suite:
        bound = rate_upper_bound(suite.candidate_violating_tasks, suite.num_tasks, 0.05)
        attacks = book.say(
            "limit.violations",
            violations=book.integer(suite.candidate_violating_tasks),
            tasks=book.integer(suite.num_tasks),
            bound=book.percent(bound),
        )
    lines = (book.say("limit.annotators"), book.say("limit.traffic"), attacks, book.say("limit.scope"))
    return Section(id="limits", title=book.say("section.limits"), lines=lines)
