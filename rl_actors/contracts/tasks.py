"""The problem side of training: a task, the request to attempt it, and the bounds of an attempt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Split = Literal["train", "calibration", "held_out", "frozen", "adversarial", "live"]


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
    """A task to attempt, its group, and the seed that makes the attempt reproducible."""

    task: Task
    group_id: int
    seed: int

    @property
    def rollout_id(self) -> str:
        """Return a name unique within a stage."""
        return f"{self.task.task_id}#{self.group_id}.{self.seed}"


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
    goal: Mapping[str, Any]  # never shown to the policy
    seed: int
