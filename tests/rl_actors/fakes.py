"""Fakes of the agent's neighbours: a real tokenizer, a scripted engine, a world in memory, ready-made rollouts."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rl_actors.agent.executor import Executor, Toolset
from rl_actors.agent.renderers.harmony import HarmonyRenderer, train_tokenizer
from rl_actors.contracts import AgentLimits, Outcome, Task
from rl_actors.contracts.rollouts import Completion, Rollout, RolloutStatus, SamplingParams, Score, ToolResult, Turn
from rl_actors.environment.tools import ToolSpec

PROMPT = "From C1000: please pay order 48213"
TEXTS = (PROMPT, "system user assistant final json commentary to=functions.pay look plan error ok It is paid.")
_ORDER = {"order": {"type": "string", "pattern": "^[0-9]{5}$"}}
_PARAMETERS = {"type": "object", "properties": _ORDER, "required": ["order"], "additionalProperties": False}
TOOLS = (
    ToolSpec(name="look", description="Look.", parameters=_PARAMETERS, side_effect="read"),
    ToolSpec(name="pay", description="Pay.", parameters=_PARAMETERS, side_effect="write"),
)
LIMITS = AgentLimits(max_turns=8, max_tool_calls=3, max_tokens_per_turn=64, max_context_tokens=2048, timeout_s=20.0)
GOOD = Outcome(success=True, violations=(), reasons=())
BAD = Outcome(success=False, violations=("refund_without_owner",), reasons=("refunded a stranger",))


@functools.cache
def renderer() -> HarmonyRenderer:
    """A real renderer with a tiny tokenizer."""
    return HarmonyRenderer(train_tokenizer(TEXTS, vocab_size=330))


def save_tiny_model(directory: Path, *, seed: int) -> Path:
    """Write an untrained model with a real tokenizer."""
    from rl_actors.models.loading import build_tiny_model, tiny_config

    tokenizer = train_tokenizer(TEXTS, vocab_size=330)
    config = tiny_config(
        vocab_size=len(tokenizer), hidden_size=64, num_layers=2, num_experts=2, max_length=512,
        eos_token_id=int(tokenizer.eos_token_id),
    )  # fmt: skip
    build_tiny_model(config, seed=seed).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def plan(budget: int) -> list[int]:
    """Ids of a plan turn."""
    return renderer().call("plan", {"steps": ["look"], "tool_budget": budget})


def call(tool: str, **arguments: Any) -> list[int]:
    """Ids of a tool call."""
    return renderer().call(tool, arguments)


def final(text: str) -> list[int]:
    """Ids of an answer."""
    return renderer().final(text)


Step = Sequence[int] | Exception | None
"""What the engine samples, what it raises, or None: it never answers."""


@dataclass
class ScriptedEngine:
    """Says one step of the script per call. Unfinished when the step does not end with a stop token."""

    script: Sequence[Step]
    weights_version: int = 0
    prompts: list[tuple[int, ...]] = field(default_factory=list)
    sampling: list[SamplingParams] = field(default_factory=list)

    async def __call__(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        self.prompts.append(tuple(prompt_token_ids))
        self.sampling.append(sampling)
        step = self.script[len(self.prompts) - 1]
        if step is None:
            await asyncio.Event().wait()
        if isinstance(step, Exception):
            raise step
        assert step is not None
        ids = tuple(step)
        return Completion(
            token_ids=ids,
            logprobs=tuple(-0.5 - index / 100 for index in range(len(ids))),
            weights_version=self.weights_version,
            finished=bool(ids) and ids[-1] in sampling.stop_token_ids,
            cached_tokens=0,
        )


@dataclass
class FakeWorld:
    """Answers every approved call with the same text and remembers it."""

    content: str = '{"ok":true}'
    error: str = ""
    hangs: bool = False
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    async def call(self, tool: str, arguments: Mapping[str, Any]) -> ToolResult:
        self.calls.append((tool, dict(arguments)))
        if self.hangs:
            await asyncio.Event().wait()
        return ToolResult(content=self.content, error=self.error, duration_ms=1.0)


def executor(world: FakeWorld | None = None, *, max_tool_calls: int = 3) -> Executor:
    """An executor over the two tools."""
    return Executor(toolset=Toolset(TOOLS), world=world or FakeWorld(), max_tool_calls=max_tool_calls)


def make_task(task_id: str = "desk/train/1", **changes: Any) -> Task:
    """A task with the smallest world."""
    fields: dict[str, Any] = {
        "task_id": task_id, "workflow": "desk", "split": "train", "intent": "pay", "prompt": PROMPT,
        "world": {"orders": []}, "goal": {"selector": {}}, "seed": 1,
    }  # fmt: skip
    return Task(**(fields | changes))


def make_turn(prompt: Sequence[int], completion: Sequence[int], *, version: int = 0, logprob: float = -1.0) -> Turn:
    """A final turn with these exact ids."""
    done = Completion(
        token_ids=tuple(completion),
        logprobs=(logprob,) * len(completion),
        weights_version=version,
        finished=True,
        cached_tokens=0,
    )
    return Turn(kind="final", prompt_token_ids=tuple(prompt), completion=done, tool_call=None, tool_result=None)


def make_rollout(
    rollout_id: str = "r#0.1",
    *,
    task_id: str = "desk/train/1",
    group_id: int = 0,
    intent: str = "pay",
    status: RolloutStatus = "ok",
    outcome: Outcome = GOOD,
    turns: tuple[Turn, ...] | None = None,
    tool_calls: int = 2,
    tool_errors: int = 0,
    duration_ms: float = 10.0,
    weights_version: int = 0,
) -> Rollout:
    """A rollout of two turns: prompt 10 11, sampled 12 13, observed 14, sampled 15 16 7."""
    chain = (
        make_turn((10, 11), (12, 13), version=weights_version),
        make_turn((10, 11, 12, 13, 14), (15, 16, 7), version=weights_version, logprob=-2.0),
    )
    return Rollout(
        rollout_id=rollout_id,
        task_id=task_id,
        group_id=group_id,
        intent=intent,
        turns=chain if turns is None else turns,
        status=status,
        reply="done",
        outcome=outcome,
        tool_calls_count=tool_calls,
        tool_error_count=tool_errors,
        duration_ms=duration_ms,
    )


def make_score(rollout_id: str, reward: float, *, critic: float = 0.5) -> Score:
    """A score with this reward."""
    return Score(
        rollout_id=rollout_id,
        reward=reward,
        outcome_reward=reward,
        critic_score=critic,
        rubric={},
        reward_model_version="rm-a",
    )
