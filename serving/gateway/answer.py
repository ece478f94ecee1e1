"""One user request from route to released reply: row ahead, agent loop, policy checks, row completed, then the reply.

The loop is the one that training runs. When the version a session was routed to cannot answer, the request goes on
stable, under a second row; what its tools already wrote is not written again. A version that cannot even be loaded has
its row too: a failure without a row would be one that no gate sees.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from rl_actors.agent import AgentResult, Executor, run_agent, successful_calls
from rl_actors.contracts import InfrastructureError, Outcome, SamplingParams, SeatrialError, Task
from rl_actors.environment import RolloutView
from serving.contracts import RequestRecord, RequestStatus, Success
from serving.gateway.attempt import Meter, OnceWorld, RequestMemory
from serving.gateway.critic_queue import FinishedRequest
from serving.gateway.openai_api import ApiError, ChatAnswer, FinishReason, conflict, unavailable
from serving.gateway.ports import BrokenPolicy, LivePolicy, LivePorts, LiveRequest
from serving.split import Route
from serving.store import LiveTrace, RequestCompletion, ServedPolicy

_MAX_ATTEMPTS: Final = 8


UNREAD: Final = "unread"
"""The stamps in the row of a version whose own cannot be read; no column is ever empty."""


CHECK_CRASHED: Final = "policy_checks_ran"
"""Name of the check that fails when the checks themselves crash, hang or answer nonsense: the reply is blocked."""


@dataclass(slots=True, kw_only=True)
class _Attempt:
    """One attempt in progress."""

    request: LiveRequest
    policy: LivePolicy | BrokenPolicy
    record: RequestRecord
    meter: Meter
    memory: RequestMemory
    started: float
    executor: Executor | None = None


class LiveRuns:
    """Answers requests. One instance serves a whole gateway."""

    def __init__(self, ports: LivePorts) -> None:
        """Hold the ports; no I/O."""
        self._ports = ports

    async def answer(self, request: LiveRequest) -> ChatAnswer:
        """Run a request to its released reply.

        Raises:
            ApiError: 400 prompt too long; 409 this key already ran; 503 nobody could answer.
        """
        memory = RequestMemory()
        try:
            route = await self._ports.splits.route(request.session_key)
            try:
                return await self._attempt(request, route, memory)
            except InfrastructureError:
                stable = self._ports.splits.stable
                if route.policy_version == stable or memory.is_uncertain:
                    raise
            # Epoch 0: this run enters no comparison, because its session belongs to the other arm.
            back = Route(policy_version=stable, release_channel="general", split_epoch=0)
            return await self._attempt(request, back, memory)
        except InfrastructureError as error:
            raise unavailable(f"no answer: {error}", may_retry=not memory.num_calls) from error

    async def _attempt(self, request: LiveRequest, route: Route, memory: RequestMemory) -> ChatAnswer:
        """Attempt once on one version; the row is written before anything runs, and always completed."""
        ports, version = self._ports, route.policy_version
        policy = await self._policy(version)
        prompt = self._prompt(request, policy)
        record = await self._start(request, policy.stamps, route, memory)
        attempt = _Attempt(
            request=request,
            policy=policy,
            record=record,
            meter=Meter(policy.generate, lambda: ports.splits.is_in_force(version)),
            memory=memory,
            started=ports.monotonic(),
        )
        try:
            run = await self._run(attempt, prompt)
            checks = await self._checks(attempt, run)
        except BaseException as error:
            status: RequestStatus = "engine_error" if isinstance(error, InfrastructureError) else "aborted"
            await asyncio.shield(self._complete(attempt, status, {}, "no"))
            raise
        return await self._release(attempt, run, checks)

    # --- before -------------------------------------------------------------------------------------------------------

    async def _policy(self, version: str) -> LivePolicy | BrokenPolicy:
        try:
            return await self._ports.find_policy(version)
        except InfrastructureError as error:
            try:
                stamps = await asyncio.to_thread(self._ports.find_stamps, version)
            except SeatrialError:
                stamps = None
            return BrokenPolicy(stamps=stamps, error=error)

    def _prompt(self, request: LiveRequest, policy: LivePolicy | BrokenPolicy) -> list[int]:
        """Return the tokens to start with; a prompt that is too long is refused before its row, as all bad input is."""
        if isinstance(policy, BrokenPolicy):
            return []
        prompt = policy.renderer.prompt(self._ports.workflow.system_prompt, request.messages)
        limits = self._ports.config.limits
        room = limits.max_context_tokens - limits.max_tokens_per_turn
        if len(prompt) > room:
            message = f"the prompt has {len(prompt)} tokens; at most {room}"
            raise ApiError(400, message, code="context_length_exceeded", param="messages")
        return prompt

    async def _start(
        self, request: LiveRequest, stamps: ServedPolicy | None, route: Route, memory: RequestMemory
    ) -> RequestRecord:
        """Write the row ahead under the first free attempt number; a key that already ran is refused."""
        ledger = self._ports.ledger
        while memory.num_attempts < _MAX_ATTEMPTS:
            memory.num_attempts += 1
            record = self._record(request, stamps, route, memory.num_attempts)
            if await asyncio.to_thread(ledger.start, record):
                return record
            earlier = ledger.find(record.request_id)
            if earlier is None or earlier.status != "engine_error" or earlier.tool_calls_count:
                raise conflict(
                    f"this idempotency key already ran: {record.run_id}", code="already_ran", may_retry=False
                )
        raise conflict("too many attempts under this idempotency key", code="already_ran", may_retry=False)

    def _record(self, request: LiveRequest, stamps: ServedPolicy | None, route: Route, number: int) -> RequestRecord:
        request_id = request.request_id if number == 1 else f"{request.request_id}~{number}"
        return RequestRecord(
            run_id=f"run-{request_id}",
            request_id=request_id,
            session_key=request.session_key,
            model_version=stamps.model_version if stamps else UNREAD,
            reward_model_version=stamps.reward_model_version if stamps else UNREAD,
            policy_version=route.policy_version,
            bundle_id=stamps.bundle_id if stamps else UNREAD,
            release_channel=route.release_channel,
            split_epoch=route.split_epoch,
            started_at=self._ports.clock(),
            intent=request.intent,
            sandbox_level=self._ports.sandbox_level,
            task_id=request.task_id,
        )

    # --- the run ------------------------------------------------------------------------------------------------------

    async def _run(self, attempt: _Attempt, prompt: list[int]) -> AgentResult:
        """Run the agent loop on the live world; its audit session is the request."""
        ports, request, policy = self._ports, attempt.request, attempt.policy
        if isinstance(policy, BrokenPolicy):
            raise policy.error
        limits = ports.config.limits
        if request.token_cap is not None:
            limits = replace(limits, max_tokens_per_turn=min(limits.max_tokens_per_turn, request.token_cap))
        temperature = ports.config.temperature if request.temperature is None else request.temperature
        world = {**ports.config.live_world, "session": request.request_id}
        async with await ports.worlds.open(world) as opened:
            once = OnceWorld(opened, ports.writes, attempt.memory)
            attempt.executor = Executor(toolset=ports.toolset, world=once, max_tool_calls=limits.max_tool_calls)
            return await run_agent(
                prompt,
                renderer=policy.renderer,
                generate=attempt.meter,
                executor=attempt.executor,
                sampling=SamplingParams(
                    max_tokens=limits.max_tokens_per_turn, temperature=temperature, seed=request.seed
                ),
                limits=limits,
            )

    async def _checks(self, attempt: _Attempt, run: AgentResult) -> Mapping[str, bool]:
        """Return check -> held. Only a reply that could be released is checked; whatever goes wrong blocks it."""
        if run.status != "ok":
            return {}
        view = _view(attempt, run, self._ports.workflow.name)
        try:
            checking = asyncio.to_thread(self._ports.workflow.check_reply, run.reply, view)
            found = await asyncio.wait_for(checking, self._ports.config.check_timeout_s)
            return {str(name): held is True for name, held in found.items()}
        except Exception:  # noqa: BLE001 - fail closed: a check that crashes is a check that failed
            return {CHECK_CRASHED: False}

    # --- after --------------------------------------------------------------------------------------------------------

    async def _release(self, attempt: _Attempt, run: AgentResult, checks: Mapping[str, bool]) -> ChatAnswer:
        """Complete the row, then hand the reply out: no row, no reply."""
        is_released = run.status == "ok" and all(checks.values())
        await self._complete(attempt, run.status, checks, "unknown" if is_released else "no")
        if run.turns:
            last = run.turns[-1]
            finished = FinishedRequest(
                run_id=attempt.record.run_id,
                token_ids=(*last.prompt_token_ids, *last.completion.token_ids),
                reward_model_version=attempt.record.reward_model_version,
            )
            self._ports.critic.offer(finished)
        reason: FinishReason = "stop" if is_released else "content_filter" if run.status == "ok" else "length"
        text = run.reply if is_released else self._ports.config.fallback_text
        await self._trace(attempt, run, text)
        return self._answer(attempt, text, reason)

    async def _trace(self, attempt: _Attempt, run: AgentResult, text: str) -> None:
        run_id, traces = attempt.record.run_id, self._ports.traces
        if traces.wants(run_id):
            trace = LiveTrace(run_id=run_id, request=attempt.request.user_text, response=text, turns=run.turns)
            await asyncio.to_thread(traces.write, trace)

    async def _complete(
        self, attempt: _Attempt, status: RequestStatus, checks: Mapping[str, bool], success: Success
    ) -> None:
        ports, meter, executor = self._ports, attempt.meter, attempt.executor
        num_calls = executor.tool_calls_count if executor else 0
        completion = RequestCompletion(
            status=status,
            success=success,
            tool_calls_count=num_calls,
            tool_error_count=executor.tool_error_count if executor else 0,
            tokens_in=meter.tokens_in,
            tokens_out=meter.tokens_out,
            duration_ms=(ports.monotonic() - attempt.started) * 1000.0,
            cost=ports.config.cost_model.cost(
                tokens_in=meter.tokens_in, tokens_out=meter.tokens_out, tool_calls=num_calls
            ),
            policy_checks=checks,
            plans=tuple(executor.plans) if executor else (),
        )
        await asyncio.to_thread(ports.ledger.complete, attempt.record.run_id, completion, at=ports.clock())

    def _answer(self, attempt: _Attempt, text: str, reason: FinishReason) -> ChatAnswer:
        record, meter = attempt.record, attempt.meter
        return ChatAnswer(
            run_id=record.run_id,
            text=text,
            finish_reason=reason,
            tokens_in=meter.tokens_in,
            tokens_out=meter.tokens_out,
            cached_tokens=meter.cached_tokens,
            model_version=record.model_version,
            policy_version=record.policy_version,
            reward_model_version=record.reward_model_version,
            bundle_id=record.bundle_id,
            release_channel=record.release_channel,
            created=int(record.started_at),
            num_tool_calls=attempt.memory.num_calls,
        )


def _view(attempt: _Attempt, run: AgentResult, workflow: str) -> RolloutView:
    """Return the run as the checks see it: a live request has no goal, no world and no known outcome."""
    request = attempt.request
    task = Task(
        task_id=request.request_id,
        workflow=workflow,
        split="live",
        intent=request.intent,
        prompt=request.user_text,
        world={},
        goal={},
        seed=0,
    )
    outcome = Outcome(success=False, violations=(), reasons=("unknown until labelled",))
    calls = successful_calls(run.turns)
    return RolloutView(task=task, tool_calls=calls, reply=run.reply, outcome=outcome, num_turns=len(run.turns))
