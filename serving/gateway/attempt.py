"""One attempt at a request: what it samples is counted, and what it writes happens once over all attempts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rl_actors.agent import Generate
from rl_actors.contracts import Completion, EngineError, SamplingParams, ToolResult
from rl_actors.sandbox import ToolWorld


@dataclass(slots=True)
class Meter:
    """Counts the tokens of one attempt, also when it fails half-way.

    A model call is given up once its version is no longer in force: after a fail-back nobody waits for a dead engine.
    """

    generate: Generate
    is_in_force: Callable[[], bool] = lambda: True
    patience_s: float = 1.0
    tokens_in: int = 0
    tokens_out: int = 0
    cached_tokens: int = 0

    async def __call__(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        """Sample, and count. Raises EngineError when the version was taken out of the split meanwhile."""
        call = asyncio.ensure_future(self.generate(prompt_token_ids, sampling))
        try:
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
    """What one request already did, over all its attempts."""

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
                self._replays.remove(entry)
                return entry[1]
        is_write = tool in self._writes
        self._memory.num_calls += 1
        self._memory.is_uncertain |= is_write
        result = await self._world.call(tool, arguments)
        self._memory.is_uncertain = False
        if is_write and not result.error:
            self._memory.written.append((key, result))
        return result
