"""One task from open world to verified outcome. Used by PPO, by evaluation and for preference data alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from rl_actors.agent.executor import Executor, Toolset
from rl_actors.agent.loop import AgentResult, Generate, run_agent
from rl_actors.agent.renderers.renderer import Renderer
from rl_actors.contracts import (
    AgentLimits,
    BadInputError,
    EngineError,
    Rollout,
    RolloutRequest,
    Routes,
    SamplingParams,
    Task,
    TrainingSample,
    Turn,
)
from rl_actors.environment import RolloutView, Workflow
from rl_actors.sandbox import Sandbox

# Endings that limits of ours made; a policy that used up its tools has ended by itself.
_CUT_SHORT: Final = frozenset({"truncated", "timeout"})


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutPorts:
    """Everything an attempt needs that is shared between attempts."""

    workflow: Workflow
    renderer: Renderer
    toolset: Toolset
    sandbox: Sandbox
    generate: Generate
    limits: AgentLimits
    clock: Callable[[], float] = time.monotonic  # the wall clock can jump, and a duration would be negative


async def run_rollout(request: RolloutRequest, ports: RolloutPorts, *, temperature: float) -> Rollout:
    """Attempt the task once and verify the outcome from the final state of its world.

    Raises:
        EngineError: The engine failed, or said nothing within the time limit; drop and re-issue.
        ToolHostError: The tool host died; likewise.
        BadInputError: The task's prompt leaves no room for a turn.
    """
    started = ports.clock()
    task = request.task
    prompt = ports.renderer.prompt(ports.workflow.system_prompt, [("user", task.prompt)])
    sampling = SamplingParams(max_tokens=ports.limits.max_tokens_per_turn, temperature=temperature, seed=request.seed)
    async with await ports.sandbox.open(task.world) as world:
        executor = Executor(toolset=ports.toolset, world=world, max_tool_calls=ports.limits.max_tool_calls)
        run = await run_agent(
            prompt,
            renderer=ports.renderer,
            generate=ports.generate,
            executor=executor,
            sampling=sampling,
            limits=ports.limits,
        )
        _require_turn(run, ports.limits, task)
        # Before the world closes: the outcome is judged by what is true after, not by what was said.
        state = await world.read_state(task.goal["selector"])
    duration_ms = (ports.clock() - started) * 1000.0
    rollout = Rollout(
        rollout_id=request.rollout_id,
        task_id=task.task_id,
        group_id=request.group_id,
        intent=task.intent,
        turns=run.turns,
        status=run.status,
        reply=run.reply,
        outcome=ports.workflow.verify(task, state, run.reply),
        tool_calls_count=executor.tool_calls_count,
        tool_error_count=executor.tool_error_count,
        duration_ms=duration_ms,
    )
    return replace(rollout, policy_checks=ports.workflow.check_reply(run.reply, rollout_view(rollout, task)))


def _require_turn(run: AgentResult, limits: AgentLimits, task: Task) -> None:
    # An attempt in which nothing was sampled holds nothing to score or to train on.
    if run.turns:
        return
    if run.status == "timeout":
        raise EngineError(f"task {task.task_id}: no turn within {limits.timeout_s} s")
    remedy = f"the prompt of task {task.task_id} alone fills it; raise it or shorten the prompt"
    raise BadInputError("max_context_tokens", limits.max_context_tokens, remedy)


def successful_calls(turns: Sequence[Turn]) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    """Return (tool, arguments) of the calls that took effect, in order; a plan is none."""
    done = [turn for turn in turns if turn.kind == "tool" and turn.tool_result and not turn.tool_result.error]
    return tuple((turn.tool_call.name, dict(turn.tool_call.arguments or {})) for turn in done if turn.tool_call)


def rollout_view(rollout: Rollout, task: Task) -> RolloutView:
    """Return a finished rollout as annotators and policy checks see it."""
    return RolloutView(
        task=task,
        tool_calls=successful_calls(rollout.turns),
        reply=rollout.reply,
        outcome=rollout.outcome,
        num_turns=len(rollout.turns),
    )


def rollout_token_ids(rollout: Rollout) -> list[int]:
    """Return every token of a rollout, prompt to last sampled token."""
    last = rollout.turns[-1]
    return [*last.prompt_token_ids, *last.completion.token_ids]


def training_sample(rollout: Rollout, reward: float) -> TrainingSample:
    """Lay a rollout out as one sequence from the exact ids; nothing is tokenised again.

    Raises:
        ValueError: A turn's prompt does not begin with what came before it (a broken token-in, token-out chain).
    """
    ids = rollout_token_ids(rollout)
    mask = [False] * len(ids)
    logprobs = [0.0] * len(ids)
    for turn in rollout.turns:
        start = len(turn.prompt_token_ids)
        end = start + len(turn.completion.token_ids)
        if tuple(ids[:end]) != (*turn.prompt_token_ids, *turn.completion.token_ids):
            raise ValueError(f"rollout {rollout.rollout_id}: a turn does not continue the tokens before it")
        mask[start:end] = [True] * (end - start)
        logprobs[start:end] = turn.completion.logprobs
    return TrainingSample(
        rollout_id=rollout.rollout_id,
        group_id=rollout.group_id,
        weights_versions=rollout.weights_versions,
        token_ids=tuple(ids),
        loss_mask=tuple(mask),
        rollout_logprobs=tuple(logprobs),
        reward=reward,
        succeeded=rollout.outcome.success,
        truncated=rollout.status in _CUT_SHORT,
        routes=_joined_routes(rollout.turns),
    )


def _joined_routes(turns: Sequence[Turn]) -> Routes:
    """Return the routes of a whole rollout; empty when any turn has none."""
    first = turns[0].completion.routes
    experts: list[int] = []
    for routes in (turn.completion.routes for turn in turns):
        if not routes.num_tokens or (routes.num_layers, routes.top_k) != (first.num_layers, first.top_k):
            return Routes()
        # Of the first turn that read a token: a later one reads it again, but these are behind what was sampled.
        experts += routes.experts[len(experts) :]
    return Routes(num_layers=first.num_layers, top_k=first.top_k, experts=tuple(experts))
