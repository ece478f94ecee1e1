"""One user request from route to released reply: row ahead, agent loop, policy checks, row completed, then the reply.

The loop is the one that training runs. When the version a session was routed to cannot answer, the request goes on
stable, under a second row; what its tools already wrote is not written again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from rl_actors.agent import Executor, run_agent, successful_calls
from rl_actors.contracts import EngineError, InfrastructureError, Outcome, SamplingParams, SeatrialError, Task
from rl_actors.environment import RolloutView
from serving.contracts import RequestCompletion, RequestRecord
from serving.gateway.openai_api import ApiError, ChatAnswer
from serving.gateway.ports import LivePolicy, LivePorts, LiveRequest
from serving.store import LiveTrace, ServedPolicy

if TYPE_CHECKING:
    from rl_actors.agent import AgentResult, Generate
    from rl_actors.contracts import Completion, ToolResult
    from rl_actors.sandbox import ToolWorld
    from serving.contracts import RequestStatus, Success
    from serving.gateway.openai_api import FinishReason
    from serving.split import Route

_MAX_ATTEMPTS: Final = 8

UNREAD: Final = "unread"
# For the row of a version whose own stamps cannot be read: no column is ever empty.
_UNREAD_STAMPS: Final = ServedPolicy(**dict.fromkeys(ServedPolicy.__dataclass_fields__, UNREAD))

CHECK_CRASHED: Final = "policy_checks_ran"
"""Name of the check that fails when the checks themselves crash, hang or answer nonsense: the reply is blocked."""


@dataclass(slots=True)
class Meter:
    """Counts the tokens that one attempt samples, also when it fails half-way."""

    is_in_force: Callable[[], bool] = lambda: True
    patience_s: float = 1.0
    tokens_in: int = 0
    tokens_out: int = 0
    cached_tokens: int = 0

    async def sample(self, generate: Generate, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        """Sample one completion. Raises EngineError when the version was taken out of the split meanwhile."""
        call = asyncio.ensure_future(generate(prompt_token_ids, sampling))
        try:
            # After a fail-back nobody waits for a dead engine.
            while not (await asyncio.wait({call}, timeout=self.patience_s))[0]:
                if not self.is_in_force():
                    raise EngineError("its version was taken out of the split while it sampled")
            completion = call.result()
        finally:
            call.cancel()
        self.tokens_in += len(prompt_token_ids)
        self.tokens_out += len(completion.token_ids)
        self.cached_tokens += completion.cached_tokens
        return completion


@dataclass(slots=True)
class RequestMemory:
    """The calls and writes of one request so far, over all its attempts."""

    num_attempts: int = 0
    num_calls: int = 0
    written: list[tuple[str, ToolResult]] = field(default_factory=list)
    is_uncertain: bool = False


class OnceWorld:
    """A world in which a write that an earlier attempt of the same request made is answered, not made again."""

    def __init__(self, world: ToolWorld, writes: frozenset[str], memory: RequestMemory) -> None:
        """Replay what `memory` holds now; remember what is written from now on."""
        self._world, self._writes, self._memory = world, writes, memory
        self._replays = list(memory.written)

    async def call(self, tool: str, arguments: Mapping[str, Any]) -> ToolResult:
        """Run the tool, or answer from an earlier attempt."""
        key = f"{tool} {json.dumps(arguments, sort_keys=True)}"
        for entry in self._replays:
            if entry[0] == key:
                # Each earlier write answers one call: a second equal call is the policy's own wish.
                self._replays.remove(entry)
                return entry[1]
        is_write = tool in self._writes
        self._memory.num_calls += 1
        # Until the host answers, nobody knows whether the write took place.
        self._memory.is_uncertain |= is_write
        result = await self._world.call(tool, arguments)
        self._memory.is_uncertain = False
        if is_write and not result.error:
            self._memory.written.append((key, result))
        return result


@dataclass(slots=True, kw_only=True)
class _Attempt:
    """One attempt in progress."""

    request: LiveRequest
    record: RequestRecord
    meter: Meter
    memory: RequestMemory
    started: float
    executor: Executor | None = None


class LiveRequests:
    """Answers requests. One instance serves a whole gateway."""

    def __init__(self, ports: LivePorts) -> None:
        self._ports = ports

    async def answer(self, request: LiveRequest) -> ChatAnswer:
        """Bring a request to its released reply.

        Raises:
            ApiError: 400 prompt too long; 409 this key was already answered; 503 nobody could answer.
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
            # Epoch 0: this row enters no comparison, because its session belongs to the other arm.
            back = replace(route, policy_version=stable, release_channel="general", split_epoch=0)
            return await self._attempt(request, back, memory)
        except InfrastructureError as error:
            may_retry = not memory.num_calls
            raise ApiError(503, f"no answer: {error}", code="unavailable", may_retry=may_retry) from error

    async def _attempt(self, request: LiveRequest, route: Route, memory: RequestMemory) -> ChatAnswer:
        """Attempt once on one version; the row is written before anything runs, and always completed."""
        ports, version = self._ports, route.policy_version
        stamps, policy = await self._load(version)
        # A prompt that is too long is refused before its row, as all bad input is.
        prompt = self._render(request, policy) if isinstance(policy, LivePolicy) else []
        attempt = _Attempt(
            request=request,
            record=await self._start(request, stamps, route, memory),
            meter=Meter(lambda: ports.splits.is_in_force(version)),
            memory=memory,
            started=ports.monotonic(),
        )
        try:
            result = await self._run(attempt, policy, prompt)
            checks = await self._check(attempt, result)
        except BaseException as error:
            status: RequestStatus = "engine_error" if isinstance(error, InfrastructureError) else "aborted"
            # Shielded: a cancelled attempt has its end in the ledger, too.
            await asyncio.shield(self._complete(attempt, status, {}, "no"))
            raise
        return await self._release(attempt, result, checks)

    async def _load(self, version: str) -> tuple[ServedPolicy, LivePolicy | InfrastructureError]:
        """Return a version's stamps and the version, or why it cannot be loaded."""
        try:
            policy = await self._ports.find_policy(version)
            return policy.stamps, policy
        except InfrastructureError as error:
            try:
                return await asyncio.to_thread(self._ports.find_stamps, version), error
            except SeatrialError:
                return _UNREAD_STAMPS, error

    def _render(self, request: LiveRequest, policy: LivePolicy) -> list[int]:
        """Return the tokens to start with. Raises ApiError 400 when they leave no room for a turn."""
        prompt = policy.renderer.prompt(self._ports.workflow.system_prompt, request.chat.prompt_messages)
        limits = self._ports.config.limits
        room = limits.max_context_tokens - limits.max_tokens_per_turn
        if len(prompt) > room:
            message = f"the prompt has {len(prompt)} tokens; at most {room}"
            raise ApiError(400, message, code="context_length_exceeded", param="messages")
        return prompt

    async def _start(
        self, request: LiveRequest, stamps: ServedPolicy, route: Route, memory: RequestMemory
    ) -> RequestRecord:
        """Write the row ahead under the first free attempt number. Raises ApiError 409 for a key already answered."""
        ledger, metadata = self._ports.ledger, request.chat.metadata or {}
        intent, refusal = metadata.get("intent", ""), "too many attempts under this idempotency key"
        while memory.num_attempts < _MAX_ATTEMPTS:
            memory.num_attempts += 1
            number = memory.num_attempts
            request_id = request.request_id if number == 1 else f"{request.request_id}~{number}"
            record = RequestRecord(
                run_id=f"run-{request_id}",
                request_id=request_id,
                session_key=request.session_key,
                model_version=stamps.model_version,
                reward_model_version=stamps.reward_model_version,
                policy_version=route.policy_version,
                bundle_id=stamps.bundle_id,
                release_channel=route.release_channel,
                split_epoch=route.split_epoch,
                started_at=self._ports.clock(),
                intent=intent if intent in self._ports.workflow.intents else "unknown",
                sandbox_level=self._ports.sandbox_level,
                task_id=metadata.get("task_id", "")[:256],
            )
            if await asyncio.to_thread(ledger.start, record):
                return record
            earlier = ledger.find(request_id)
            if earlier is None or earlier.status != "engine_error" or earlier.tool_calls_count:
                refusal = f"this idempotency key already ran: {record.run_id}"
                break
        raise ApiError(409, refusal, code="already_ran", may_retry=False)

    async def _run(self, attempt: _Attempt, policy: LivePolicy | InfrastructureError, prompt: list[int]) -> AgentResult:
        """Run the agent loop on the live world; its audit session is the request."""
        if isinstance(policy, InfrastructureError):
            # Only now, with a row: a failure without one would be a failure that no gate sees.
            raise policy
        ports, request = self._ports, attempt.request
        limits = ports.config.limits
        if request.chat.token_cap is not None:
            limits = replace(limits, max_tokens_per_turn=min(limits.max_tokens_per_turn, request.chat.token_cap))
        temperature = ports.config.temperature if request.chat.temperature is None else request.chat.temperature
        async with await ports.worlds.open({**ports.config.live_world, "session": request.request_id}) as world:
            once = OnceWorld(world, ports.writes, attempt.memory)
            attempt.executor = Executor(toolset=ports.toolset, world=once, max_tool_calls=limits.max_tool_calls)
            return await run_agent(
                prompt,
                renderer=policy.renderer,
                generate=partial(attempt.meter.sample, policy.generate),
                executor=attempt.executor,
                sampling=SamplingParams(
                    max_tokens=limits.max_tokens_per_turn, temperature=temperature, seed=request.chat.seed
                ),
                limits=limits,
            )

    async def _check(self, attempt: _Attempt, result: AgentResult) -> Mapping[str, bool]:
        """Return check -> held. Only a reply that could be released is checked; whatever goes wrong blocks it."""
        if result.status != "ok":
            return {}
        workflow = self._ports.workflow
        view = _view(attempt, result, workflow.name)
        try:
            checking = asyncio.to_thread(workflow.check_reply, result.reply, view)
            found = await asyncio.wait_for(checking, self._ports.config.check_timeout_s)
            return {str(name): held is True for name, held in found.items()}
        except Exception:  # noqa: BLE001 - fail closed: a check that crashes is a check that failed
            return {CHECK_CRASHED: False}

    async def _release(self, attempt: _Attempt, result: AgentResult, checks: Mapping[str, bool]) -> ChatAnswer:
        """Complete the row, then hand the reply out: no row, no reply."""
        ports, record, meter = self._ports, attempt.record, attempt.meter
        is_released = result.status == "ok" and all(checks.values())
        await self._complete(attempt, result.status, checks, "unknown" if is_released else "no")
        if result.turns:
            last = result.turns[-1]
            ports.critic.offer(record, (*last.prompt_token_ids, *last.completion.token_ids))
        reason: FinishReason = "stop" if is_released else "content_filter" if result.status == "ok" else "length"
        text = result.reply if is_released else ports.config.fallback_text
        if ports.traces.wants(record.run_id):
            asked = attempt.request.chat.user_text
            trace = LiveTrace(run_id=record.run_id, request=asked, response=text, turns=result.turns)
            await asyncio.to_thread(ports.traces.write, trace)
        return ChatAnswer(
            record=record,
            text=text,
            finish_reason=reason,
            tokens_in=meter.tokens_in,
            tokens_out=meter.tokens_out,
            cached_tokens=meter.cached_tokens,
            num_tool_calls=attempt.memory.num_calls,
        )

    async def _complete(
        self, attempt: _Attempt, status: RequestStatus, checks: Mapping[str, bool], success: Success
    ) -> None:
        ports, meter, executor = self._ports, attempt.meter, attempt.executor
        num_calls = executor.tool_calls_count if executor else 0
        tokens_in, tokens_out = meter.tokens_in, meter.tokens_out
        completion = RequestCompletion(
            status=status,
            success=success,
            tool_calls_count=num_calls,
            tool_error_count=executor.tool_error_count if executor else 0,
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            duration_ms=(ports.monotonic() - attempt.started) * 1000.0,
            cost=ports.config.cost_model.cost(tokens_in=tokens_in, tokens_out=tokens_out, tool_calls=num_calls),
            policy_checks=checks,
            plans=tuple(executor.plans) if executor else (),
        )
        await asyncio.to_thread(ports.ledger.complete, attempt.record.run_id, completion, at=ports.clock())


def _view(attempt: _Attempt, result: AgentResult, workflow: str) -> RolloutView:
    """Return a request as the checks see it: it has no goal, no world and no known outcome."""
    request = attempt.request
    task = Task(
        task_id=request.request_id,
        workflow=workflow,
        split="live",
        intent=attempt.record.intent,
        prompt=request.chat.user_text,
        world={},
        goal={},
        seed=0,
    )
    outcome = Outcome(success=False, violations=(), reasons=("unknown until labelled",))
    calls = successful_calls(result.turns)
    return RolloutView(task=task, tool_calls=calls, reply=result.reply, outcome=outcome, num_turns=len(result.turns))
