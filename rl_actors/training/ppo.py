"""The PPO loop: generate, score, train, publish, attest. Which process does what is behind four protocols."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from rl_actors.agent import training_sample
from rl_actors.algorithms import (
    RestoreLastGood,
    SkipUpdate,
    StabilityLimits,
    StopTraining,
    check_stability,
    reward_outcome_divergence,
)
from rl_actors.contracts import (
    AttestationError,
    InstabilityError,
    LearnerUpdate,
    Rollout,
    RolloutRequest,
    Score,
    Task,
    TrainingSample,
)

WINDOW_STEPS = 4
Window = tuple[Sequence[float], Sequence[float]]
LoopState = Mapping[str, Any]
"""Plain JSON: what the loop knows and the learner does not."""


class DivergenceWatch:
    """Whether the learned reward still measures what the verifier verifies: the first steps against the latest.

    `seen` is its whole state, plain JSON.
    """

    def __init__(self, seen: Sequence[Window] = ()) -> None:
        """Go on from what another watch has seen."""
        self._steps = [(list(critic), list(outcome)) for critic, outcome in seen]

    @property
    def seen(self) -> list[Window]:
        """Critic scores and verified outcomes of the steps it still needs."""
        return [*self._steps]

    def observe(self, rollouts: Sequence[Rollout], scores: Sequence[Score]) -> float:
        """Take in one step; returns the divergence in standard deviations, 0.0 until two windows do not overlap."""
        critic = [score.critic_score for score in scores]
        self._steps.append((critic, [float(rollout.outcome.success) for rollout in rollouts]))
        if len(self._steps) > 2 * WINDOW_STEPS:
            del self._steps[WINDOW_STEPS]  # between the two windows
        # Windows that overlap would compare steps with themselves.
        if len(self._steps) < 2 * WINDOW_STEPS:
            return 0.0
        early, late = self._steps[:WINDOW_STEPS], self._steps[-WINDOW_STEPS:]
        columns = [[x for step in window for x in step[column]] for window in (early, late) for column in (0, 1)]
        return reward_outcome_divergence(*columns)


class RolloutSource(Protocol):
    """Attempts requests; what infrastructure broke is missing from the result, never a zero-reward sample."""

    def rollouts(self, requests: Sequence[RolloutRequest], temperature: float) -> list[Rollout]:
        """Return the finished rollouts, sampled at `temperature`."""
        ...


class Scorer(Protocol):
    """Scores finished rollouts."""

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """Return one score per rollout, in order."""
        ...


class Learner(Protocol):
    """Updates the policy."""

    def update(self, samples: Sequence[TrainingSample]) -> LearnerUpdate:
        """Take one update."""
        ...

    def save_checkpoint(self, weights_version: int, loop_state: LoopState) -> None:
        """Make the state after this version durable, with what the loop itself must remember."""
        ...


class WeightSync(Protocol):
    """Publishes the learner's weights to every engine and proves that they serve them."""

    def publish(self, weights_version: int) -> float:
        """Publish and attest; returns the largest gap of any worker. Raises AttestationError."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PpoSchedule:
    """Numbers of the loop; those of the update are the learner's.

    `resample_rounds` is how often a step tries other tasks in place of groups without signal (dynamic sampling).
    """

    num_steps: int
    tasks_per_step: int
    rollouts_per_task: int
    checkpoint_every: int
    seed: int
    temperature: float = 1.0
    resample_rounds: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PpoPorts:
    """The four protocols, and where metrics go.

    `report_trips` gets the step and its tripwires, each with reason code, metric, value and limit: those the learner
    acted on, and the one that ends the run.
    """

    source: RolloutSource
    scorer: Scorer
    learner: Learner
    sync: WeightSync
    report: Callable[[int, Mapping[str, float]], None]
    report_trips: Callable[[int, Sequence[str]], None] = lambda step, trips: None
    clock: Callable[[], float] = time.monotonic


def requests_for_step(
    tasks: Sequence[Task], plan: PpoSchedule, step: int, resample_round: int = 0
) -> list[RolloutRequest]:
    """Return the rollout requests of a step: tasks in order over the shuffled list, a group of attempts per task."""
    requests = []
    for offset in range(plan.tasks_per_step):
        # Rounds 1, 2, ... lie behind all first requests of the run, so that no step draws another's tasks.
        position = (resample_round * plan.num_steps + step) * plan.tasks_per_step + offset
        task = tasks[position % len(tasks)]
        for attempt in range(plan.rollouts_per_task):
            # A seed of its own for each attempt of a run; 7919 is a prime, so that runs of near seeds share none.
            seed = (plan.seed * 7919 + position) * plan.rollouts_per_task + attempt
            requests.append(RolloutRequest(task=task, group_id=offset, seed=seed))
    return requests


def run_ppo(
    tasks: Sequence[Task],
    plan: PpoSchedule,
    ports: PpoPorts,
    limits: StabilityLimits,
    *,
    start: int = 0,
    loop_state: LoopState | None = None,
) -> None:
    """Run steps `start..num_steps-1`; the engines must already serve the weights of version `start`.

    To resume, give what `save_checkpoint` was given with that version: the steps then are those of a run that never
    stopped, bit for bit where rollouts are (an engine that batches by arrival time is not).

    Raises:
        InstabilityError: A tripwire asked to stop; its message begins with the reason code.
        AttestationError: An engine does not serve what was published, or a rollout was made by other weights.
    """
    watch = DivergenceWatch((loop_state or {}).get("divergence_watch", ()))

    def save(step: int) -> None:
        ports.learner.save_checkpoint(step, {"divergence_watch": watch.seen})

    if start == 0:
        save(0)  # what a tripwire of the first steps goes back to
    for step in range(start, plan.num_steps):
        first, *others = (requests_for_step(tasks, plan, step, n) for n in range(plan.resample_rounds + 1))
        try:
            metrics = run_step(first, ports, step, plan.temperature, watch, others)
            ports.report(step + 1, metrics)  # first, so that the row which ends a run is written
            require_stable(metrics, limits)
        except InstabilityError as error:
            # A step that is stopped half-way has no metrics: without this nothing would say what ended the run.
            ports.report_trips(step + 1, (str(error),))
            raise
        if (step + 1) % plan.checkpoint_every == 0 or step + 1 == plan.num_steps:
            save(step + 1)


def run_step(
    requests: Sequence[RolloutRequest],
    ports: PpoPorts,
    weights_version: int,
    temperature: float,
    watch: DivergenceWatch,
    others: Sequence[Sequence[RolloutRequest]] = (),
) -> dict[str, float]:
    """Generate, score, train, publish once; returns the step's metrics with the seconds of each part.

    `others` are requests for groups that turn out to have no signal, a list for each round (`sample_groups`).
    `weights_version` is the attested version that the engines serve now. Each tripwire that the update met is a metric
    `trip_<reason code>`, how often; a restore is `restored` = 1.
    """
    seconds: dict[str, float] = {}
    with _timed(seconds, "generate_s", ports.clock):
        rollouts, num_resampled = sample_groups(requests, others, ports.source, temperature)
    # Before anything is scored: nothing that other weights sampled may reach the learner.
    require_attested_rollouts(rollouts, weights_version)
    with _timed(seconds, "score_s", ports.clock):
        scores = ports.scorer.score(rollouts)
    samples = [training_sample(rollout, score.reward) for rollout, score in zip(rollouts, scores, strict=True)]
    with _timed(seconds, "train_s", ports.clock):
        update = ports.learner.update(samples)
    if update.trips:
        ports.report_trips(weights_version + 1, update.trips)
    with _timed(seconds, "sync_s", ports.clock):
        gap = ports.sync.publish(update.weights_version)
    return {
        **summarise(rollouts, scores, seconds),
        **update.metrics,
        **Counter(f"trip_{trip.partition(':')[0]}" for trip in update.trips),
        "restored": float(update.restore_factor > 0),
        "reward_outcome_divergence": watch.observe(rollouts, scores),
        **seconds,
        "attestation_gap": gap,
        "weights_version": float(update.weights_version),
        "num_dropped": float(len(requests) - len(rollouts)),
        "num_resampled_groups": float(num_resampled),
    }


def sample_groups(
    requests: Sequence[RolloutRequest],
    others: Sequence[Sequence[RolloutRequest]],
    source: RolloutSource,
    temperature: float,
) -> tuple[list[Rollout], int]:
    """Return a step's rollouts, and how many groups are not those first asked for.

    Each round asks for other tasks in place of flat groups, and takes those that are not flat (dynamic sampling, DAPO
    section 3.2, arXiv 2503.14476, with a bound on the tries).
    """
    rollouts, taken = source.rollouts(requests, temperature), 0
    for candidates in others:
        flat = flat_groups(rollouts)
        if not flat:
            break
        drawn = source.rollouts([request for request in candidates if request.group_id in flat], temperature)
        better = {rollout.group_id for rollout in drawn} - flat_groups(drawn)
        rollouts = [r for r in rollouts if r.group_id not in better] + [r for r in drawn if r.group_id in better]
        taken += len(better)
    return rollouts, taken


def flat_groups(rollouts: Sequence[Rollout]) -> set[int]:
    """Return the groups whose attempts all came to the same verified outcome."""
    outcomes: dict[int, set[bool]] = {}
    for rollout in rollouts:
        outcomes.setdefault(rollout.group_id, set()).add(rollout.outcome.success)
    return {group for group, seen in outcomes.items() if len(seen) == 1}


def require_attested_rollouts(rollouts: Sequence[Rollout], weights_version: int) -> None:
    """Reject a batch of which any token was sampled by other weights than those attested.

    Raises:
        AttestationError: Names the first such rollout and its version.
    """
    for rollout in rollouts:
        for turn in rollout.turns:
            found = turn.completion.weights_version
            if found != weights_version:
                raise AttestationError(
                    f"rollout {rollout.rollout_id} was sampled by weights version {found}, attested is "
                    f"{weights_version}; the batch is rejected"
                )


def require_stable(metrics: Mapping[str, float], limits: StabilityLimits) -> None:
    """Stop training when a step's own metrics say so: non-finite, collapsed, or optimising the wrong thing.

    Raises:
        InstabilityError: Its message begins with the reason code.
    """
    decision = check_stability(metrics, limits)
    # Skipping a minibatch, ending an update and going back to a checkpoint were decided in the learner, before
    # anything was applied; what it has acted on is not judged again.
    is_handled = any(name.startswith("trip_") for name in metrics)
    is_non_finite = isinstance(decision, SkipUpdate) and decision.reason_code == "non_finite"
    is_open = (is_non_finite or isinstance(decision, RestoreLastGood)) and not is_handled
    if is_open or isinstance(decision, StopTraining):
        raise InstabilityError(f"{decision}; the newest checkpoint holds the last good state")


def summarise(rollouts: Sequence[Rollout], scores: Sequence[Score], seconds: Mapping[str, float]) -> dict[str, float]:
    """Return the step's means: reward, success, violations, tool errors, tokens per second."""
    # Not empty: a pool that lost more than a quarter of them has already ended the run.
    count = len(rollouts)
    tokens = sum(rollout.tokens_out for rollout in rollouts)
    calls = sum(rollout.tool_calls_count for rollout in rollouts)
    return {
        "reward": sum(score.reward for score in scores) / count,
        "critic_score": sum(score.critic_score for score in scores) / count,
        "success": sum(rollout.outcome.success for rollout in rollouts) / count,
        "violation_rate": sum(bool(rollout.outcome.violations) for rollout in rollouts) / count,
        "tool_error_rate": sum(rollout.tool_error_count for rollout in rollouts) / max(calls, 1),
        "truncated_fraction": sum(rollout.status != "ok" for rollout in rollouts) / count,
        "tokens_per_rollout": tokens / count,
        "tokens_per_s": tokens / max(seconds["generate_s"], 1e-9),
    }


@contextmanager
def _timed(seconds: dict[str, float], name: str, clock: Callable[[], float]) -> Iterator[None]:
    started = clock()
    yield
    seconds[name] = clock() - started
