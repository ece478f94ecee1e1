"""`SupportDesk`: the workflow's parts behind the protocol that the pipeline knows."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.workflows.support_desk import expert, release_checks, tasks, verifier
from cluster.workflows.support_desk import rubric as labels
from cluster.workflows.support_desk.adversarial import ADVERSARIAL
from cluster.workflows.support_desk.database import create_live_database
from cluster.workflows.support_desk.intents import INTENTS
from rl_actors.contracts import BadInputError, Demonstration, Outcome, Split, Task
from rl_actors.environment import RolloutView, RubricCriterion


class SupportDesk:
    """Order support: 17 kinds of tickets and 12 attacks over a real order database.

    The desk is simulated, and so is its volume: `tickets_per_day` is that of a middling shop, measured nowhere.
    """

    name: str = tasks.NAME
    system_prompt: str = "Order support. Plan, check the owner, follow policy, answer briefly."
    tools_module: str = "cluster.workflows.support_desk.tools"
    intents: Sequence[str] = (*INTENTS, *ADVERSARIAL)
    rubric: Sequence[RubricCriterion] = labels.RUBRIC
    num_annotators: int = len(labels.ANNOTATORS)
    tickets_per_day: int = 20_000
    critical_checks: Sequence[str] = ("no_foreign_customer_id",)
    most_tasks: Mapping[Split, int] = {"live": tasks.most_live_tasks()}

    def __init__(self, mistake_probability: float = expert.MISTAKE_PROBABILITY) -> None:
        """Set how often the expert errs on tickets where it can."""
        self._mistake_probability = mistake_probability

    def build_tasks(self, split: Split, count: int, seed: int) -> list[Task]:
        """Return `count` tasks; order numbers keep the splits apart."""
        return tasks.build_tasks(split, count, seed)

    def demonstrate(self, task: Task, rng: random.Random) -> Demonstration:
        """Return the expert's attempt, honest mistakes included."""
        return expert.demonstrate(task, rng, self._mistake_probability)

    def verify(self, task: Task, state: Mapping[str, Any], reply: str) -> Outcome:
        """Decide success and violations from the final state and the reply."""
        return verifier.verify(task, state, reply)

    def annotate(self, run: RolloutView, annotator: int, rng: random.Random) -> Mapping[str, int]:
        """Return one simulated annotator's labels."""
        return labels.annotate(run, annotator, rng)

    def prefer(self, first: RolloutView, second: RolloutView, annotator: int, rng: random.Random) -> int:
        """Return 1 when this annotator prefers the first run, else 0."""
        return labels.prefer(first, second, annotator, rng)

    def check_reply(self, reply: str, run: RolloutView) -> Mapping[str, bool]:
        """Run the checks that must hold before a reply is released."""
        return release_checks.check_reply(reply, run)

    def build_live_database(self, tasks: Sequence[Task], path: str) -> None:
        """Write a new live database with the worlds of all these tasks.

        Raises:
            BadInputError: the file already exists.
        """
        if Path(path).exists():
            raise BadInputError("path", path, "a live database is already there; name a new file")
        create_live_database([task.world for task in tasks], path)
