"""A whole run folder as the pipeline leaves it, written with the real writers wherever there is one."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.records.bundle import MEMBERS, Bundle, build_bundle, component_of
from cluster.records.journal import Journal
from rl_actors.contracts.reports import EvalReport, Interval, SuiteResult
from rl_actors.contracts.versions import Calibration, RewardModelVersion
from rl_actors.durable.codec import encode
from rl_actors.durable.files import write_json
from rl_actors.durable.metrics_log import MetricsLog
from serving.contracts.gates import GateResult
from serving.contracts.release import (
    Advance,
    Canary,
    Drilling,
    Hold,
    Preparing,
    Promote,
    Promoted,
    Promoting,
    Release,
    ReleaseState,
    Restoring,
    RollBack,
    RolledBack,
)
from serving.contracts.requests import RequestCompletion, RequestRecord
from serving.store.decision_log import DecisionLog
from serving.store.ledger import RequestLedger

START = 1_795_370_000.0  # 22 November 2026, UTC
STABLE, CANDIDATE, DEGRADED = "sft_checkpoint_v1", "ppo-1c9fd203", "degraded-77ab01cd"
INTENTS = (
    "order_status",
    "refund_damaged",
    "refund_late",
    "cancel_order",
    "change_address",
    "payment_failed",
    "two_requests",
    "must_refuse",
    "must_escalate",
    "policy_question",
)
CONSTRAINTS = (
    "at most 6 tool calls, 96 tokens a turn and 30 s a request; every reply passes all policy checks, a release all 4 "
    "gates"
)
NAMES = {
    "base_model": "tiny-gpt-oss-1m",
    "sft": STABLE,
    "reward_model": "rm_v1",
    "policy": CANDIDATE,
    "data_snapshot": "snapshot-20261122",
    "eval_suites": "capability+adversarial+frozen",
    "tool_set": "support_desk-tools-9",
    "policy_checks": "support_desk-checks-4",
    "spec": "support_desk",
    "code_revision": "0.1.0+4fd0aa31c2b7",
    "seed": "0",
}
RULES = (
    "no_safety_regression",
    "latency_delta_lt_15_percent",
    "cost_per_success_not_worse",
    "rollback_under_5_minutes",
    "task_success_not_worse",
)


def bundle() -> Bundle:
    return build_bundle({name: component_of(NAMES[name], f"content of {name}") for name in MEMBERS})


def suite(name: str, policy: str, num_tasks: int, rate: float, violations: int, cost: float) -> SuiteResult:
    half = 1.96 * math.sqrt(rate * (1 - rate) / num_tasks)
    by_intent = {intent: max(0.0, min(1.0, rate + (i - 4.5) / 20)) for i, intent in enumerate(INTENTS)}
    return SuiteResult(
        suite=name,
        suite_sha256="e" * 64,
        policy=policy,
        num_tasks=num_tasks,
        success=Interval(mean=rate, low=rate - half, high=min(1.0, rate + half)),
        success_by_intent=by_intent,
        tasks_by_intent=dict.fromkeys(INTENTS, num_tasks // len(INTENTS)),
        violations=violations,
        tokens_in=100_000,
        tokens_out=9_000,
        tool_calls=900,
        tool_errors=27,
        cost_per_success=cost,
        p95_duration_ms=410.0,
        success_by_task={},
        violations_by_task={},
    )


def report(candidate: str = CANDIDATE) -> EvalReport:
    return EvalReport(
        baseline={
            "capability": suite("capability", STABLE, 400, 0.7125, 9, 1841.5),
            "adversarial": suite("adversarial", STABLE, 200, 0.64, 31, 2210.25),
            "frozen": suite("frozen", STABLE, 200, 0.705, 4, 1866.0),
        },
        candidate={
            "capability": suite("capability", candidate, 400, 0.8925, 3, 1498.75),
            "adversarial": suite("adversarial", candidate, 200, 0.83, 6, 1702.0),
            "frozen": suite("frozen", candidate, 200, 0.88, 1, 1509.5),
        },
        success_gain=0.18125,
        p_value=2.3e-11,
    )


def gate(name: str, verdict: str, **evidence: float | str) -> GateResult:
    return GateResult(gate=name, verdict=verdict, evidence=evidence, reason=f"recorded reason of {name}")  # type: ignore[arg-type]


def offline_gates() -> list[GateResult]:
    return [
        gate("no_safety_regression", "pass", newly_bad=2, fixed=33, num_tasks=800, p_value=0.9999),
        gate("latency_delta_lt_15_percent", "pass", p95_delta=-0.021),
        gate("cost_per_success_not_worse", "pass", ratio=0.814),
        gate("task_success_not_worse", "pass", newly_bad=19, fixed=164, num_tasks=800, p_value=0.9999),
    ]


def live_gates(tick: int, *, is_bad: bool = False) -> tuple[GateResult, ...]:
    e_fail, e_pass = (10 ** (0.6 * tick), 10 ** (-0.2 * tick)) if is_bad else (10 ** (-0.1 * tick), 10 ** (0.35 * tick))
    verdict = "fail" if is_bad and e_fail > 100 else ("pass" if e_pass > 20 else "inconclusive")
    events = {
        "events": 3 * tick,
        "canary_events": tick,
        "canary_sessions": 40 * tick,
        "e_fail": e_fail,
        "e_pass": e_pass,
    }
    return (
        gate("candidate_healthy", "pass"),
        gate("enough_traffic", "pass", num_runs=50 * tick),
        gate("no_safety_regression", verdict, **events, e_rate_below_tolerance=2.0**tick),
        gate("latency_delta_lt_15_percent", "pass", p95_delta=0.034, p95_delta_high=0.112, candidate_runs=400),
        gate("cost_per_success_not_worse", "pass", ratio=0.84, low=0.71, high=0.967),
        gate("rollback_under_5_minutes", "pass", slowest_s=0.42, age_s=60.0, drills=1),
        gate("task_success_not_worse", verdict, **events, e_rate_below_tolerance=2.0**tick),
    )


def write_release(directory: Path, candidate: str, *, is_bad: bool = False) -> None:
    """Write the decision log of a release that is promoted, or rolled back when the candidate is bad."""
    log = DecisionLog(directory)
    release = Release(release_id=f"release-{candidate}", stable=STABLE, candidate=candidate)
    before = Drilling(started_at=START, epoch=1)
    log.append(release, Preparing(epoch=0), Advance(reason="drill", evidence=()), before, START)
    state: ReleaseState = Canary(step=0, epoch=2, step_started_at=START + 0.42, release_started_at=START + 0.42)
    log.append(release, before, Advance(reason="acknowledged", evidence=()), state, START + 0.42)
    for tick in range(1, 10):
        at, evidence = START + 20 * tick, live_gates(tick, is_bad=is_bad)
        if is_bad and tick == 4:
            reason = "task_success_not_worse: the candidate has more bad sessions than its share explains"
            after = Restoring(ending="rolled_back", reason=reason, detected_at=at, epoch=3)
            log.append(release, state, RollBack(reason=reason, evidence=evidence), after, at)
            ended = RolledBack(reason=reason, time_to_recovery_s=0.613)
            log.append(release, after, Advance(reason="acknowledged", evidence=()), ended, at + 0.613)
            return
        if tick % 3:
            log.append(release, state, Hold(reason="waiting", evidence=evidence), state, at)
        elif tick < 9:
            after = replace(state, step=state.step + 1, epoch=state.epoch + 1, step_started_at=at)  # type: ignore[union-attr]
            log.append(release, state, Advance(reason="on to the next share", evidence=evidence), after, at)
            state = after
    promoting = Promoting(decided_at=START + 180, epoch=5)
    decision = Promote(reason="all gates passed at the last step", evidence=live_gates(9))
    log.append(release, state, decision, promoting, START + 180)
    promoted = Promoted(at=START + 180.4, epoch=5)
    log.append(release, promoting, Advance(reason="acknowledged", evidence=()), promoted, START + 180.4)


def write_ledger(path: Path) -> None:
    ledger = RequestLedger(path, owner="test")
    for i in range(240):
        is_canary = i % 6 == 0
        policy, channel = (CANDIDATE, "canary") if is_canary else (STABLE, "general")
        record = RequestRecord(
            run_id=f"run-{i}",
            request_id=f"request-{i}",
            session_key=f"session-{i}",
            model_version="tiny",
            reward_model_version="rm_v1",
            policy_version=policy,
            bundle_id="b" * 64,
            release_channel=channel,  # type: ignore[arg-type]
            split_epoch=2,
            started_at=START + i,
            intent="order_status",
            sandbox_level="process",
        )
        ledger.start(record)
        is_success = i % 4 != 1 if is_canary else i % 3 != 1
        completion = RequestCompletion(
            status="ok",
            success="yes" if is_success else "no",
            tool_calls_count=3,
            tool_error_count=int(i % 20 == 0),
            tokens_in=900,
            tokens_out=60,
            duration_ms=200.0,
            cost=1200.0,
            policy_checks={"no_pii": True},
        )
        ledger.complete(record.run_id, completion, at=START + i + 1)
        if not is_success and i % 2:
            ledger.override(record.run_id, actor="agent 7", reason="wrong", at=START + i + 2)
    ledger.close()


def write_run(home: Path) -> tuple[Path, Path]:
    """Write everything; returns the run folder and the ledger's path."""
    run, ledger = home / "runs" / "support_desk-20261122-183000-1f3a", home / "ledger.sqlite"
    run.mkdir(parents=True)
    spec = {
        "workflow": {"name": "support_desk", "target": "order support tickets: look-ups, refunds, cancellations"},
        "charter": {"constraints": CONSTRAINTS, "rollback_path": "all sessions back to sft_checkpoint_v1 at once"},
        "release": {"gates": list(RULES[:4]), "ramp": [5.0, 25.0, 50.0], "alpha": 0.05},
    }
    write_json(run / "spec.resolved.json", spec)
    bundle().write(run / "bundle.json")
    write_json(run / "eval" / "candidate.json", encode(report()))
    write_json(run / "eval" / "degraded.json", encode(report(DEGRADED)))
    write_journal(run)
    metrics = MetricsLog(run / "metrics.jsonl", "ppo", lambda: START)
    for step in range(1, 41):
        metrics.write(step, {"success": 0.7 + 0.2 * (1 - math.exp(-step / 12)), "kl_to_reference": 0.0012 * step})
    MetricsLog(run / "metrics.jsonl", "sft", lambda: START).write(1, {"loss": 2.5})
    write_release(run / "release", CANDIDATE)
    write_release(run / "release" / "degraded", DEGRADED, is_bad=True)
    write_ledger(ledger)
    return run, ledger


def write_journal(run: Path) -> None:
    journal = Journal(run / "journal.jsonl", clock=lambda: START)
    calibration = Calibration(
        num_pairs=500, pair_accuracy=0.842, ece=0.031, brier=0.12, temperature=1.4, criterion_mae={"tone": 0.1}
    )
    model = RewardModelVersion(name="rm_v1", path=str(run), sha256="c" * 64, calibration=calibration)
    journal.run_stage("reward_model", {}, lambda: model, RewardModelVersion)
    journal.run_stage("offline_gates", {}, offline_gates, list[GateResult])
    for name, policy, requests in (("canary", CANDIDATE, 1380), ("failback_drill", DEGRADED, 77)):
        output = {"release_id": f"release-{policy}", "requests": requests}
        journal.run_stage(name, {}, lambda output=output: output, dict[str, Any])


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
