"""How the support-desk tests run attempts: the real tools on a real database, calls given as data."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cluster.workflows.support_desk import WORKFLOW
from cluster.workflows.support_desk.database import Desk
from cluster.workflows.support_desk.expert import demonstrate
from cluster.workflows.support_desk.tools import WORLD
from rl_actors.contracts import Demonstration, Outcome, Split, Task
from rl_actors.environment.tools import ToolFailure
from rl_actors.environment.workflow import RolloutView

Call = tuple[str, Mapping[str, Any]]


def try_call(desk: Desk, tool: str, arguments: Mapping[str, Any]) -> Any:
    """Call a tool; a refusal is returned as its text."""
    try:
        return WORLD.functions[tool](desk, **arguments)
    except ToolFailure as failure:
        return str(failure)


def outcome_of(task: Task, calls: Sequence[Call], reply: str, world: Mapping[str, Any] | None = None) -> Outcome:
    """Run calls on the task's private world (or the given one) and verify."""
    desk = WORLD.open(task.world if world is None else world)
    try:
        for tool, arguments in calls:
            try_call(desk, tool, arguments)
        return WORKFLOW.verify(task, WORLD.read_state(desk, task.goal["selector"]), reply)
    finally:
        WORLD.close(desk)


def calls_of(demonstration: Demonstration) -> list[Call]:
    """Return the tool calls of a demonstration."""
    return [(turn.tool, turn.arguments) for turn in demonstration.turns if turn.kind == "tool"]


def reply_of(demonstration: Demonstration) -> str:
    """Return its final text."""
    return demonstration.turns[-1].text


def right(task: Task) -> Demonstration:
    """Return the attempt of an expert who never errs."""
    return demonstrate(task, random.Random(0), 0.0)


def wrong(task: Task) -> Demonstration:
    """Return the attempt of an expert who always errs where he can."""
    return demonstrate(task, random.Random(0), 1.0)


def score(task: Task, demonstration: Demonstration) -> Outcome:
    """Replay a demonstration on a fresh world and verify it."""
    return outcome_of(task, calls_of(demonstration), reply_of(demonstration))


def one_task(intent: str, split: Split = "train", seed: int = 5, skip: int = 0) -> Task:
    """Return the task number `skip` of an intent."""
    matching = [task for task in WORKFLOW.build_tasks(split, 400, seed) if task.intent == intent]
    return matching[skip]


def view(task: Task, calls: Sequence[Call], reply: str, outcome: Outcome | None = None) -> RolloutView:
    """Return a finished run as annotators and checks see it."""
    seen = outcome or outcome_of(task, calls, reply)
    return RolloutView(task=task, tool_calls=tuple(calls), reply=reply, outcome=seen)


def with_ticket(task: Task, **changes: Any) -> Task:
    """Return the task with another hidden ticket."""
    return replace(task, goal={**task.goal, "ticket": {**task.goal["ticket"], **changes}})
