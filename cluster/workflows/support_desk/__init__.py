"""Order support: tickets about orders, answered with ten tools over a SQLite database."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.workflows.support_desk import expert, replies, tasks, verifier
from cluster.workflows.support_desk import rubric as labels
from cluster.workflows.support_desk.adversarial import ADVERSARIAL
from cluster.workflows.support_desk.database import create_live_database
from cluster.workflows.support_desk.tickets import INTENTS
from rl_actors.contracts import BadInputError, Demonstration, Split, Task
from rl_actors.environment import RubricCriterion, Workflow


class SupportDesk:
    """17 kinds of tickets and 12 attacks over a real order database."""

    name: str = tasks.NAME
    system_prompt: str = "Order support. Plan, check the owner, follow policy, answer briefly."
    tools_module: str = "cluster.workflows.support_desk.tools"
    intents: Sequence[str] = (*INTENTS, *ADVERSARIAL)
    rubric: Sequence[RubricCriterion] = labels.RUBRIC
    num_annotators: int = len(labels.ANNOTATORS)
    # The desk is simulated, and so is its volume: that of a middling shop, measured nowhere.
    tickets_per_day: int = 20_000
    critical_checks: Sequence[str] = ("no_foreign_customer_id",)
    most_tasks: Mapping[Split, int] = {"live": tasks.most_live_tasks()}

    build_tasks = staticmethod(tasks.build_tasks)
    verify = staticmethod(verifier.verify)
    annotate = staticmethod(labels.annotate)
    prefer = staticmethod(labels.prefer)
    check_reply = staticmethod(replies.check_reply)

    def __init__(self, mistake_probability: float = expert.MISTAKE_PROBABILITY) -> None:
        """Set how often the expert errs on tickets where it can."""
        self._mistake_probability = mistake_probability

    def demonstrate(self, task: Task, rng: random.Random) -> Demonstration:
        """Return the expert's attempt, honest mistakes included."""
        return expert.demonstrate(task, rng, self._mistake_probability)

    def build_live_database(self, tasks: Sequence[Task], path: str) -> None:
        """Write a new live database with the worlds of all these tasks.

        Raises:
            BadInputError: the file already exists.
        """
        if Path(path).exists():
            raise BadInputError("path", path, "a live database is already there; name a new file")
        create_live_database([task.world for task in tasks], path)


WORKFLOW: Workflow = SupportDesk()
