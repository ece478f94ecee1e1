"""The problem side of training: a task, how an expert solved it, and what a policy program found of an attempt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentLimits:
    """Hard bounds of one request."""

    max_turns: int
    max_tool_calls: int
    max_tokens_per_turn: int
    max_context_tokens: int
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRequest:
    """What to attempt: a task, its group, and the seed that makes the attempt reproducible."""

    task: Task
    group_id: int
    seed: int

    @property
    def rollout_id(self) -> str:
        """A name unique within a stage."""
        return f"{self.task.task_id}#{self.group_id}.{self.seed}"


Split = Literal["train", "calibration", "held_out", "frozen", "adversarial", "live"]


TurnKind = Literal["plan", "tool", "final", "malformed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One problem: the policy sees `prompt`, the environment starts from `world`, the verifier checks `goal`.

    Example: Task(task_id="support_desk/train/17", workflow="support_desk", split="train", intent="order_status",
    prompt="From C204: where is order 48213?", world={"orders": [...]}, goal={"facts": ["shipped"]}, seed=17)
    """

    task_id: str
    workflow: str
    split: Split
    intent: str
    prompt: str
    world: Mapping[str, Any]
    goal: Mapping[str, Any]
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DemonstrationTurn:
    """One assistant turn a scripted expert wrote, and the observation that answered it (empty after the final turn)."""

    kind: TurnKind
    tool: str
    arguments: Mapping[str, Any]
    text: str
    observation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """A whole expert attempt at one task; never used for a held-out, frozen or adversarial task."""

    task_id: str
    prompt: str
    turns: tuple[DemonstrationTurn, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a policy program (never a model) found in the final state of the world and in the reply."""

    success: bool
    violations: tuple[str, ...]
    reasons: tuple[str, ...]
