"""Whether a baseline is steady enough to train from: the same tasks, attempted once under each of several seeds.

A policy learns by being compared with its baseline. One that rarely comes to an answer, whose success depends on the
seed of the evaluation, or that treats the same task by the toss of a coin, is no ground to compare against.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from rl_actors.contracts import BadDataError, StageRefusedError

_Z = 3.0


_REMEDY = "train longer (sft.epochs), more gently (a lower sft.learning_rate), or from another seed"


@dataclass(frozen=True, slots=True, kw_only=True)
class SeededAttempt:
    """How one attempt ended. `seed` numbers the attempts at a task; a finished one came to an answer by itself."""

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
        """What speaks against the baseline, each with figure and limit; empty when it is stable."""
        found: list[str] = []
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
        """One line for whoever watches."""
        rate = statistics.mean(self.success_by_seed)
        return (
            f"baseline over {self.num_seeds} seeds x {self.num_tasks} tasks: success {rate:.1%}, sd {self.seed_sd:.3f} "
            f"(limit {self.max_seed_sd:.3f}), within a task {self.within_task:.3f} (limit {self.max_within_task:.3f}), "
            f"finished {self.finished:.1%} (limit {self.min_finished:.0%})"
        )


def baseline_stability(attempts: Sequence[SeededAttempt], bounds: StabilityBounds) -> BaselineStability:
    """Summarise the attempts at every task that has one under each seed; others were lost to infrastructure.

    Both limits on spread are widened by three standard errors at this number of tasks: of a success rate (binomial),
    and of the variance within a task of a fair coin. A handful of tasks therefore proves little, and refuses little.

    Raises:
        BadDataError: Fewer than two seeds, or no task with an attempt under each.
    """
    seeds = sorted({attempt.seed for attempt in attempts})
    by_task: dict[str, dict[int, SeededAttempt]] = defaultdict(dict)
    for attempt in attempts:
        by_task[attempt.task_id][attempt.seed] = attempt
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
    """Refuse an unstable baseline before anything is trained against it.

    Raises:
        StageRefusedError: With every figure that is out of bounds, its limit and the remedy.
    """
    if stability.refusals:
        found = "; ".join(stability.refusals)
        seeds = f"{stability.num_seeds} seeds x {stability.num_tasks} tasks"
        raise StageRefusedError(f"the SFT baseline is unstable over {seeds}: {found}; {_REMEDY}")
