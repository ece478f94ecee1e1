"""The Reliability Brief as data (requirements 110-118), read from the rows of a run folder and from nothing else.

None and empty mean "not measured", never zero. Read, all optional:

* `spec.resolved.json`: `workflow.name`, `workflow.target`; `charter`; `release.gates`,
  `release.ramp` (percent), `release.alpha`.
* `bundle.json`: `Bundle`; `bundle.previous.json`: the bundle to compare with, else its own baseline.
* `journal.jsonl`: the output of stage `offline_gates` (a list of GateResult, or an object with them under `results`);
  the first output with a `calibration` (a RewardModelVersion: `name`, `calibration`); `requests` of the output with
  this brief's `release_id`; the last `finished_at`.
* `eval/*.json`: `codec.encode(EvalReport)`; the one whose suites' candidate `policy` is the bundle's policy version.
* `metrics.jsonl`, stage `ppo`: `step`, `success`, `kl_to_reference` (or `kl`).
* `release*/**/decisions.jsonl`: `DecisionLog` rows, one log per release; this brief's is the one
  whose candidate is the bundle's policy version, the others appear under rollback.
* the request ledger at the path given: channel `canary` of the candidate, `general` of stable.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cluster.records import Bundle, load_bundle
from rl_actors.contracts import Calibration, EvalReport, SuiteResult
from rl_actors.durable import ChainedLog, decode, read_metrics, read_rows
from serving.contracts import GateResult, ReleaseChannel, TrafficWindow
from serving.gates import GATES
from serving.release import HEALTHY
from serving.store import RequestLedger

OFFLINE_GATES: Final = "offline_gates"

# The suite whose tasks look like traffic; the adversarial one is special on purpose.
_ORDINARY_SUITES: Final = ("capability", "held_out", "frozen")
_EVENT_GATES: Final = ("task_success_not_worse", "no_safety_regression")
_DECIDING_VERDICTS: Final = {"Promote": "pass", "RollBack": "fail", "Halt": "invalid"}

Row = Mapping[str, Any]
SuitePair = tuple[SuiteResult, SuiteResult]
"""Baseline and candidate on the same tasks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningPoint:
    """One PPO step: success of the rollouts as a fraction, KL to the baseline in nats per token."""

    step: int
    success: float
    kl: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvidencePoint:
    """One tick of the canary: log10 e-values of the event test, and the share then in force."""

    minutes: float
    log10_e_fail: float
    log10_e_pass: float
    share: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseRow:
    """How one release ended (`state`: Promoted, RolledBack, ...) and why; recovery None where none was needed.

    `gates` are the verdicts of the last canary tick, on which it was decided; `armed` is every gate and stop rule that
    ran. The limits are log10 of the e-values at which the event test decides.
    """

    release_id: str
    stable: str
    candidate: str
    state: str
    decision: str
    reason: str
    deciding_gates: tuple[str, ...]
    shares: tuple[float, ...]
    time_to_recovery_s: float | None
    drill_s: float | None
    duration_s: float
    gates: tuple[GateResult, ...]
    armed: frozenset[str]
    points: tuple[EvidencePoint, ...]
    fail_limit: float | None
    pass_limit: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BriefInput:
    """Everything a brief may say; `workload`, `constraints` and `rollback_path` are the charter's answers."""

    run_id: str
    workflow: str
    workload: str
    constraints: str
    rollback_path: str
    tickets_per_s: float | None
    written_at: float | None
    bundle: Bundle | None
    previous: Bundle | None
    report: EvalReport | None
    reward_model: str
    calibration: Calibration | None
    arms: tuple[TrafficWindow, ...]
    offline_gates: tuple[GateResult, ...]
    release: ReleaseRow | None
    other_releases: tuple[ReleaseRow, ...]
    triggers: tuple[str, ...]
    learning: tuple[LearningPoint, ...]

    @property
    def suites(self) -> Mapping[str, SuitePair]:
        """The suites that both policies took, by name."""
        if self.report is None:
            return {}
        before, after = self.report.baseline, self.report.candidate
        return {name: (before[name], after[name]) for name in after if name in before}

    @property
    def main_suite(self) -> SuitePair | None:
        """The suite that stands for ordinary work."""
        return self.suites.get(main_suite(self.suites))

    @property
    def intents(self) -> list[tuple[str, float, float]]:
        """Intent, baseline's and candidate's success as fractions, the least gain first."""
        name = main_suite(self.report.candidate) if self.report else ""
        if name not in self.suites:
            return []
        before, after = (suite.success_by_intent for suite in self.suites[name])
        rows = [(intent, before[intent], after[intent]) for intent in after if intent in before]
        return sorted(rows, key=lambda row: (row[2] - row[1], row[0]))

    @property
    def releases(self) -> tuple[ReleaseRow, ...]:
        """Every release of the run, this brief's first."""
        return (*([self.release] if self.release else []), *self.other_releases)


def main_suite(names: Collection[str]) -> str:
    """Return the name of the suite that stands for ordinary work: capability, else held-out, else frozen, else none."""
    return next((name for name in _ORDINARY_SUITES if name in names), "")


def collect_brief_input(run_dir: Path, *, ledger: Path | None = None) -> BriefInput:
    """Read a run folder. Raises TamperedError or BadInputError for files that are there but cannot be believed."""
    spec, journal = _read_json(run_dir / "spec.resolved.json"), read_rows(run_dir / "journal.jsonl")
    bundle = _read_bundle(run_dir / "bundle.json")
    policy = bundle.policy.version if bundle else ""
    plan = spec.get("release", {})
    found = (read_release(path, plan) for path in sorted(run_dir.glob("release*/**/decisions.jsonl")))
    releases = [release for release in found if release]
    own = next((release for release in releases if release.candidate == policy or not policy), None)
    armed = sorted(frozenset().union(*(release.armed for release in releases)))
    workflow, charter = spec.get("workflow", {}), spec.get("charter", {})
    reward_model, calibration = _read_calibration(journal)
    return BriefInput(
        run_id=run_dir.name,
        workflow=str(workflow.get("name", "")),
        workload=str(workflow.get("target", "")),
        constraints=str(charter.get("constraints", "")),
        rollback_path=str(charter.get("rollback_path", "")),
        tickets_per_s=_tickets_per_s(journal, own) if own else None,
        written_at=max((float(row["finished_at"]) for row in journal), default=None),
        bundle=bundle,
        previous=_read_bundle(run_dir / "bundle.previous.json") if bundle else None,
        report=find_report(run_dir / "eval", policy),
        reward_model=reward_model,
        calibration=calibration,
        arms=_read_arms(ledger, own) if ledger and own else (),
        offline_gates=_read_offline_gates(journal),
        release=own,
        other_releases=tuple(release for release in releases if release is not own),
        triggers=tuple(dict.fromkeys((*plan.get("gates", ()), *armed))),
        learning=read_learning(run_dir / "metrics.jsonl"),
    )


def _read_json(path: Path) -> dict[str, Any]:
    """Return an object; a missing file or another value is an empty one."""
    value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return value if isinstance(value, dict) else {}


def _read_bundle(path: Path) -> Bundle | None:
    return load_bundle(path) if path.exists() else None


def find_report(directory: Path, policy: str) -> EvalReport | None:
    """Return the evaluation of a policy; without a name, the first one."""
    for path in sorted(directory.glob("*.json")):
        data = _read_json(path)
        # Other files lie there, too: the stability of the baseline, for one.
        if not {"baseline", "candidate"} <= set(data):
            continue
        report = decode(EvalReport, data)
        if not policy or policy in {suite.policy for suite in report.candidate.values()}:
            return report
    return None


def read_learning(path: Path) -> tuple[LearningPoint, ...]:
    """Return the learning curve; a row without success, or without KL, leaves a gap."""
    rows = (row for row in read_metrics(path, "ppo") if "success" in row and "step" in row)
    # A resumed run repeats the steps after its last checkpoint: the later row is the one that counts.
    by_step = {int(row["step"]): row for row in rows}
    return tuple(
        LearningPoint(step=step, success=float(row["success"]), kl=_number(row.get("kl_to_reference", row.get("kl"))))
        for step, row in sorted(by_step.items())
    )


# --- journal and ledger -----------------------------------------------------------------------------------------------


def _read_offline_gates(journal: Sequence[Row]) -> tuple[GateResult, ...]:
    outputs = [row["output"] for row in journal if row["stage"] == OFFLINE_GATES]
    found = [output["results"] if isinstance(output, Mapping) else output for output in outputs]
    return tuple(result for results in found for result in decode(list[GateResult], results))


def _read_calibration(journal: Sequence[Row]) -> tuple[str, Calibration | None]:
    for row in journal:
        output = row["output"]
        if isinstance(output, Mapping) and isinstance(output.get("calibration"), Mapping):
            return str(output.get("name", "")), decode(Calibration, output["calibration"])
    return "", None


def _tickets_per_s(journal: Sequence[Row], release: ReleaseRow) -> float | None:
    """Return the tickets of a release over the time between its first decision and its last."""
    outputs = [row["output"] for row in journal if isinstance(row["output"], Mapping)]
    own = (output for output in outputs if output.get("release_id") == release.release_id)
    requests = next((output["requests"] for output in own if "requests" in output), None)
    return None if requests is None or release.duration_s <= 0 else requests / release.duration_s


def _read_arms(ledger_path: Path, release: ReleaseRow) -> tuple[TrafficWindow, ...]:
    # Opening a ledger creates it, and a brief must leave no file where nothing was served.
    if not ledger_path.exists():
        return ()
    arms: tuple[tuple[str, ReleaseChannel], ...] = ((release.stable, "general"), (release.candidate, "canary"))
    with closing(RequestLedger(ledger_path, owner="brief")) as ledger:
        windows = [ledger.window(policy, channel) for policy, channel in arms]
    return tuple(window for window in windows if window.num_runs)


# --- releases ---------------------------------------------------------------------------------------------------------


def read_release(path: Path, plan: Row) -> ReleaseRow | None:
    """Read a `decisions.jsonl` against the spec's `release` section; None when it is empty.

    Without an ending its present state stands there. Raises TamperedError when its chain does not fit.
    """
    rows = ChainedLog(path).rows()
    if not rows:
        return None
    canary = [row for row in rows if row["state"]["kind"] == "Canary"]
    # A fail back after promotion is a later ending, and the one that holds.
    decided = ([row for row in rows if row["decision"] in _DECIDING_VERDICTS] or rows)[-1]
    last, armed = rows[-1]["next_state"], _armed_gates(canary)
    steps = sorted({int(row["state"]["step"]) for row in canary})
    shares = [_share(plan, step) for step in steps]
    tests = [(row, found) for row in canary if (found := _event_evidence(row))]
    rules = {result["gate"] for row, _ in tests for result in row["evidence"]} & GATES.keys()
    # The error budget for fails is shared among the rules that test events; that for the pass is not.
    alpha = _number(plan.get("alpha"))
    return ReleaseRow(
        release_id=rows[0]["release"]["release_id"],
        stable=rows[0]["release"]["stable"],
        candidate=rows[0]["release"]["candidate"],
        state=last["kind"],
        decision=decided["decision"],
        reason=last.get("reason") or decided["reason"],  # a promoted state has none of its own
        deciding_gates=_deciding_gates(decided),
        shares=tuple(share for share in shares if share is not None),
        time_to_recovery_s=_number(last.get("time_to_recovery_s")),
        drill_s=_slowest_drill(rows),
        duration_s=float(rows[-1]["at"]) - float(rows[0]["at"]),
        gates=tuple(g for g in decode(list[GateResult], canary[-1]["evidence"] if canary else []) if g.gate in GATES),
        armed=armed,
        points=_evidence_points(tests, plan),
        fail_limit=math.log10(len(rules) / alpha) if alpha and rules else None,
        pass_limit=math.log10(1 / alpha) if alpha else None,
    )


def _armed_gates(rows: Sequence[Row]) -> frozenset[str]:
    # "enough traffic" and "split acknowledged" stand beside the gates in the evidence, and roll nothing back.
    return frozenset(result["gate"] for row in rows for result in row["evidence"]) & {*GATES, HEALTHY}


def _deciding_gates(row: Row) -> tuple[str, ...]:
    wanted = _DECIDING_VERDICTS.get(row["decision"])
    gates = _armed_gates([row])
    return tuple(r["gate"] for r in row["evidence"] if r["verdict"] == wanted and r["gate"] in gates)


def _slowest_drill(rows: Sequence[Row]) -> float | None:
    """Return the seconds from the order at share 0 until every gateway acknowledged it."""
    drills = [row for row in rows if row["state"]["kind"] == "Drilling" and row["decision"] == "Advance"]
    return max((float(row["at"]) - float(row["state"]["started_at"]) for row in drills), default=None)


def _evidence_points(tests: Sequence[tuple[Row, Row]], plan: Row) -> tuple[EvidencePoint, ...]:
    start = min((float(row["at"]) for row, _ in tests), default=0.0)
    return tuple(
        EvidencePoint(
            minutes=(float(row["at"]) - start) / 60,
            log10_e_fail=_log10(found["e_fail"]),
            log10_e_pass=_log10(found["e_pass"]),
            share=_share(plan, int(row["state"]["step"])),
        )
        for row, found in tests
    )


def _event_evidence(row: Row) -> Row | None:
    """Return the evidence of the success rule, else of the safety gate; None on a tick that had neither."""
    by_gate = {result["gate"]: result["evidence"] for result in row["evidence"]}
    found = (by_gate[gate] for gate in _EVENT_GATES if {"e_fail", "e_pass"} <= set(by_gate.get(gate, ())))
    return next(found, None)


def _share(plan: Row, step: int) -> float | None:
    ramp = plan.get("ramp", ())
    return float(ramp[step]) / 100 if step < len(ramp) else None


def _log10(value: object) -> float:
    number = float(str(value))
    return math.log10(number) if number > 0 else -math.inf


def _number(value: object) -> float | None:
    # JSON has no infinity: the codec writes it as a string.
    return None if value is None else float(str(value))
