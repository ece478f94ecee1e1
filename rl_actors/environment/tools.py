"""Tools of a workflow: their declaration, the world they act on, and the text a policy reads after one ran."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

SideEffect = Literal["read", "write"]
# The name of the planner's turn: no tool of a workflow may have it.
PLAN_TOOL: Final = "plan"


def render_observation(value: object) -> str:
    """Return a tool's JSON value as compact JSON; keys keep the order in which the tool wrote them."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def render_error(message: str) -> str:
    """Return the observation of a refused or failed call: `{"error":"..."}`."""
    return render_observation({"error": message})


PLAN_ACCEPTED: Final = render_observation({"plan": "accepted"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSpec:
    """A tool the policy may call: JSON Schema for its arguments, side-effect class and wall-clock limit."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    side_effect: SideEffect
    timeout_s: float = 2.0
    max_output_chars: int = 2000  # an observation is tokens in every later prompt of the run


class World(Protocol):
    """The stateful side of a workflow; lives in the sandbox. A handle is whatever `open` returns.

    `functions` are by tool name f(handle, **arguments) -> JSON value; one raises ToolFailure for an expected refusal.
    """

    tools: Sequence[ToolSpec]
    functions: Mapping[str, Callable[..., Any]]

    def open(self, world: Mapping[str, Any]) -> Any:
        """Open a private world from a task's rows, or the shared live one from {"database": path}."""
        ...

    def read_state(self, handle: Any, selector: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the rows that decide an outcome; `selector` is `task.goal["selector"]`."""
        ...

    def close(self, handle: Any) -> None:
        """Release the world."""


class ToolFailure(Exception):
    """A tool refuses for a reason of its own (order not found, already shipped); becomes an error observation."""
