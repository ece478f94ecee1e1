"""The parts of a workflow, each a small protocol, and `Workflow`, their composition.

A workflow is a Python package with a module-level `WORKFLOW` that satisfies `Workflow`, and a module `tools` whose
`WORLD` satisfies `World` and runs in the sandbox, apart from the engine. Adding one means adding a folder. Whether it
has a part is `isinstance(workflow, Annotator)`.
"""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from rl_actors.contracts import Demonstration, Outcome, Split, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class RubricCriterion:
    """One question an annotator answers about a finished rollout, on the integer scale `low..high`."""

    name: str
    question: str
    low: int
    high: int
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutView:
    """A finished rollout as annotators and checks see it: no hidden goal, only what happened and was true after."""

    task: Task
    tool_calls: tuple[tuple[str, Mapping[str, Any]], ...]
    reply: str
    outcome: Outcome
    num_turns: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class TaskSource(Protocol):
    """The source of tasks."""

    def build_tasks(self, split: Split, count: int, seed: int) -> list[Task]:
        """Return `count` tasks of a split, unique ids, no prompt shared with another split's task."""
        ...


@runtime_checkable
class Demonstrator(Protocol):
    """An expert that shows how a task is solved. Optional: without one there is nothing to imitate, so no SFT."""

    def demonstrate(self, task: Task, rng: random.Random) -> Demonstration:
        """Return the scripted expert's attempt, honest mistakes included."""
        ...


@runtime_checkable
class Annotator(Protocol):
    """Annotators that label and rank finished rollouts. Optional: without them there is no reward model."""

    rubric: Sequence[RubricCriterion]
    num_annotators: int

    def annotate(self, run: RolloutView, annotator: int, rng: random.Random) -> Mapping[str, int]:
        """Return one annotator's label per rubric criterion."""
        ...

    def prefer(self, first: RolloutView, second: RolloutView, annotator: int, rng: random.Random) -> int:
        """Return 1 when this annotator prefers the first rollout, else 0."""
        ...


@runtime_checkable
class Verifier(Protocol):
    """The policy program that decides an outcome."""

    def verify(self, task: Task, state: Mapping[str, Any], reply: str) -> Outcome:
        """Decide success and violations from the final state and the reply."""
        ...


class Workflow(TaskSource, Demonstrator, Annotator, Verifier, Protocol):
    """Everything the pipeline asks of a workflow. Pure and seeded: equal arguments give equal results.

    `tickets_per_day` reach it: a canary is decided on them. A live failure of one of the `critical_checks`, which are
    checks of `check_reply`, ends a candidate's release.
    """

    name: str
    system_prompt: str
    tools_module: str
    intents: Sequence[str]
    tickets_per_day: int
    critical_checks: Sequence[str]

    def check_reply(self, reply: str, run: RolloutView) -> Mapping[str, bool]:
        """Run the policy checks that must all hold before a reply is released. Uses no goal."""
        ...

    def build_live_database(self, tasks: Sequence[Task], path: str) -> None:
        """Write the shared live database that holds the worlds of all these tasks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowRef:
    """The place of a workflow, as plain data."""

    # This crosses process borders, not the workflow: its package may not be importable on the other side yet.

    module: str
    search_path: str = ""

    def load(self) -> Workflow:
        """Import the workflow's package, from `search_path` when it lives outside the installed packages."""
        # In front: a user's folder must not be shadowed by an installed package of the same name.
        if self.search_path and self.search_path not in sys.path:
            sys.path.insert(0, self.search_path)
        return importlib.import_module(self.module).WORKFLOW
