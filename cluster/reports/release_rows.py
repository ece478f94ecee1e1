"""Releases as their decision logs tell them: endings, drills, recoveries, triggers, evidence over time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.reports.brief import CanaryCurve, EvidencePoint, GateRow, ReleaseRow
from rl_actors.durable import ChainedLog, decode
from serving.contracts import GateResult
from serving.gates import GATES
from serving.release import HEALTHY

_EVENT_GATES = ("task_success_not_worse", "no_safety_regression")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseLog:
    """The decision rows of one release, oldest first; never empty."""

    rows: Sequence[Mapping[str, Any]]

    @classmethod
    def read(cls, path: Path) -> ReleaseLog:
        """Read a `decisions.jsonl`. Raises TamperedError when its chain does not fit."""
        return cls(rows=ChainedLog(path).rows())

    @property
    def release(self) -> Mapping[str, str]:
        """Ids of the release and of its two policies; empty in an empty log."""
        return self.rows[0]["release"] if self.rows else {}

    @property
    def stable(self) -> str:
        """Policy version that carried the traffic before."""
        return self.release.get("stable", "")

    @property
    def candidate(self) -> str:
        """Policy version that was tried."""
        return self.release.get("candidate", "")

    @property
    def canary_rows(self) -> list[Mapping[str, Any]]:
        """Decisions made while the candidate carried a share of the traffic."""
        return [row for row in self.rows if row["state"]["kind"] == "Canary"]


def release_row(log: ReleaseLog, spec: Mapping[str, Any]) -> ReleaseRow:
    """Return how a release ended. Without an ending its present state stands there."""
    last, decided = log.rows[-1]["next_state"], _deciding_row(log)
    steps = sorted({int(row["state"]["step"]) for row in log.canary_rows})
    shares = [_share(spec, step) for step in steps]
    return ReleaseRow(
        release_id=log.release["release_id"],
        stable=log.stable,
        candidate=log.candidate,
        state=last["kind"],
        decision=decided["decision"],
        reason=last.get("reason") or decided["reason"],
        deciding_gates=tuple(_deciding_gates(decided)),
        shares=tuple(share for share in shares if share is not None),
        time_to_recovery_s=_optional(last.get("time_to_recovery_s")),
        drill_s=_drill_seconds(log),
    )


def _deciding_row(log: ReleaseLog) -> Mapping[str, Any]:
    """Return the last decision that chose an ending, else the last one."""
    endings = [row for row in log.rows if row["decision"] in {"Promote", "RollBack", "Halt"}]
    return (endings or log.rows)[-1]


def _deciding_gates(row: Mapping[str, Any]) -> Iterator[str]:
    wanted = {"Promote": {"pass"}, "RollBack": {"fail"}, "Halt": {"invalid"}}.get(row["decision"], set())
    for result in row["evidence"]:
        if result["verdict"] in wanted and result["gate"] in {*GATES, HEALTHY}:
            yield result["gate"]


def _drill_seconds(log: ReleaseLog) -> float | None:
    """Slowest drill: from the order at share 0 until every gateway acknowledged it."""
    drills = [row for row in log.rows if row["state"]["kind"] == "Drilling" and row["decision"] == "Advance"]
    return max((float(row["at"]) - float(row["state"]["started_at"]) for row in drills), default=None)


def live_gates(log: ReleaseLog | None) -> Iterator[GateRow]:
    """Yield the verdicts of the last canary tick: those the decision was made on."""
    rows = log.canary_rows if log else []
    found = rows[-1]["evidence"] if rows else []
    for result in decode(list[GateResult], found):
        if result.gate in GATES:
            yield GateRow(phase="canary", result=result)


def triggers_of(logs: Iterable[ReleaseLog], spec: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what can roll back on its own: the spec's gates, and whatever the logs show was armed besides."""
    armed = {result["gate"] for log in logs for row in log.canary_rows for result in row["evidence"]}
    names = [*spec.get("gates", ()), *sorted(armed & {*GATES, HEALTHY})]
    return tuple(dict.fromkeys(names))


def canary_curve(log: ReleaseLog | None, spec: Mapping[str, Any]) -> CanaryCurve:
    """Return the event test over time with the limits at which it decides: 1/alpha, fails shared among the rules."""
    rows = [(row, found) for row in (log.canary_rows if log else []) if (found := _event_evidence(row))]
    start = min((float(row["at"]) for row, _ in rows), default=0.0)
    points = tuple(
        EvidencePoint(
            minutes=(float(row["at"]) - start) / 60,
            log10_e_fail=_log10(found["e_fail"]),
            log10_e_pass=_log10(found["e_pass"]),
            share=_share(spec, int(row["state"]["step"])),
        )
        for row, found in rows
    )
    alpha = _optional(spec.get("alpha"))
    rules = len({result["gate"] for row, _ in rows for result in row["evidence"]} & set(GATES))
    return CanaryCurve(
        points=points,
        fail_limit=math.log10(rules / alpha) if alpha and rules else None,
        pass_limit=math.log10(1 / alpha) if alpha else None,
    )


def _event_evidence(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the evidence of the success rule, else of the safety gate; None on a tick that had neither."""
    by_gate = {result["gate"]: result["evidence"] for result in row["evidence"]}
    found = (by_gate[gate] for gate in _EVENT_GATES if {"e_fail", "e_pass"} <= set(by_gate.get(gate, ())))
    return next(found, None)


def _share(spec: Mapping[str, Any], step: int) -> float | None:
    ramp = spec.get("ramp", ())
    return float(ramp[step]) / 100 if step < len(ramp) else None


def _log10(value: object) -> float:
    number = float(str(value))
    return math.log10(number) if number > 0 else -math.inf


def _optional(value: object) -> float | None:
    return None if value is None else float(str(value))
