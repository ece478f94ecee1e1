"""Preference data from the baseline's own rollouts, which simulated annotators label and rank in pairs."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import combinations, islice
from typing import Any

from cluster.pipeline.sampling import open_pool
from cluster.pipeline.snapshot import check_rubric_labels, read_table, read_tasks, verify_snapshot, write_snapshot
from cluster.plan import place
from cluster.ray_cluster import placed
from cluster.records import RunFolder
from cluster.spec import WorkflowSpec
from rl_actors.agent import rollout_token_ids, rollout_view
from rl_actors.contracts import CALIBRATION_FRACTION, DataSnapshot, PolicyVersion, Rollout, RolloutRequest, Split, Task
from rl_actors.durable import MetricsLog, encode, write_json
from rl_actors.environment import RubricCriterion, Workflow
from rl_actors.evaluation import SeededAttempt, StabilityBounds, baseline_stability, require_stable
from rl_actors.training import PreferencePair


def collect_preferences(
    spec: WorkflowSpec,
    folder: RunFolder,
    workflow: Workflow,
    snapshot: DataSnapshot,
    baseline: PolicyVersion,
    note: Callable[[str], None],
) -> DataSnapshot:
    """Sample the baseline several times per task, and let the annotators label rollouts and rank pairs of them.

    Raises:
        StageRefusedError: The baseline is unstable over the seeds it was sampled with; nobody labels its rollouts.
    """
    reward = spec.reward
    # Tasks of a split of their own: a model calibrated on what it was trained on would look better than it is.
    num_calibration = max(4, int(reward.num_pairs * CALIBRATION_FRACTION))
    pairs_by_split: dict[Split, int] = {"train": reward.num_pairs - num_calibration, "calibration": num_calibration}
    # As many tasks as give about that many pairs: a task gives at most one a rollout.
    tasks = [
        task
        for split, num_pairs in pairs_by_split.items()
        for task in read_tasks(snapshot, split)[: max(2, -(-num_pairs // reward.rollouts_per_task))]
    ]
    rollouts = sample_baseline(spec, baseline, tasks)
    require_stable_baseline(spec, folder, rollouts, note)
    by_id = {task.task_id: task for task in tasks}
    rng = random.Random(spec.seed)
    labels = [row for rollout in rollouts for row in label_rows(workflow, rollout, by_id[rollout.task_id], rng)]
    check_rubric_labels(labels, workflow.rubric, workflow.num_annotators)
    tables = {
        "rollouts": [_rollout_row(rollout, by_id[rollout.task_id].split) for rollout in rollouts],
        "preferences": [row for pair in _pairs(rollouts) for row in preference_rows(workflow, pair, by_id, rng)],
        "rubric_labels": labels,
    }
    return write_snapshot(folder.snapshots, tables)


def sample_baseline(spec: WorkflowSpec, baseline: PolicyVersion, tasks: Sequence[Task]) -> list[Rollout]:
    """Return several sampled attempts per task."""
    count = spec.reward.rollouts_per_task
    requests = [
        RolloutRequest(task=task, group_id=index, seed=index * count + attempt)
        for index, task in enumerate(tasks)
        for attempt in range(count)
    ]
    with placed(place(spec), "offline_eval") as options, closing(open_pool(spec, baseline, options)) as pool:
        return pool.rollouts(requests, spec.ppo.temperature)


def require_stable_baseline(
    spec: WorkflowSpec, folder: RunFolder, rollouts: Sequence[Rollout], note: Callable[[str], None]
) -> None:
    """Refuse a baseline that is unstable over its sampling seeds; the figures stay under `eval/` either way."""
    sft = spec.sft
    bounds = StabilityBounds(
        min_finished=sft.min_finished, max_seed_sd=sft.max_seed_sd, max_within_task=sft.max_within_task
    )
    attempts = [
        SeededAttempt(
            task_id=task_id, seed=seed, is_finished=rollout.status == "ok", is_success=rollout.outcome.success
        )
        for task_id, group in _by_task(rollouts).items()
        for seed, rollout in enumerate(group)
    ]
    stability = baseline_stability(attempts, bounds)
    write_json(folder.evaluations / "baseline_stability.json", encode(stability))
    figures = {name: getattr(stability, name) for name in ("seed_sd", "within_task", "finished")}
    MetricsLog(folder.metrics, "preferences").write(1, {"num_steps": 1, **figures})
    note(str(stability))
    require_stable(stability)


def label_rows(workflow: Workflow, rollout: Rollout, task: Task, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Yield one rubric label per annotator and criterion."""
    view = rollout_view(rollout, task)
    for annotator in range(workflow.num_annotators):
        for criterion, label in workflow.annotate(view, annotator, rng).items():
            yield {
                "task_id": task.task_id,
                "rollout_id": rollout.rollout_id,
                "criterion": criterion,
                "annotator": annotator,
                "label": label,
            }


def preference_rows(
    workflow: Workflow, pair: tuple[Rollout, Rollout], by_id: Mapping[str, Task], rng: random.Random
) -> Iterator[dict[str, Any]]:
    """Yield every annotator's choice between two rollouts of one task."""
    task = by_id[pair[0].task_id]
    first, second = (rollout_view(rollout, task) for rollout in pair)
    for annotator in range(workflow.num_annotators):
        yield {
            "task_id": task.task_id,
            "first_rollout_id": pair[0].rollout_id,
            "second_rollout_id": pair[1].rollout_id,
            "annotator": annotator,
            "prefers_first": workflow.prefer(first, second, annotator, rng),
        }


def read_pairs(
    preferences: DataSnapshot, rubric: Sequence[RubricCriterion], split: Split
) -> tuple[PreferencePair, ...]:
    """Return the pairs of one split, with the annotators' mean choice and mean labels scaled to 0..1."""
    verify_snapshot(preferences)
    rollouts = {row["rollout_id"]: row for row in read_table(preferences.path, "rollouts")}
    labels = _mean_labels(read_table(preferences.path, "rubric_labels"), rubric)
    votes: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row in read_table(preferences.path, "preferences"):
        votes[row["first_rollout_id"], row["second_rollout_id"]].append(row["prefers_first"])
    return tuple(
        PreferencePair(
            task_id=rollouts[first]["task_id"],
            first=tuple(rollouts[first]["token_ids"]),
            second=tuple(rollouts[second]["token_ids"]),
            preference=sum(choices) / len(choices),
            first_rubric=labels[first],
            second_rubric=labels[second],
        )
        for (first, second), choices in votes.items()
        if rollouts[first]["split"] == split
    )


def _mean_labels(rows: Sequence[Mapping[str, Any]], rubric: Sequence[RubricCriterion]) -> dict[str, dict[str, float]]:
    scale = {criterion.name: criterion for criterion in rubric}
    collected: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        criterion = scale[row["criterion"]]
        value = (row["label"] - criterion.low) / (criterion.high - criterion.low)
        collected[row["rollout_id"]][criterion.name].append(value)
    return {
        rollout_id: {name: sum(values) / len(values) for name, values in by_criterion.items()}
        for rollout_id, by_criterion in collected.items()
    }


def _pairs(rollouts: Sequence[Rollout]) -> Iterator[tuple[Rollout, Rollout]]:
    """Yield pairs of different rollouts of one task, at most as many as it has rollouts."""
    for group in _by_task(rollouts).values():
        # Equal rollouts teach nothing.
        different = (
            pair for pair in combinations(group, 2) if rollout_token_ids(pair[0]) != rollout_token_ids(pair[1])
        )
        yield from islice(different, len(group))


def _by_task(rollouts: Sequence[Rollout]) -> dict[str, list[Rollout]]:
    groups: dict[str, list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        groups[rollout.task_id].append(rollout)
    return groups


def _rollout_row(rollout: Rollout, split: Split) -> dict[str, Any]:
    return {
        "rollout_id": rollout.rollout_id,
        "task_id": rollout.task_id,
        "split": split,
        "success": int(rollout.outcome.success),
        "token_ids": rollout_token_ids(rollout),
    }
