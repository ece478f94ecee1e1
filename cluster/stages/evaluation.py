"""Stages 5 and 6: baseline and candidate on every suite, and the offline gates."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.codec import encode
from cluster.paths import write_json
from cluster.stages.context import Run
from cluster.stages.data import read_tasks
from cluster.stages.ray_runtime import placed
from rl_actors.actors.pools import RolloutPool
from rl_actors.contracts import DataSnapshot, EvalReport, PolicyVersion, Split, SuiteResult
from rl_actors.errors import StageRefusedError
from rl_actors.evaluation import CostModel, Suite, compare, suite_result
from serving.contracts import GateResult, ReleasePlan
from serving.gates import evaluate_offline, may_enter_canary

CAPABILITY = "capability"
SUITE_SPLITS: Mapping[str, Split] = {CAPABILITY: "held_out", "adversarial": "adversarial", "frozen": "frozen"}


def read_suites(snapshot: DataSnapshot) -> list[Suite]:
    """Return the three suites of a snapshot."""
    return [Suite(name=name, tasks=tuple(read_tasks(snapshot, split))) for name, split in SUITE_SPLITS.items()]


def evaluate(
    run: Run, snapshot: DataSnapshot, baseline: PolicyVersion, candidate: PolicyVersion, report_name: str
) -> EvalReport:
    """Run both policies on all suites with equal seeds; the rows lie under `eval/` afterwards."""
    results = {policy.name: evaluate_policy(run, snapshot, policy) for policy in (baseline, candidate)}
    report = compare(results[baseline.name], results[candidate.name], CAPABILITY)
    write_json(run.folder.evaluations / f"{report_name}.json", encode(report))
    return report


def evaluate_policy(run: Run, snapshot: DataSnapshot, policy: PolicyVersion) -> dict[str, SuiteResult]:
    """Run one policy on all suites with an engine loaded from its own directory."""
    results: dict[str, SuiteResult] = {}
    with placed(run.placement, "offline_eval") as options:
        pool = RolloutPool(
            policy.path,
            run.worker_settings,
            num_workers=run.spec.ppo.num_rollout_workers,
            options=options,
            timeout_s=run.spec.agent.timeout_s * 30,
        )
        try:
            for suite in read_suites(snapshot):
                rollouts = pool.rollouts(suite.requests(run.spec.seed), run.spec.ppo.temperature)
                results[suite.name] = suite_result(suite, policy.name, rollouts, CostModel())
        finally:
            pool.close()
    return results


def require_offline_gates(report: EvalReport, plan: ReleasePlan) -> tuple[GateResult, ...]:
    """Refuse a candidate that offline evidence already speaks against; no traffic has been touched."""
    results = evaluate_offline(report, plan)
    if not may_enter_canary(results, plan):
        said_no = [f"{r.gate}: {r.verdict} ({r.reason})" for r in results if r.verdict != "pass"]
        raise StageRefusedError(f"offline gates refuse the candidate: {'; '.join(said_no)}")
    return tuple(results)
