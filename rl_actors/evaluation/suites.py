"""Suites: the same tasks and seeds for every policy, success by verified outcome, cost per success.

A suite is a tuple of tasks; its hash is what a release record archives. Sampling is seeded per task, so two runs of one
policy on one suite give the same report.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from rl_actors.contracts import (
    CostModel,
    EvalReport,
    InfrastructureError,
    Rollout,
    RolloutRequest,
    SuiteResult,
    TamperedError,
    Task,
)
from rl_actors.evaluation.statistics import mcnemar_p_value, wilson_interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A named, fixed set of tasks."""

    name: str
    tasks: tuple[Task, ...]

    @property
    def sha256(self) -> str:
        """Hash of the tasks' full content."""
        text = json.dumps([asdict(task) for task in self.tasks], sort_keys=True, default=dict)
        return hashlib.sha256(text.encode()).hexdigest()

    def requests(self, seed: int) -> list[RolloutRequest]:
        """Return one seeded attempt per task."""
        return [
            RolloutRequest(task=task, group_id=index, seed=(seed * 1_000_003 + index) % (1 << 31))
            for index, task in enumerate(self.tasks)
        ]


def suite_result(suite: Suite, policy: str, rollouts: Sequence[Rollout], cost_model: CostModel) -> SuiteResult:
    """Summarise one policy on one suite.

    Raises:
        InfrastructureError: A rollout is missing: a suite is whole or it is not reported.
    """
    missing = sorted({task.task_id for task in suite.tasks} - {rollout.task_id for rollout in rollouts})
    if missing or len(rollouts) != len(suite.tasks):
        raise InfrastructureError(
            f"suite {suite.name}: {len(missing)} tasks lost to infrastructure, first {missing[:3]}"
        )
    successes = sum(rollout.outcome.success for rollout in rollouts)
    tokens_in, tokens_out = sum(r.tokens_in for r in rollouts), sum(r.tokens_out for r in rollouts)
    tool_calls = sum(r.tool_calls_count for r in rollouts)
    cost = cost_model.cost(tokens_in=tokens_in, tokens_out=tokens_out, tool_calls=tool_calls)
    by_intent = _by_intent(rollouts)
    return SuiteResult(
        suite=suite.name,
        suite_sha256=suite.sha256,
        policy=policy,
        num_tasks=len(rollouts),
        success=wilson_interval(successes, len(rollouts)),
        success_by_intent={name: sum(values) / len(values) for name, values in by_intent.items()},
        tasks_by_intent={name: len(values) for name, values in by_intent.items()},
        violations=sum(bool(rollout.outcome.violations) for rollout in rollouts),
        tokens_in=tokens_in,
        tokens_out=tokens_out,
        tool_calls=tool_calls,
        tool_errors=sum(r.tool_error_count for r in rollouts),
        cost_per_success=cost / successes if successes else math.inf,
        p95_duration_ms=_quantile([r.duration_ms for r in rollouts], 0.95),
        success_by_task={r.task_id: r.outcome.success for r in rollouts},
        violations_by_task={r.task_id: r.outcome.violations for r in rollouts if r.outcome.violations},
    )


def compare(baseline: Mapping[str, SuiteResult], candidate: Mapping[str, SuiteResult], capability: str) -> EvalReport:
    """Pair both policies task by task on the capability suite; p is McNemar's, one-sided for "candidate better".

    Raises:
        TamperedError: The two did not run the very same suites.
    """
    _require_same_suites(baseline, candidate)
    before, after = baseline[capability].success_by_task, candidate[capability].success_by_task
    gained = sum(after[task_id] and not before[task_id] for task_id in before)
    lost = sum(before[task_id] and not after[task_id] for task_id in before)
    return EvalReport(
        baseline=dict(baseline),
        candidate=dict(candidate),
        success_gain=candidate[capability].success.mean - baseline[capability].success.mean,
        p_value=mcnemar_p_value(gained, lost),
    )


def with_typical_durations(passes: Sequence[EvalReport]) -> EvalReport:
    """Return the first of several passes over the same suites, each p95 replaced by the median over the passes."""

    def typical(side: str) -> dict[str, SuiteResult]:
        sides: list[Mapping[str, SuiteResult]] = [getattr(report, side) for report in passes]
        return {
            name: replace(result, p95_duration_ms=statistics.median(one[name].p95_duration_ms for one in sides))
            for name, result in sides[0].items()
        }

    return replace(passes[0], baseline=typical("baseline"), candidate=typical("candidate"))


def _require_same_suites(baseline: Mapping[str, SuiteResult], candidate: Mapping[str, SuiteResult]) -> None:
    """Refuse to compare where a suite is missing or was edited in between: equal task ids prove nothing."""
    hashes = [{name: result.suite_sha256 for name, result in side.items()} for side in (baseline, candidate)]
    if different := sorted(name for name, _ in hashes[0].items() ^ hashes[1].items()):
        raise TamperedError(f"baseline and candidate ran different suites: {different}; evaluate both again")


def _by_intent(rollouts: Sequence[Rollout]) -> dict[str, list[bool]]:
    groups: dict[str, list[bool]] = defaultdict(list)
    for rollout in rollouts:
        groups[rollout.intent].append(rollout.outcome.success)
    return dict(sorted(groups.items()))


def _quantile(values: Sequence[float], q: float) -> float:
    """Return the empirical quantile (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(q * len(ordered)) - 1))]
