"""The log of a release's decisions, from which the controller reads its state back."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rl_actors.contracts import BadInputError
from rl_actors.durable import ChainedLog, encode
from serving import contracts
from serving.contracts import Decision, Drill, Release, ReleaseState


class DecisionLog:
    """`decisions.jsonl` of one release: every decision with its evidence, and the state it led to."""

    def __init__(self, directory: Path) -> None:
        self._log = ChainedLog(directory / "decisions.jsonl")

    def append(
        self, release: Release, before: ReleaseState, decision: Decision, after: ReleaseState, at: float
    ) -> None:
        """Write and sync one row."""
        row = {
            "at": at,
            "release": asdict(release),
            "state": _state_row(before),
            "decision": type(decision).__name__,
            "reason": decision.reason,
            "evidence": [asdict(result) for result in decision.evidence],
            "next_state": _state_row(after),
        }
        self._log.append(encode(row))

    def state(self, release: Release) -> ReleaseState | None:
        """Return the last recorded state, None before the first. Raises BadInputError for another release's log."""
        rows = self._log.rows()
        if rows and rows[-1]["release"] != asdict(release):
            raise BadInputError("release", asdict(release), f"{self._log.path} belongs to {rows[-1]['release']}")
        values = dict(rows[-1]["next_state"]) if rows else {}
        return getattr(contracts, values.pop("kind"))(**values) if values else None

    def last_at(self) -> float:
        """Return when the last row was written, in Unix seconds; 0 before the first."""
        rows = self._log.rows()
        return float(rows[-1]["at"]) if rows else 0.0

    def drills(self) -> tuple[Drill, ...]:
        """Return the timed rollback drills of this release."""
        return tuple(
            Drill(at=row["at"], seconds=row["at"] - row["state"]["started_at"])
            for row in self._log.rows()
            if row["state"]["kind"] == "Drilling" and row["decision"] == "Advance"
        )


def _state_row(state: ReleaseState) -> dict[str, Any]:
    return {"kind": type(state).__name__} | asdict(state)
