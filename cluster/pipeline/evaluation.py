"""Stages 5 and 6: baseline and candidate on every suite, and the offline gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from cluster.pipeline.sampling import open_pool
from cluster.pipeline.snapshot import read_tasks
from cluster.plan import place, threads_each
from cluster.ray_cluster import has_room, placed
from cluster.spec import WorkflowSpec
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
    spec: WorkflowSpec,
    suites: Sequence[Suite],
    baseline: PolicyVersion,
    candidate: PolicyVersion,
    plan: ReleasePlan,
    file: Path,
) -> EvalReport:
    """Run both policies on all suites with equal seeds; the report lies in `file` afterwards."""

    def measure() -> EvalReport:
        results = {}
        for together in rounds:
            results |= evaluate_together(spec, suites, together)
        return compare(results[baseline.name], results[candidate.name], CAPABILITY)

    # Side by side where the cluster has room, so that whatever slows the machine down slows both.
    policies = (baseline, candidate)
    rounds = [policies] if has_room(place(spec), "offline_eval", len(policies)) else [(one,) for one in policies]
    passes = [measure()]
    # Durations are wall time on a machine that others may use: a candidate that looks too slow is timed again, and
    # the latency gate sees the median of three passes.
    if _is_too_slow(passes[0], plan):
        passes += [measure() for _ in range(NUM_CONFIRMATIONS)]
    report = with_typical_durations(passes)
    write_json(file, encode(report))
    return report


def _is_too_slow(report: EvalReport, plan: ReleasePlan) -> bool:
    results = evaluate_offline(report, plan)
    return any(result.gate == "latency_delta_lt_15_percent" and result.verdict == "fail" for result in results)


def evaluate_together(
    spec: WorkflowSpec, suites: Sequence[Suite], policies: Sequence[PolicyVersion]
) -> dict[str, dict[str, SuiteResult]]:
    """Run policies on all suites, suite by suite at the same time; results by policy and suite."""
    results: dict[str, dict[str, SuiteResult]] = {policy.name: {} for policy in policies}
    num_threads = threads_each(len(policies))
    # Threads only wait here: engines load and sample in other processes, all policies' at once.
    with ExitStack() as stack, ThreadPoolExecutor(len(policies)) as threads:
        places = [stack.enter_context(placed(place(spec), "offline_eval")) for _ in policies]
        pools = list(threads.map(lambda one, at: open_pool(spec, one, at, num_threads=num_threads), policies, places))
        for pool in pools:
            stack.callback(pool.close)  # called before the places are given back, in which its workers live
        for suite in suites:
            requests, temperature = suite.requests(spec.seed), spec.ppo.temperature
            calls = [threads.submit(pool.rollouts, requests, temperature) for pool in pools]
            for policy, call in zip(policies, calls, strict=True):
                results[policy.name][suite.name] = suite_result(suite, policy.name, call.result(), CostModel())
    return results


def require_offline_gates(report: EvalReport, plan: ReleasePlan) -> tuple[GateResult, ...]:
    """Refuse a candidate that offline evidence already speaks against. Raises StageRefusedError."""
    results = evaluate_offline(report, plan)
    # Inconclusive is no pass: traffic has not been touched yet, and no user is there to find out.
    if not may_enter_canary(results, plan):
        reasons = [f"{r.gate}: {r.verdict} ({r.reason})" for r in results if r.verdict != "pass"]
        raise StageRefusedError(f"offline gates refuse the candidate: {'; '.join(reasons)}")
    return tuple(results)
