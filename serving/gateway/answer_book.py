"""Idempotency: one key runs once. A repeated key gets the stored answer, or a conflict while its run is in flight.

A run goes on when its client hangs up: tools may have run, and the client will ask again with the same key.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from serving.gateway.openai_api import SHOULD_RETRY, ApiError, ChatAnswer, conflict, overloaded

Run = Callable[[], Coroutine[Any, Any, ChatAnswer]]


@dataclass(frozen=True, slots=True)
class _Entry:
    fingerprint: str
    task: asyncio.Task[ChatAnswer]


class AnswerBook:
    """Answers by idempotency key: at most `max_running` in flight, at most `capacity` remembered."""

    def __init__(self, *, max_running: int, capacity: int = 4096) -> None:
        """Start empty; what another gateway or an earlier process answered is known to the ledger only."""
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._running: set[asyncio.Task[ChatAnswer]] = set()
        self._max_running, self._capacity = max_running, capacity

    @property
    def num_running(self) -> int:
        """Runs in flight, those whose client hung up included."""
        return len(self._running)

    async def once(self, key: str, fingerprint: str, run: Run) -> ChatAnswer:
        """Return the answer of `key`, starting `run` only when the key is new.

        Raises:
            ApiError: 409 in flight; 422 the key came with another body; 429 too many runs; or what the run raised.
        """
        entry = self._entries.get(key)
        if entry is None:
            entry = self._begin(key, fingerprint, run)
        elif entry.fingerprint != fingerprint:
            message = "this idempotency key was used with another body; use a new key"
            raise ApiError(422, message, code="idempotency_key_reused", headers={SHOULD_RETRY: "false"})
        elif not entry.task.done():
            raise conflict("a request with this idempotency key is in flight", code="in_flight", may_retry=True)
        return await asyncio.shield(entry.task)

    def _begin(self, key: str, fingerprint: str, run: Run) -> _Entry:
        if self.num_running >= self._max_running:
            raise overloaded(f"{self.num_running} requests in flight, the limit; try again shortly")
        task = asyncio.create_task(run())
        self._running.add(task)
        task.add_done_callback(lambda done: self._finish(key, done))
        self._entries[key] = entry = _Entry(fingerprint, task)
        self._evict()
        return entry

    def _finish(self, key: str, task: asyncio.Task[ChatAnswer]) -> None:
        """Forget what may be tried again; keep answers, and failures after which a tool may not run twice."""
        self._running.discard(task)
        error = None if task.cancelled() else task.exception()
        is_final = error is None or (isinstance(error, ApiError) and error.headers.get(SHOULD_RETRY) == "false")
        if task.cancelled() or not is_final:
            self._entries.pop(key, None)

    def _evict(self) -> None:
        """Forget the oldest finished answers beyond the capacity; the ledger still refuses their keys."""
        for key in list(self._entries):
            if len(self._entries) <= self._capacity:
                return
            if self._entries[key].task.done():
                del self._entries[key]
