"""The critic's bounded queue: finished runs are scored later, logged, and never gate anything. Losses are counted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from rl_actors.contracts import SeatrialError
from serving.store import RequestLedger

Critic = Callable[[Sequence[Sequence[int]]], Awaitable[Sequence[float]]]
"""Token ids of finished runs -> one score each, in the same order."""


_MAX_BATCH: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRequest:
    """What the critic reads: every token of a run, prompt to last sampled token."""

    run_id: str
    token_ids: tuple[int, ...]
    reward_model_version: str


class CriticQueue:
    """Takes finished runs without ever making a request wait; `num_lost` counts what was not scored."""

    def __init__(self, critic: Critic | None, ledger: RequestLedger, *, size: int, clock: Callable[[], float]) -> None:
        """Without a critic every offer is ignored, and nothing counts as lost."""
        self._critic, self._ledger, self._clock = critic, ledger, clock
        self._runs: asyncio.Queue[FinishedRequest] = asyncio.Queue(maxsize=size)
        self.num_scored = 0
        self.num_lost = 0

    def offer(self, run: FinishedRequest) -> None:
        """Queue a run for scoring; drop and count it when the queue is full."""
        if self._critic is None:
            return
        try:
            self._runs.put_nowait(run)
        except asyncio.QueueFull:
            self.num_lost += 1

    async def work(self) -> None:
        """Score batches until cancelled."""
        while self._critic is not None:
            await self._score(self._critic, await self._batch())

    async def _batch(self) -> list[FinishedRequest]:
        runs = [await self._runs.get()]
        while len(runs) < _MAX_BATCH and not self._runs.empty():
            runs.append(self._runs.get_nowait())
        return runs

    async def _score(self, critic: Critic, runs: list[FinishedRequest]) -> None:
        try:
            scores = await critic([run.token_ids for run in runs])
            await asyncio.to_thread(self._log, runs, scores)
            self.num_scored += len(runs)
        except (SeatrialError, TimeoutError, ValueError):
            self.num_lost += len(runs)

    def _log(self, runs: Sequence[FinishedRequest], scores: Sequence[float]) -> None:
        for run, score in zip(runs, scores, strict=True):
            self._ledger.score(
                run.run_id, float(score), reward_model_version=run.reward_model_version, at=self._clock()
            )
