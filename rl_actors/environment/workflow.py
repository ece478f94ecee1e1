"""What a workflow brings: tasks, a world with tools, an expert, a verifier, a rubric and its annotators.

A workflow is a Python package with a module-level `WORKFLOW` that satisfies `Workflow`, and a module `tools` whose
`WORLD` satisfies `World` and runs inside tool-host processes, apart from the engine. Adding one means adding a folder.
"""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rl_actors.contracts import Demonstration, Outcome, Split, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class RubricCriterion:
    """One question an annotator answers about a finished run, on the integer scale `low..high`."""

    name: str
    question: str
    low: int
    high: int
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutView:
    """What an annotator or scorer sees of a finished run: no hidden goal, only what happened and was true after."""

    task: Task
    tool_calls: tuple[tuple[str, Mapping[str, Any]], ...]
    reply: str
    outcome: Outcome
    num_turns: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)


class Workflow(Protocol):
    """Everything the pipeline asks of a workflow. Pure and seeded: equal arguments give equal results."""

    name: str
    system_prompt: str
    tools_module: str
    intents: Sequence[str]
    rubric: Sequence[RubricCriterion]
    num_annotators: int
    tickets_per_day: int
    """Tickets that reach it on a day: what a canary can be decided on."""
    critical_checks: Sequence[str]
    """Checks of `check_reply` of which one failure, live, ends a candidate's release."""

    def build_tasks(self, split: Split, count: int, seed: int) -> list[Task]:
        """Return `count` tasks of a split, unique ids, no prompt shared with another split's task."""
        ...

    def demonstrate(self, task: Task, rng: random.Random) -> Demonstration:
        """Return the scripted expert's attempt, honest mistakes included."""
        ...

    def verify(self, task: Task, state: Mapping[str, Any], reply: str) -> Outcome:
        """Decide success and violations from the final state and the reply."""
        ...

    def annotate(self, run: RolloutView, annotator: int, rng: random.Random) -> Mapping[str, int]:
        """Return one simulated annotator's label per rubric criterion."""
        ...

    def prefer(self, first: RolloutView, second: RolloutView, annotator: int, rng: random.Random) -> int:
        """Return 1 when this annotator prefers the first run, else 0."""
        ...

    def check_reply(self, reply: str, run: RolloutView) -> Mapping[str, bool]:
        """Run the policy checks that must all hold before a reply is released. Uses no goal."""
        ...

    def build_live_database(self, tasks: Sequence[Task], path: str) -> None:
        """Write the shared live database that holds the worlds of all these tasks."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowRef:
    """Where a workflow lives, as plain data: what crosses process borders instead of the workflow itself."""

    module: str
    search_path: str = ""

    def load(self) -> Workflow:
        """Import the workflow's package, from `search_path` when it lives outside the installed packages."""
        if self.search_path and self.search_path not in sys.path:
            sys.path.insert(0, self.search_path)
        return importlib.import_module(self.module).WORKFLOW
