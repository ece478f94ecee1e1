"""The agent loop: planner turn, tool turns within budget, final answer. Training and serving run this very function.

Token in, token out: each prompt is the previous prompt plus the sampled ids plus the observation's ids.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from rl_actors.agent.executor import Executor
from rl_actors.agent.renderers.harmony import HarmonyRenderer, ParsedTurn
from rl_actors.contracts import AgentLimits, Completion, RolloutStatus, SamplingParams, ToolResult, Turn
from rl_actors.environment import render_observation

Generate = Callable[[Sequence[int], SamplingParams], Awaitable[Completion]]


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentResult:
    """What the loop produced; expected failure is in `status`."""

    turns: tuple[Turn, ...]
    status: RolloutStatus
    reply: str


async def run_agent(
    prompt_token_ids: Sequence[int],
    *,
    renderer: HarmonyRenderer,
    generate: Generate,
    executor: Executor,
    sampling: SamplingParams,
    limits: AgentLimits,
) -> AgentResult:
    """Run one request to its end, within `limits`.

    Each turn samples with a seed of its own derived from `sampling.seed`, so a request is reproducible.

    Raises:
        EngineError: The engine failed; the caller drops and re-issues the request.
        ToolHostError: The tool host died; likewise.
    """
    turns: list[Turn] = []
    try:
        async with asyncio.timeout(limits.timeout_s):
            status, reply = await _turn_by_turn(
                list(prompt_token_ids), turns, renderer, generate, executor, sampling, limits
            )
    except TimeoutError:
        status, reply = "timeout", ""
    return AgentResult(turns=tuple(turns), status=status, reply=reply)


async def _turn_by_turn(
    context: list[int],
    turns: list[Turn],
    renderer: HarmonyRenderer,
    generate: Generate,
    executor: Executor,
    sampling: SamplingParams,
    limits: AgentLimits,
) -> tuple[RolloutStatus, str]:
    """Append turns until the policy answers or a limit is met."""
    for index in range(limits.max_turns):
        room = limits.max_context_tokens - len(context)
        if room < 2:
            return "truncated", ""
        params = turn_sampling(sampling, index, room, limits, renderer.stop_token_ids)
        completion = await generate(context, params)
        parsed = renderer.parse(completion.token_ids)
        if parsed.kind == "final":
            turns.append(_turn(context, completion, parsed, None))
            return "ok", parsed.text
        if not completion.finished:
            turns.append(_turn(context, completion, parsed, None))
            return "truncated", ""
        if parsed.kind != "plan" and executor.exhausted:
            turns.append(_turn(context, completion, parsed, None))
            return "tool_budget", ""
        result = await _answer(parsed, executor)
        turns.append(_turn(context, completion, parsed, result))
        name = parsed.tool_call.name if parsed.tool_call else "none"
        context = [*context, *completion.token_ids, *renderer.observation(name, result.content)]
    return "truncated", ""


async def _answer(parsed: ParsedTurn, executor: Executor) -> ToolResult:
    """Return the observation for a turn that is not final."""
    if parsed.tool_call is None:
        return ToolResult(content=render_observation({"error": "malformed"}), error="malformed", duration_ms=0.0)
    if parsed.kind == "plan":
        return executor.accept_plan(parsed.tool_call)
    return await executor.execute(parsed.tool_call)


def turn_sampling(
    sampling: SamplingParams, index: int, room: int, limits: AgentLimits, stop_token_ids: tuple[int, ...]
) -> SamplingParams:
    """Return the parameters of turn `index`, never past the room left in the context."""
    seed = None if sampling.seed is None else (sampling.seed * 1_000_003 + index) % (1 << 31)
    max_tokens = min(limits.max_tokens_per_turn, room)
    return replace(sampling, seed=seed, max_tokens=max_tokens, stop_token_ids=stop_token_ids)


def _turn(context: Sequence[int], completion: Completion, parsed: ParsedTurn, result: ToolResult | None) -> Turn:
    return Turn(
        kind=parsed.kind,
        prompt_token_ids=tuple(context),
        completion=completion,
        tool_call=parsed.tool_call,
        tool_result=result,
    )
