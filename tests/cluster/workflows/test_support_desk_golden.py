"""What the desk builds from a seed, to the byte: a run that was frozen yesterday is frozen alike tomorrow."""

from __future__ import annotations

import random

import pytest

from cluster.pipeline.snapshot import SPLITS, demonstration_rows, task_rows
from cluster.workflows.support_desk import WORKFLOW
from rl_actors.contracts import Demonstration, Task
from rl_actors.durable import sha256_json
from tests.cluster.workflows.desk_runs import calls_of, reply_of, score, view

TASKS = "7581781df984c4f7e46edc929ffa45431212a6d257b17f9c80f139b3018dc116"
DEMONSTRATIONS = "36f85e6fc6c884174ee3bba814940fd5890d5af1b4e830c11b31b78359be493d"
LABELS = "a8c821b63fff7cad9b50c5e61b6978a9a165d5125116efec851ef186fe77886e"


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return [task for split in SPLITS for task in WORKFLOW.build_tasks(split, 300, 0)]


@pytest.fixture(scope="module")
def demonstrations(tasks: list[Task]) -> list[Demonstration]:
    rng = random.Random(0)
    return [WORKFLOW.demonstrate(task, rng) for task in tasks if task.split == "train"]


def test_tasks_of_every_split(tasks: list[Task]) -> None:
    assert sha256_json(task_rows(tasks)) == TASKS


def test_demonstrations(demonstrations: list[Demonstration]) -> None:
    assert sha256_json(demonstration_rows(demonstrations)) == DEMONSTRATIONS


def test_another_seed_is_seen() -> None:
    assert sha256_json(task_rows(WORKFLOW.build_tasks("train", 1, 0))) != sha256_json(
        task_rows(WORKFLOW.build_tasks("train", 1, 1))
    )


def test_outcomes_checks_labels_and_preferences(tasks: list[Task], demonstrations: list[Demonstration]) -> None:
    rng = random.Random(0)
    views = [
        view(task, calls_of(attempt), reply_of(attempt), score(task, attempt))
        for task, attempt in zip(tasks, demonstrations, strict=False)
    ]
    found = [
        {
            "outcome": [run.outcome.success, list(run.outcome.violations), list(run.outcome.reasons)],
            "checks": dict(WORKFLOW.check_reply(run.reply, run)),
            "labels": [dict(WORKFLOW.annotate(run, person, rng)) for person in range(WORKFLOW.num_annotators)],
            "prefers": [WORKFLOW.prefer(run, views[0], person, rng) for person in range(WORKFLOW.num_annotators)],
        }
        for run in views
    ]
    assert sha256_json(found) == LABELS
