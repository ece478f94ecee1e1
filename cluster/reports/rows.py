"""From the rows of a run folder to a `BriefInput`. Nothing is computed here that a row does not hold or imply.

Read, all optional (what is missing becomes "not measured"):

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
* the run ledger at the path given: `RequestLedger`; channel `canary` of the candidate, `general` of stable.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.records import MEMBERS, Bundle, diff_bundles, load_bundle
from cluster.reports.brief import (
    ArmRow,
    BriefInput,
    ChangeRow,
    CharterRow,
    GateRow,
    IntentRow,
    LearningPoint,
    SuiteRow,
    main_suite,
)
from cluster.reports.release_rows import ReleaseLog, canary_curve, live_gates, release_row, triggers_of
from rl_actors.contracts import Calibration, EvalReport, SuiteResult
from rl_actors.durable import decode, read_metrics, read_rows
from serving.contracts import GateResult, ReleaseChannel, TrafficWindow
from serving.gates import reliability_score
from serving.store import RequestLedger

OFFLINE_GATES = "offline_gates"
_SHOWN_HASH = 8
_SHOWN_NAME = 17


def collect_brief_input(run_dir: Path, *, ledger: Path | None = None) -> BriefInput:
    """Read a run folder. Raises TamperedError or BadInputError for files that are there but cannot be believed."""
    spec, journal = _json(run_dir / "spec.resolved.json"), read_rows(run_dir / "journal.jsonl")
    bundle = load_bundle(run_dir / "bundle.json") if (run_dir / "bundle.json").exists() else None
    policy = bundle.policy.version if bundle else ""
    report = find_report(run_dir / "eval", policy)
    logs = [log for path in sorted(run_dir.glob("release*/**/decisions.jsonl")) if (log := ReleaseLog.read(path)).rows]
    own = next((log for log in logs if log.candidate == policy), logs[0] if logs and not policy else None)
    reward_name, calibration = _calibration(journal)
    release = spec.get("release", {})
    return BriefInput(
        run_id=run_dir.name,
        workflow=str(spec.get("workflow", {}).get("name", "")),
        charter=_charter(spec, journal, own),
        written_at=max((float(row["finished_at"]) for row in journal), default=None),
        suites=_suites(report) if report else (),
        intents=_intents(report) if report else (),
        success_gain=report.success_gain if report else None,
        p_value=report.p_value if report else None,
        reward_model=reward_name,
        calibration=calibration,
        arms=_arms(ledger, own) if ledger and own else (),
        gates=(*_offline_gates(journal), *live_gates(own)),
        release=release_row(own, release) if own else None,
        other_releases=tuple(release_row(log, release) for log in logs if log is not own),
        triggers=triggers_of(logs, release),
        learning=_learning(run_dir / "metrics.jsonl"),
        canary=canary_curve(own, release),
        **_compared(run_dir, bundle),
    )


def _charter(spec: Mapping[str, Any], journal: list[dict[str, Any]], log: ReleaseLog | None) -> CharterRow:
    charter = spec.get("charter", {})
    return CharterRow(
        workload=str(spec.get("workflow", {}).get("target", "")),
        constraints=str(charter.get("constraints", "")),
        rollback_path=str(charter.get("rollback_path", "")),
        tickets_per_s=_tickets_per_s(journal, log) if log else None,
    )


def _tickets_per_s(journal: list[dict[str, Any]], log: ReleaseLog) -> float | None:
    """Return the tickets of a release over the time between its first decision and its last."""
    outputs = [row["output"] for row in journal if isinstance(row["output"], Mapping)]
    own = (output for output in outputs if output.get("release_id") == log.release["release_id"])
    requests = next((output["requests"] for output in own if "requests" in output), None)
    seconds = float(log.rows[-1]["at"]) - float(log.rows[0]["at"])
    return None if requests is None or seconds <= 0 else requests / seconds


def find_report(directory: Path, policy: str) -> EvalReport | None:
    """Return the evaluation of a policy; without a name, the first one."""
    for path in sorted(directory.glob("*.json")):
        data = _json(path)
        if not {"baseline", "candidate"} <= set(data):
            continue
        report = decode(EvalReport, data)
        if not policy or policy in {suite.policy for suite in report.candidate.values()}:
            return report
    return None


def _compared(run_dir: Path, bundle: Bundle | None) -> dict[str, Any]:
    """Compare with the previous release's bundle, or with the bundle whose policy is still the baseline."""
    if bundle is None:
        return {"bundle_id": "", "compared_with": "", "compared_bundle_id": "", "changes": None, "unchanged": ()}
    path = run_dir / "bundle.previous.json"
    before = load_bundle(path) if path.exists() else bundle.baseline
    changes = tuple(
        ChangeRow(
            member=change.member,
            before=_named(change.before.version, change.before.sha256),
            after=_named(change.after.version, change.after.sha256),
        )
        for change in diff_bundles(before, bundle)
    )
    changed = {change.member for change in changes}
    return {
        "bundle_id": bundle.id,
        "compared_with": "previous" if path.exists() else "baseline",
        "compared_bundle_id": before.id,
        "changes": changes,
        "unchanged": tuple(name for name in MEMBERS if name not in changed),
    }


def _named(version: str, sha256: str) -> str:
    """Return a version name that tells two contents apart even when it is long: cut, with the start of its hash."""
    if sha256[:_SHOWN_HASH] in version and len(version) <= _SHOWN_NAME + _SHOWN_HASH:
        return version
    name = version if len(version) <= _SHOWN_NAME else f"{version[: _SHOWN_NAME - 1]}…"
    return f"{name} ({sha256[:_SHOWN_HASH]})"


def _json(path: Path) -> dict[str, Any]:
    """Return an object; a missing file or another value is an empty one."""
    value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return value if isinstance(value, dict) else {}


# --- journal ----------------------------------------------------------------------------------------------------------


def _offline_gates(journal: list[dict[str, Any]]) -> Iterator[GateRow]:
    for row in journal:
        if row["stage"] == OFFLINE_GATES:
            output = row["output"]
            found = output["results"] if isinstance(output, Mapping) else output
            yield from (GateRow(phase="offline", result=result) for result in decode(list[GateResult], found))


def _calibration(journal: list[dict[str, Any]]) -> tuple[str, Calibration | None]:
    for row in journal:
        output = row["output"]
        if isinstance(output, Mapping) and isinstance(output.get("calibration"), Mapping):
            return str(output.get("name", "")), decode(Calibration, output["calibration"])
    return "", None


# --- evaluation and training ------------------------------------------------------------------------------------------


def _suites(report: EvalReport) -> tuple[SuiteRow, ...]:
    names = [name for name in report.candidate if name in report.baseline]
    return tuple(_suite(name, report.baseline[name], report.candidate[name]) for name in names)


def _suite(name: str, baseline: SuiteResult, candidate: SuiteResult) -> SuiteRow:
    violating = sum(map(bool, candidate.violations_by_task.values()))
    return SuiteRow(
        suite=name,
        num_tasks=candidate.num_tasks,
        baseline=baseline.success,
        candidate=candidate.success,
        baseline_violations=baseline.violations,
        candidate_violations=candidate.violations,
        candidate_violating_tasks=violating or min(candidate.violations, candidate.num_tasks),
        baseline_cost=baseline.cost_per_success,
        candidate_cost=candidate.cost_per_success,
    )


def _intents(report: EvalReport) -> tuple[IntentRow, ...]:
    name = main_suite(report.candidate)
    if not name or name not in report.baseline:
        return ()
    baseline, candidate = report.baseline[name].success_by_intent, report.candidate[name].success_by_intent
    rows = [IntentRow(intent=i, baseline=baseline[i], candidate=candidate[i]) for i in candidate if i in baseline]
    return tuple(sorted(rows, key=lambda row: (row.candidate - row.baseline, row.intent)))


def _learning(path: Path) -> tuple[LearningPoint, ...]:
    rows = (row for row in read_metrics(path, "ppo") if "success" in row and "step" in row)
    # A resumed run repeats the steps after its last checkpoint: the later row is the one that counts.
    by_step = {int(row["step"]): row for row in rows}
    return tuple(
        LearningPoint(step=step, success=float(row["success"]), kl=_first(row, "kl_to_reference", "kl"))
        for step, row in sorted(by_step.items())
    )


def _first(row: Mapping[str, Any], *names: str) -> float | None:
    return next((float(row[name]) for name in names if name in row), None)


# --- live traffic -----------------------------------------------------------------------------------------------------


def _arms(ledger_path: Path, log: ReleaseLog) -> tuple[ArmRow, ...]:
    """Aggregate both arms; the ledger is opened only if it exists, for opening creates it."""
    if not ledger_path.exists():
        return ()
    ledger = RequestLedger(ledger_path, owner="brief")
    try:
        arms: tuple[tuple[str, ReleaseChannel], ...] = ((log.stable, "general"), (log.candidate, "canary"))
        windows = [ledger.window(policy, channel) for policy, channel in arms]
    finally:
        ledger.close()
    return tuple(_arm(window) for window in windows if window.num_runs)


def _arm(window: TrafficWindow) -> ArmRow:
    success = window.success_rate if window.num_labelled else None
    rates = (window.human_override_rate, window.tool_error_rate)
    return ArmRow(
        policy=window.policy_version,
        num_runs=window.num_runs,
        success_rate=success,
        human_override_rate=window.human_override_rate,
        tool_error_rate=window.tool_error_rate,
        cost_per_success=window.cost_per_success,
        reliability_score=None if success is None else reliability_score(success, *rates),
    )
