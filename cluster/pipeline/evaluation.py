"""Stages 5 and 6: baseline and candidate on every suite, and the offline gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

from cluster.pipeline.data import read_tasks
from cluster.pipeline.run import Run
from cluster.plan import threads_each
from cluster.ray_cluster import has_room, placed
from rl_actors.actors import Options, RolloutPool, RolloutWorkerSettings
from rl_actors.contracts import (
    CostModel,
    DataSnapshot,
    EvalReport,
    PolicyVersion,
    Split,
    StageRefusedError,
    SuiteResult,
)
from rl_actors.durable import encode, write_json
from rl_actors.evaluation import Suite, compare, suite_result, with_typical_durations
from serving.contracts import GateResult, ReleasePlan
from serving.gates import evaluate_offline, may_enter_canary

CAPABILITY = "capability"


NUM_CONFIRMATIONS = 2  # further passes where the first says "too slow"


SUITE_SPLITS: Mapping[str, Split] = {CAPABILITY: "held_out", "adversarial": "adversarial", "frozen": "frozen"}


def read_suites(snapshot: DataSnapshot) -> list[Suite]:
    """Return the three suites of a snapshot."""
    return [Suite(name=name, tasks=tuple(read_tasks(snapshot, split))) for name, split in SUITE_SPLITS.items()]


def evaluate(
    run: Run,
    snapshot: DataSnapshot,
    baseline: PolicyVersion,
    candidate: PolicyVersion,
    report_name: str,
    plan: ReleasePlan,
) -> EvalReport:
    """Run both policies on all suites with equal seeds; the rows lie under `eval/` afterwards.

    Durations are wall time on a machine that others may use: a candidate that looks too slow is timed again, and the
    median of three passes is what the latency gate sees.
    """
    passes = [_measure(run, snapshot, baseline, candidate)]
    if _is_too_slow(passes[0], plan):
        passes += [_measure(run, snapshot, baseline, candidate) for _ in range(NUM_CONFIRMATIONS)]
    report = with_typical_durations(passes)
    write_json(run.folder.evaluations / f"{report_name}.json", encode(report))
    return report


def _is_too_slow(report: EvalReport, plan: ReleasePlan) -> bool:
    results = evaluate_offline(report, plan)
    return any(result.gate == "latency_delta_lt_15_percent" and result.verdict == "fail" for result in results)


def _measure(run: Run, snapshot: DataSnapshot, baseline: PolicyVersion, candidate: PolicyVersion) -> EvalReport:
    """Run both side by side where the cluster has room, so that whatever slows the machine down slows both."""
    policies = (baseline, candidate)
    rounds = [policies] if has_room(run.placement, "offline_eval", len(policies)) else [(one,) for one in policies]
    results: dict[str, dict[str, SuiteResult]] = {}
    for together in rounds:
        results |= evaluate_together(run, snapshot, together)
    return compare(results[baseline.name], results[candidate.name], CAPABILITY)


def evaluate_together(
    run: Run, snapshot: DataSnapshot, policies: Sequence[PolicyVersion]
) -> dict[str, dict[str, SuiteResult]]:
    """Run policies on all suites, suite by suite at the same time, each on engines loaded from its own directory."""
    results: dict[str, dict[str, SuiteResult]] = {policy.name: {} for policy in policies}
    settings = replace(run.worker_settings, num_threads=threads_each(len(policies)))
    with ExitStack() as stack, ThreadPoolExecutor(len(policies)) as threads:
        places = [stack.enter_context(placed(run.placement, "offline_eval")) for _ in policies]
        pools = list(threads.map(lambda policy, place: _open_pool(run, policy, settings, place), policies, places))
        for pool in pools:
            stack.callback(pool.close)
        for suite in read_suites(snapshot):
            requests, temperature = suite.requests(run.spec.seed), run.spec.ppo.temperature
            calls = [threads.submit(pool.rollouts, requests, temperature) for pool in pools]
            for policy, call in zip(policies, calls, strict=True):
                results[policy.name][suite.name] = suite_result(suite, policy.name, call.result(), CostModel())
    return results


def _open_pool(run: Run, policy: PolicyVersion, settings: RolloutWorkerSettings, options: Options) -> RolloutPool:
    return RolloutPool(
        policy.path,
        settings,
        num_workers=run.spec.ppo.num_rollout_workers,
        options=options,
        timeout_s=run.spec.agent.timeout_s * 30,
    )


def require_offline_gates(report: EvalReport, plan: ReleasePlan) -> tuple[GateResult, ...]:
    """Refuse a candidate that offline evidence already speaks against; no traffic has been touched."""
    results = evaluate_offline(report, plan)
    if not may_enter_canary(results, plan):
        said_no = [f"{r.gate}: {r.verdict} ({r.reason})" for r in results if r.verdict != "pass"]
        raise StageRefusedError(f"offline gates refuse the candidate: {'; '.join(said_no)}")
    return tuple(results)
