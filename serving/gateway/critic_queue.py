"""The critic's bounded queue: finished requests are scored later, logged, and never gate anything."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Final

from rl_actors.contracts import SeatrialError

if TYPE_CHECKING:
    from serving.contracts import RequestRecord
    from serving.store import RequestLedger

Critic = Callable[[Sequence[Sequence[int]]], Awaitable[Sequence[float]]]
"""Token ids of finished requests, prompt to last sampled token -> one score each, in the same order."""

_MAX_BATCH: Final = 16


class CriticQueue:
    """Takes finished requests without ever making one wait; `num_lost` counts those that were not scored."""

    def __init__(self, critic: Critic | None, ledger: RequestLedger, *, size: int, clock: Callable[[], float]) -> None:
        """Without a critic every offer is ignored, and nothing counts as lost."""
        self._critic, self._ledger, self._clock = critic, ledger, clock
        self._finished: asyncio.Queue[tuple[RequestRecord, Sequence[int]]] = asyncio.Queue(maxsize=size)
        self.num_scored = 0
        self.num_lost = 0

    def offer(self, record: RequestRecord, token_ids: Sequence[int]) -> None:
        """Queue a request for scoring; drop and count it when the queue is full."""
        if self._critic is None:
            return
        try:
            self._finished.put_nowait((record, token_ids))
        except asyncio.QueueFull:
            self.num_lost += 1

    async def work(self) -> None:
        """Score batches until cancelled."""
        while self._critic is not None:
            batch = [await self._finished.get()]
            while len(batch) < _MAX_BATCH and not self._finished.empty():
                batch.append(self._finished.get_nowait())
            try:
                scores = await self._critic([token_ids for _, token_ids in batch])
                await asyncio.to_thread(self._log, [record for record, _ in batch], scores)
                self.num_scored += len(batch)
            # ValueError: the critic gave another number of scores.
            except (SeatrialError, TimeoutError, ValueError):
                self.num_lost += len(batch)

    def _log(self, records: Sequence[RequestRecord], scores: Sequence[float]) -> None:
        for record, score in zip(records, scores, strict=True):
            version = record.reward_model_version
            self._ledger.score(record.run_id, float(score), reward_model_version=version, at=self._clock())
