"""Rollouts and their scores: workers with an engine and tool hosts each, reward scorers, and the pools of both."""

from __future__ import annotations

import asyncio
import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rl_actors.actors.calls import Options, close_actors, start_actor, wait_for
from rl_actors.actors.vllm_engine import VllmEngine
from rl_actors.agent import RolloutPorts, Toolset, renderer_of, rollout_token_ids, run_rollout
from rl_actors.algorithms import RewardMix
from rl_actors.contracts import (
    MAX_IN_FLIGHT,
    AgentLimits,
    EngineError,
    InfrastructureError,
    Rollout,
    RolloutRequest,
    Score,
    ToolHostError,
)
from rl_actors.environment import WorkflowRef
from rl_actors.models import RewardModel
from rl_actors.sandbox import ProcessSandbox

MAX_DROPPED_FRACTION = 0.25


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
    """Finished rollouts, and the ids of those that infrastructure broke twice.

    `first_error` says what broke the first dropped one; empty when none was dropped.
    """

    rollouts: tuple[Rollout, ...]
    dropped: tuple[str, ...]
    reissued: int
    first_error: str


class RolloutWorker:
    """One vLLM engine and its tool hosts, as a Ray actor; every method is awaited on the actor's event loop."""

    def __init__(self, model_path: str, settings: RolloutWorkerSettings) -> None:
        """Load the workflow and start the engine."""
        os.environ["OMP_NUM_THREADS"] = str(settings.num_threads)
        torch.set_num_threads(settings.num_threads)
        workflow, limits = settings.workflow.load(), settings.limits
        tools = importlib.import_module(workflow.tools_module).WORLD.tools
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
        # Once more, because a lost one would otherwise thin out its group; not twice, because a broken engine stays so.
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
        """Return each request's rollout, or what broke it."""

        async def attempt(request: RolloutRequest) -> Rollout | str:
            async with self._slots:
                try:
                    return await run_rollout(request, self._ports, temperature=temperature)
                except (EngineError, ToolHostError) as error:
                    return str(error)

        return list(await asyncio.gather(*map(attempt, requests)))


class RolloutPool:
    """Rollout workers that share a batch of requests; whole groups stay on one worker."""

    def __init__(
        self, model_path: str, settings: RolloutWorkerSettings, *, num_workers: int, options: Options, timeout_s: float
    ) -> None:
        """Start the workers and wait until every engine is up."""
        self._model_path, self._settings, self._options = model_path, settings, options
        self.workers = [self._start(rank) for rank in range(num_workers)]
        self._timeout_s = timeout_s
        self.num_reissued = 0
        self._await(self.workers)

    def restart(self, rank: int) -> None:
        """Replace a worker whose engine broke by a new one; it serves the weights it was loaded with, no others."""
        close_actors([self.workers[rank]])
        self.workers[rank] = self._start(rank)
        self._await([self.workers[rank]])

    def _start(self, rank: int) -> Any:
        return start_actor(RolloutWorker, self._options("rollout_worker", rank), self._model_path, self._settings)

    def _await(self, workers: Sequence[Any]) -> None:
        wait_for([worker.ready.remote() for worker in workers], what="rollout workers")

    def rollouts(self, requests: Sequence[RolloutRequest], temperature: float) -> list[Rollout]:
        """Attempt all requests; the result is ordered by request, with dropped ones left out."""
        count = len(self.workers)
        # A group on one worker: its attempts begin alike, and share that engine's prefix cache.
        shares = [[r for r in requests if r.group_id % count == index] for index in range(count)]
        calls = [w.run.remote(share, temperature) for w, share in zip(self.workers, shares, strict=True) if share]
        batches: list[RolloutBatch] = wait_for(calls, timeout_s=self._timeout_s, what="rollout workers")
        self.num_reissued += sum(batch.reissued for batch in batches)
        require_enough(requests, batches)
        by_id = {rollout.rollout_id: rollout for batch in batches for rollout in batch.rollouts}
        return [by_id[request.rollout_id] for request in requests if request.rollout_id in by_id]

    def close(self) -> None:
        """Stop the workers."""
        # Tool hosts are processes of their own, which a kill alone would leave behind.
        close_actors(self.workers, graceful=True)
        self.workers = []


def require_enough(requests: Sequence[RolloutRequest], batches: Sequence[RolloutBatch]) -> None:
    """Refuse to go on with what is left when infrastructure broke too many rollouts.

    Raises:
        InfrastructureError: More than `MAX_DROPPED_FRACTION` of the requests were dropped; it names the first cause.
    """
    dropped = [name for batch in batches for name in batch.dropped]
    if len(dropped) > MAX_DROPPED_FRACTION * len(requests):
        reason = next(batch.first_error for batch in batches if batch.first_error)
        raise InfrastructureError(
            f"{len(dropped)} of {len(requests)} rollouts were lost twice, the first ({dropped[0]}) to: {reason}"
        )


class RewardScorer:
    """Verified outcome and calibrated reward model under a declared mix, as a Ray actor."""

    def __init__(self, path: str, version: str, mix: RewardMix, num_threads: int = 1, batch_size: int = 16) -> None:
        """Load the reward model."""
        torch.set_num_threads(num_threads)
        self._model = RewardModel.load(path)
        self._version, self._mix, self._batch_size = version, mix, batch_size

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """Return one score per rollout, in order."""
        tokens = [rollout_token_ids(rollout) for rollout in rollouts]
        # Rollouts of similar length share a batch: little of it is padding.
        order = sorted(range(len(rollouts)), key=lambda index: len(tokens[index]))
        scores: dict[int, Score] = {}
        for start in range(0, len(order), self._batch_size):
            chunk = order[start : start + self._batch_size]
            critics, rubrics = self._model.critic_scores([tokens[index] for index in chunk])
            for index, critic, values in zip(chunk, critics, rubrics, strict=True):
                rubric = dict(zip(self._model.criteria, values, strict=True))
                scores[index] = self._mix.score(
                    rollouts[index], critic, rubric=rubric, reward_model_version=self._version
                )
        return [scores[index] for index in range(len(rollouts))]


class ScorerPool:
    """One or more reward scorers."""

    def __init__(
        self, path: str, version: str, mix: RewardMix, *, num_scorers: int, num_threads: int, options: Options
    ) -> None:
        """Start the scorers."""
        self._scorers = [
            start_actor(RewardScorer, options("scorer", rank), path, version, mix, num_threads)
            for rank in range(num_scorers)
        ]

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """Return one score per rollout, in order."""
        count = len(self._scorers)
        calls = [scorer.score.remote(list(rollouts[index::count])) for index, scorer in enumerate(self._scorers)]
        by_id = {score.rollout_id: score for part in wait_for(calls, what="reward scorers") for score in part}
        return [by_id[rollout.rollout_id] for rollout in rollouts]

    def close(self) -> None:
        """Stop the scorers."""
        close_actors(self._scorers)
