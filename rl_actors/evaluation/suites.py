"""A policy judged offline: on suites, against another policy, and by the stability of a baseline.

A suite is the same tasks and seeds for every policy; sampling is seeded per task, so one policy gives one report on it.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Final

from rl_actors.contracts import (
    BadDataError,
    CostModel,
    EvalReport,
    InfrastructureError,
    Rollout,
    RolloutRequest,
    StageRefusedError,
    SuiteResult,
    TamperedError,
    Task,
)
from rl_actors.evaluation.statistics import mcnemar_p_value, wilson_interval

# Standard errors that chance may take: a handful of tasks therefore proves little, and refuses little.
_Z: Final = 3.0
_REMEDY: Final = "train longer (sft.epochs), more gently (a lower sft.learning_rate), or from another seed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A named, fixed set of tasks."""

    name: str
    tasks: tuple[Task, ...]

    @property
    def sha256(self) -> str:
        """Return the hash of the tasks' full content, which a release record archives."""
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
        InfrastructureError: a rollout is missing.
    """
    # A suite is whole or it is not reported: the tasks that infrastructure loses are not a random sample.
    missing = sorted({task.task_id for task in suite.tasks} - {rollout.task_id for rollout in rollouts})
    if missing or len(rollouts) != len(suite.tasks):
        raise InfrastructureError(
            f"suite {suite.name}: {len(missing)} tasks lost to infrastructure, first {missing[:3]}"
        )
    successes = sum(rollout.outcome.success for rollout in rollouts)
    tokens_in, tokens_out = sum(r.tokens_in for r in rollouts), sum(r.tokens_out for r in rollouts)
    tool_calls = sum(r.tool_calls_count for r in rollouts)
    cost = cost_model.cost(tokens_in=tokens_in, tokens_out=tokens_out, tool_calls=tool_calls)
    by_intent: dict[str, list[bool]] = defaultdict(list)
    for rollout in sorted(rollouts, key=lambda one: one.intent):
        by_intent[rollout.intent].append(rollout.outcome.success)
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
        TamperedError: a suite is missing on one side, or was edited in between.
    """
    # By content: equal task ids prove nothing about what the tasks were.
    hashes = [{name: result.suite_sha256 for name, result in side.items()} for side in (baseline, candidate)]
    if different := sorted(name for name, _ in hashes[0].items() ^ hashes[1].items()):
        raise TamperedError(f"baseline and candidate ran different suites: {different}; evaluate both again")
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
    # Success is seeded and the same in every pass; only the machine's load makes durations differ.

    def typical(side: str) -> dict[str, SuiteResult]:
        sides: list[Mapping[str, SuiteResult]] = [getattr(report, side) for report in passes]
        return {
            name: replace(result, p95_duration_ms=statistics.median(one[name].p95_duration_ms for one in sides))
            for name, result in sides[0].items()
        }

    return replace(passes[0], baseline=typical("baseline"), candidate=typical("candidate"))


def _quantile(values: Sequence[float], q: float) -> float:
    """Return the empirical quantile (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(q * len(ordered)) - 1))]


@dataclass(frozen=True, slots=True, kw_only=True)
class SeededAttempt:
    """The end of one attempt. `seed` numbers the attempts at a task; a finished one came to an answer by itself."""

    task_id: str
    seed: int
    is_finished: bool
    is_success: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StabilityBounds:
    """Limits before the room for chance: a share, a standard deviation, a variance."""

    min_finished: float
    max_seed_sd: float
    max_within_task: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineStability:
    """The three figures and the limits they were held to, widened for chance at this many tasks.

    `seed_sd` is the standard deviation of the success rate over seeds. `within_task` is the mean over tasks of the
    unbiased variance of success over the seeds: 0 when a task always ends alike, 0.25 for a coin, and two attempts at
    a task end alike with probability 1 - 2 * within_task.
    """

    num_tasks: int
    num_seeds: int
    success_by_seed: tuple[float, ...]
    seed_sd: float
    within_task: float
    finished: float
    min_finished: float
    max_seed_sd: float
    max_within_task: float

    @property
    def refusals(self) -> tuple[str, ...]:
        """Return what speaks against the baseline, each with figure and limit; empty when it is stable."""
        found: list[str] = []
        # `not >=` rather than `<`: a figure that is NaN must be refused too.
        if not self.finished >= self.min_finished:
            found.append(f"{self.finished:.1%} of its attempts came to an answer (at least {self.min_finished:.0%})")
        if not self.seed_sd <= self.max_seed_sd:
            rates = ", ".join(f"{rate:.1%}" for rate in self.success_by_seed)
            found.append(f"success by seed is {rates}: sd {self.seed_sd:.3f} (at most {self.max_seed_sd:.3f})")
        if not self.within_task <= self.max_within_task:
            within, limit = self.within_task, self.max_within_task
            found.append(f"success at one and the same task has variance {within:.3f} (at most {limit:.3f})")
        return tuple(found)

    def __str__(self) -> str:
        rate = statistics.mean(self.success_by_seed)
        return (
            f"baseline over {self.num_seeds} seeds x {self.num_tasks} tasks: success {rate:.1%}, sd {self.seed_sd:.3f} "
            f"(limit {self.max_seed_sd:.3f}), within a task {self.within_task:.3f} (limit {self.max_within_task:.3f}), "
            f"finished {self.finished:.1%} (limit {self.min_finished:.0%})"
        )


def baseline_stability(attempts: Sequence[SeededAttempt], bounds: StabilityBounds) -> BaselineStability:
    """Summarise the attempts at every task that has one under each seed; others were lost to infrastructure.

    Both limits on spread are widened by three standard errors at this number of tasks: of a success rate (binomial),
    and of the variance within a task of a fair coin.

    Raises:
        BadDataError: fewer than two seeds, or no task with an attempt under each.
    """
    seeds = sorted({attempt.seed for attempt in attempts})
    by_task: dict[str, dict[int, SeededAttempt]] = defaultdict(dict)
    for attempt in attempts:
        by_task[attempt.task_id][attempt.seed] = attempt
    # Only whole groups: one seed's rate over easier tasks would look like a difference between seeds.
    whole = [group for group in by_task.values() if len(group) == len(seeds)]
    if len(seeds) < 2 or not whole:
        raise BadDataError("attempts", (len(seeds), len(whole)), "needs two seeds and a task attempted under each")
    rates = tuple(statistics.fmean(group[seed].is_success for group in whole) for seed in seeds)
    within = statistics.fmean(statistics.variance(float(one.is_success) for one in group.values()) for group in whole)
    rate, num_seeds, num_tasks = statistics.fmean(rates), len(seeds), len(whole)
    return BaselineStability(
        num_tasks=num_tasks,
        num_seeds=num_seeds,
        success_by_seed=rates,
        seed_sd=statistics.stdev(rates),
        within_task=within,
        finished=statistics.fmean(one.is_finished for group in whole for one in group.values()),
        min_finished=bounds.min_finished,
        max_seed_sd=bounds.max_seed_sd + _Z * math.sqrt(rate * (1 - rate) / num_tasks),
        max_within_task=bounds.max_within_task + _Z / math.sqrt(8 * num_seeds * (num_seeds - 1) * num_tasks),
    )


def require_stable(stability: BaselineStability) -> None:
    """Refuse an unstable baseline.

    Raises:
        StageRefusedError: with every figure that is out of bounds, its limit and the remedy.
    """
    # A policy learns by comparison with its baseline: one that rarely answers, or by the toss of a coin, is no ground.
    if stability.refusals:
        found = "; ".join(stability.refusals)
        seeds = f"{stability.num_seeds} seeds x {stability.num_tasks} tasks"
        raise StageRefusedError(f"the SFT baseline is unstable over {seeds}: {found}; {_REMEDY}")
