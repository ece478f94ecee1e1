"""The agent loop: planner turn, tool turns within budget, final answer. Training and serving run this very function."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rl_actors.contracts import AgentLimits, Completion, RolloutStatus, SamplingParams, ToolCall, ToolResult, Turn
from rl_actors.environment import render_error

if TYPE_CHECKING:
    from rl_actors.agent.executor import Executor
    from rl_actors.agent.renderers.renderer import ParsedTurn, Renderer

Generate = Callable[[Sequence[int], SamplingParams], Awaitable[Completion]]
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnSampled:
    """The policy sampled a turn; `parsed` is how it reads."""

    prompt_token_ids: tuple[int, ...]
    completion: Completion
    parsed: ParsedTurn


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCalled:
    """A call, or a plan, goes to the executor, which may still refuse it."""

    call: ToolCall


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolAnswered:
    """The executor answered the call; a refusal is an answer with an error."""

    call: ToolCall
    result: ToolResult


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentResult:
    """A whole run, and its last event; expected failure is in `status`."""

    turns: tuple[Turn, ...]
    status: RolloutStatus
    reply: str


AgentEvent = TurnSampled | ToolCalled | ToolAnswered | AgentResult
OnEvent = Callable[[AgentEvent], None]


async def run_agent(
    prompt_token_ids: Sequence[int],
    *,
    renderer: Renderer,
    generate: Generate,
    executor: Executor,
    sampling: SamplingParams,
    limits: AgentLimits,
    on_event: OnEvent = lambda event: None,
) -> AgentResult:
    """Run one request to its end, within `limits`.

    Each turn samples with a seed of its own derived from `sampling.seed`, so a request is reproducible. `on_event`
    receives every event in order, on the event loop, so it must return at once. One that raises is logged and called
    no more; the run goes on. A run that raises ends without an AgentResult.

    Raises:
        EngineError: The engine failed; the caller drops and re-issues the request.
        ToolHostError: The tool host died; likewise.
    """
    turns: list[Turn] = []
    emit = _contain(on_event)

    async def take_turns() -> tuple[RolloutStatus, str]:
        context = list(prompt_token_ids)
        for index in range(limits.max_turns):
            room = limits.max_context_tokens - len(context)
            if room < 2:  # one token to say something, one to stop
                return "truncated", ""
            completion = await generate(context, turn_sampling(sampling, index, room, limits, renderer.stop_token_ids))
            parsed = renderer.parse(completion.token_ids)
            emit(TurnSampled(prompt_token_ids=tuple(context), completion=completion, parsed=parsed))
            ending = _ending(parsed, completion, executor)
            result = None if ending else await _answer(parsed, executor, emit)
            turns.append(
                Turn(
                    kind=parsed.kind,
                    prompt_token_ids=tuple(context),
                    completion=completion,
                    tool_call=parsed.tool_call,
                    tool_result=result,
                )
            )
            if ending or not result:
                return ending or ("truncated", "")
            name = parsed.tool_call.name if parsed.tool_call else "none"
            # Token in, token out: what was sampled goes back as the ids it was, never as text.
            context = [*context, *completion.token_ids, *renderer.observation(name, result.content)]
        return "truncated", ""

    try:
        async with asyncio.timeout(limits.timeout_s):
            status, reply = await take_turns()
    except TimeoutError:
        status, reply = "timeout", ""
    run = AgentResult(turns=tuple(turns), status=status, reply=reply)
    emit(run)
    return run


def _contain(on_event: OnEvent) -> OnEvent:
    is_broken = False

    def emit(event: AgentEvent) -> None:
        nonlocal is_broken
        if is_broken:
            return
        try:
            on_event(event)
        # An observer must not change what it observes; its TimeoutError would even pass for the run's own.
        except Exception:  # noqa: BLE001
            is_broken = True
            _LOG.exception("an event hook failed and hears no more of this run")

    return emit


def _ending(parsed: ParsedTurn, completion: Completion, executor: Executor) -> tuple[RolloutStatus, str] | None:
    """Return (status, reply) when this turn is the last one."""
    if parsed.kind == "final":
        return "ok", parsed.text
    if not completion.finished:
        return "truncated", ""
    # A plan is no call, so that a policy may still replan at the cap.
    if parsed.kind != "plan" and executor.exhausted:
        return "tool_budget", ""
    return None


async def _answer(parsed: ParsedTurn, executor: Executor, emit: OnEvent) -> ToolResult:
    """Return the observation for a turn that is not final."""
    call = parsed.tool_call
    if call is None:
        return ToolResult(content=render_error("malformed"), error="malformed", duration_ms=0.0)
    emit(ToolCalled(call=call))
    result = executor.accept_plan(call) if parsed.kind == "plan" else await executor.execute(call)
    emit(ToolAnswered(call=call, result=result))
    return result


def turn_sampling(
    sampling: SamplingParams, index: int, room: int, limits: AgentLimits, stop_token_ids: tuple[int, ...]
) -> SamplingParams:
    """Return the parameters of turn `index`, never past the room left in the context."""
    # A prime apart: the turns of neighbouring seeds must not meet. Below 2**31, which engines take.
    seed = None if sampling.seed is None else (sampling.seed * 1_000_003 + index) % (1 << 31)
    max_tokens = min(limits.max_tokens_per_turn, room)
    return replace(sampling, seed=seed, max_tokens=max_tokens, stop_token_ids=stop_token_ids)
