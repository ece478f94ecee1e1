"""Is the workload worth it: does a ticket take several steps, do enough arrive to decide a canary (requirement 62)?

A workflow that cannot work is refused before anything is trained; a doubtful one gets a warning.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from cluster.spec import NUM_RELEASES, WorkflowSpec
from cluster.workflows import find_workflow, most_tasks
from rl_actors.contracts import BadInputError, Demonstration, Outcome, unknown_name
from rl_actors.environment import RolloutView, Workflow

SAMPLE_TASKS: Final = 200
MIN_TOOL_CALLS: Final = 1.0
# Where every ticket takes a call, a lower mean says that more than half of them take no second one.
MULTI_STEP_TOOL_CALLS: Final = 1.5
LONG_DAYS, MAX_DAYS = 7.0, 90.0
_SHORTEN: Final = "lower release.min_canary_requests, raise the share or choose a busier workflow"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Work that one workflow brings to a release. `tickets_to_verdict` is the least that the ramp can do with.

    Example: Workload(mean_tool_calls=1.8, tickets_per_day=20_000, tickets_to_verdict=1300) takes 0.065 days.
    """

    mean_tool_calls: float
    tickets_per_day: int
    tickets_to_verdict: int

    @property
    def days_to_verdict(self) -> float:
        """Days until the ramp has had its tickets, all of them routed through it."""
        return self.tickets_to_verdict / self.tickets_per_day

    @property
    def warnings(self) -> tuple[str, ...]:
        """Each doubt about it, with the remedy."""
        found: list[str] = []
        if self.mean_tool_calls < MULTI_STEP_TOOL_CALLS:
            found.append(
                f"single-step: {self.mean_tool_calls:.2f} tool calls a ticket; RL against one call is rarely worth it; "
                "use a prompt or SFT"
            )
        if self.days_to_verdict > LONG_DAYS:
            found.append(f"the canary would need {self.days_to_verdict:,.0f} days; {_SHORTEN}")
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        return asdict(self) | {"days_to_verdict": self.days_to_verdict, "warnings": list(self.warnings)}


def tickets_needed(spec: WorkflowSpec) -> int:
    """Return how many live tickets bring every ramp step its candidate runs: at least this many, at its share."""
    release = spec.release
    return sum(math.ceil(release.min_canary_requests * 100 / share) for share in release.ramp)


def mean_tool_calls(demonstrations: Sequence[Demonstration]) -> float:
    """Return the tool calls of a demonstration, on average; a plan is none. 0 without demonstrations."""
    calls = sum(turn.kind == "tool" for item in demonstrations for turn in item.turns)
    return calls / len(demonstrations) if demonstrations else 0.0


def measure_workload(spec: WorkflowSpec, workflow: Workflow) -> Workload:
    """Let the expert work through the first train tasks. Raises BadInputError when the workflow declares no volume."""
    volume: object = getattr(workflow, "tickets_per_day", None)
    if not isinstance(volume, int) or isinstance(volume, bool) or volume < 1:
        remedy = f"{workflow.name} must declare how many tickets reach it on a day, as a whole number above 0"
        raise BadInputError("tickets_per_day", volume, remedy)
    # Seeded as the snapshot: these are the first rows that it will freeze.
    rng = random.Random(spec.seed)
    tasks = workflow.build_tasks("train", min(SAMPLE_TASKS, spec.data.num_train), spec.seed)
    return Workload(
        mean_tool_calls=mean_tool_calls([workflow.demonstrate(task, rng) for task in tasks]),
        tickets_per_day=volume,
        tickets_to_verdict=tickets_needed(spec),
    )


def require_workload(spec: WorkflowSpec, workload: Workload) -> None:
    """Refuse a workload without steps to learn, or one that no canary could decide in a season.

    Raises:
        BadInputError: names the workflow, or the knob that makes the canary so long.
    """
    if workload.mean_tool_calls < MIN_TOOL_CALLS:
        remedy = f"its tickets take {workload.mean_tool_calls:.2f} tool calls, at least {MIN_TOOL_CALLS:g} is needed: "
        raise BadInputError("workflow.name", spec.workflow.name, f"{remedy}there are no steps to learn; use a prompt")
    if workload.days_to_verdict > MAX_DAYS:
        days = f"the canary would need {workload.days_to_verdict:,.0f} days at {workload.tickets_per_day:,} tickets a "
        remedy = f"{days}day, at most {MAX_DAYS:g} are allowed; {_SHORTEN}"
        raise BadInputError("release.min_canary_requests", spec.release.min_canary_requests, remedy)


def check_workflow(spec: WorkflowSpec) -> None:
    """Refuse a workflow that cannot be loaded, that has too few tasks, or whose workload cannot carry a release.

    Raises:
        BadInputError: names the workflow, what it declares wrongly, or the knob and the largest value that every seed
            can serve.
    """
    workflow = find_workflow(spec.workflow.name)
    for split, largest in most_tasks(workflow).items():
        times = NUM_RELEASES if split == "live" else 1
        asked = spec.num_tasks[split]
        if asked * times > largest:
            remedy = f"{spec.workflow.name} has tasks for at most {largest // times}; lower it"
            raise BadInputError(f"data.num_{split}", asked, remedy)
    check_critical(workflow)
    require_workload(spec, measure_workload(spec, workflow))


def check_critical(workflow: Workflow) -> None:
    """Refuse a critical check that the workflow never reports. Raises BadInputError with the nearest one there is."""
    # Such a check would guard nothing, and nobody would notice.
    named: object = getattr(workflow, "critical_checks", None)
    if not isinstance(named, tuple | list):
        remedy = f"{workflow.name} must name its critical checks, () where it has none"
        raise BadInputError("critical_checks", named, remedy)
    (task,) = workflow.build_tasks("train", 1, 0)
    empty = RolloutView(task=task, tool_calls=(), reply="", outcome=Outcome(success=False, violations=(), reasons=()))
    reported = workflow.check_reply("", empty)
    for name in named:
        if name not in reported:
            remedy = f"{workflow.name} reports no such policy check; {unknown_name(str(name), reported)}"
            raise BadInputError("critical_checks", name, remedy)
