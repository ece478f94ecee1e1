"""A rollout worker: one vLLM engine, its tool hosts, and as many rollouts in flight as the batch holds."""

from __future__ import annotations

import asyncio
import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from rl_actors.agent import RolloutPorts, Toolset, renderer_of, run_rollout
from rl_actors.contracts import MAX_IN_FLIGHT, AgentLimits, EngineError, Rollout, RolloutRequest, ToolHostError
from rl_actors.environment import WorkflowRef
from rl_actors.sandbox import ProcessSandbox


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutWorkerSettings:
    """Everything a worker needs to start. `search_path` in the workflow reference may point outside the packages.

    With `wants_routes` engines that can (those on a GPU) record which experts their tokens visited.
    """

    workflow: WorkflowRef
    limits: AgentLimits
    num_tool_hosts: int
    num_threads: int
    max_in_flight: int = MAX_IN_FLIGHT
    transfer_backend: str | None = None
    wants_routes: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """Finished rollouts, and the requests that infrastructure ate: those were re-issued once and failed again.

    `first_error` says what broke the first dropped one; empty when none was dropped.
    """

    rollouts: tuple[Rollout, ...]
    dropped: tuple[str, ...]
    reissued: int
    first_error: str


class RolloutWorker:
    """Runs as a Ray actor (`ray.remote(RolloutWorker)`); every method is awaited on the actor's event loop."""

    def __init__(self, model_path: str, settings: RolloutWorkerSettings) -> None:
        """Load the workflow and start the engine."""
        os.environ["OMP_NUM_THREADS"] = str(settings.num_threads)
        torch.set_num_threads(settings.num_threads)
        from rl_actors.actors.vllm_engine import VllmEngine

        workflow = settings.workflow.load()
        tools = importlib.import_module(workflow.tools_module).WORLD.tools
        limits = settings.limits
        self._engine = VllmEngine(
            model_path,
            max_model_len=limits.max_context_tokens,
            max_num_seqs=settings.max_in_flight,
            transfer_backend=settings.transfer_backend,
            record_routes=settings.wants_routes and torch.cuda.is_available(),
        )
        # A rollout that waits for the engine must not spend its own time limit doing so.
        self._slots = asyncio.Semaphore(settings.max_in_flight)
        self._ports = RolloutPorts(
            workflow=workflow,
            renderer=renderer_of(model_path),
            toolset=Toolset(tools),
            sandbox=ProcessSandbox(workflow.tools_module, num_hosts=settings.num_tool_hosts),
            generate=self._engine.generate,
            limits=limits,
        )

    async def ready(self) -> str:
        """Answer once the engine is up."""
        return "ready"

    async def run(self, requests: Sequence[RolloutRequest], temperature: float) -> RolloutBatch:
        """Attempt every request; one that infrastructure broke is re-issued exactly once, then dropped and named."""
        first = await self._attempt(requests, temperature)
        failed = [request for request, result in zip(requests, first, strict=True) if isinstance(result, str)]
        second = await self._attempt(failed, temperature)
        finished = [result for result in (*first, *second) if not isinstance(result, str)]
        lost = {r.rollout_id: why for r, why in zip(failed, second, strict=True) if isinstance(why, str)}
        return RolloutBatch(
            rollouts=tuple(finished),
            dropped=tuple(lost),
            reissued=len(failed),
            first_error=next(iter(lost.values()), ""),
        )

    async def publish(self, weights: Mapping[str, torch.Tensor], weights_version: int) -> None:
        """Load new weights; the caller attests afterwards."""
        await asyncio.to_thread(self._engine.publish, weights, weights_version)

    async def probe(self, sequences: Sequence[Sequence[int]]) -> tuple[int, list[list[float]]]:
        """Return (weights version, log-probabilities of the probe tokens)."""
        logprobs = await asyncio.to_thread(self._engine.probe_logprobs, sequences)
        return self._engine.weights_version, logprobs

    async def close(self) -> None:
        """Stop tool hosts and engine."""
        await self._ports.sandbox.close()
        await asyncio.to_thread(self._engine.close)

    async def _attempt(self, requests: Sequence[RolloutRequest], temperature: float) -> list[Rollout | str]:
        return list(await asyncio.gather(*(self._one(request, temperature) for request in requests)))

    async def _one(self, request: RolloutRequest, temperature: float) -> Rollout | str:
        async with self._slots:
            try:
                return await run_rollout(request, self._ports, temperature=temperature)
            except (EngineError, ToolHostError) as error:
                return str(error)
