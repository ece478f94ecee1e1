"""Decides whether a tool call may run: allow-list, arguments against JSON Schema, plan, budget. Deny by default.

A denied call is an observation for the policy and counts as a tool error; only an approved one reaches the sandbox.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from jsonschema import Draft202012Validator

from rl_actors.contracts import PlanCause, PlanRevision, ToolCall, ToolResult
from rl_actors.environment import PLAN_ACCEPTED, PLAN_TOOL, ToolSpec, render_error

if TYPE_CHECKING:
    from rl_actors.sandbox import ToolWorld

# The policy writes steps of any length, and each is kept in the ledger; a cut one ends in an ellipsis.
MAX_STEP_CHARS: Final = 200
_PLAN_SCHEMA = {
    "type": "object",
    "properties": {
        "steps": {"type": "array", "items": {"type": "string"}, "maxItems": 16},
        "tool_budget": {"type": "integer", "minimum": 0},
    },
    "required": ["steps", "tool_budget"],
    "additionalProperties": False,
}


class Toolset:
    """The allow-list of a workflow with its compiled argument schemas; shared by every request."""

    def __init__(self, tools: Sequence[ToolSpec]) -> None:
        self._validators = {tool.name: Draft202012Validator(dict(tool.parameters)) for tool in tools}
        self._plan = Draft202012Validator(_PLAN_SCHEMA)

    def refusal(self, call: ToolCall) -> str:
        """Return why this call may not run, or an empty string."""
        # The planner's schema first: a tool called `plan` would be a way around the budget.
        validator = self._plan if call.name == PLAN_TOOL else self._validators.get(call.name)
        if validator is None:
            return "unknown_tool"
        if call.arguments is None or not validator.is_valid(dict(call.arguments)):
            return "bad_arguments"
        return ""


@dataclass(slots=True)
class Executor:
    """The calls of one request: counts, budget, and every plan that was accepted."""

    toolset: Toolset
    world: ToolWorld
    max_tool_calls: int
    budget: int = 0
    tool_calls_count: int = 0
    tool_error_count: int = 0
    last_error: str = ""
    plans: list[PlanRevision] = field(default_factory=list)

    @property
    def has_plan(self) -> bool:
        """True once a plan was accepted."""
        return bool(self.plans)

    def accept_plan(self, call: ToolCall) -> ToolResult:
        """Keep the planner's steps and budget as the next revision; a replan cannot raise the hard cap."""
        refusal = self.toolset.refusal(call)
        if refusal or call.arguments is None:
            return _denied(refusal or "bad_arguments")
        # The policy asks for its own budget: the cap is what it cannot talk its way past.
        self.budget = min(int(call.arguments["tool_budget"]), self.max_tool_calls)
        revision = PlanRevision(
            revision=len(self.plans),
            after_calls=self.tool_calls_count,
            cause=self._plan_cause(),
            steps=tuple(map(_shorten, call.arguments["steps"])),
            tool_budget=self.budget,
        )
        self.plans.append(revision)
        return ToolResult(content=PLAN_ACCEPTED, error="", duration_ms=0.0)

    async def execute(self, call: ToolCall) -> ToolResult:
        """Run an approved call, refuse any other; both are counted."""
        # Counted before it is judged: else a policy could probe tool names for free.
        self.tool_calls_count += 1
        refusal = self._refusal(call)
        if refusal or call.arguments is None:
            result = _denied(refusal)
        else:
            result = await self.world.call(call.name, call.arguments)
        self.tool_error_count += int(bool(result.error))
        self.last_error = result.error
        return result

    @property
    def exhausted(self) -> bool:
        """True when the hard cap on calls is used up."""
        return self.tool_calls_count >= self.max_tool_calls

    def _plan_cause(self) -> PlanCause:
        if not self.plans:
            return "request"
        return "tool_error" if self.last_error else "observation"

    def _refusal(self, call: ToolCall) -> str:
        if not self.has_plan:
            return "no_plan"
        if self.tool_calls_count > self.budget:
            return "over_budget"
        return self.toolset.refusal(call)


def _shorten(step: str) -> str:
    return step if len(step) <= MAX_STEP_CHARS else f"{step[: MAX_STEP_CHARS - 1]}…"


def _denied(reason: str) -> ToolResult:
    return ToolResult(content=render_error(reason), error=reason, duration_ms=0.0)
