"""Writes happen once per request, over all its attempts: what a failed attempt wrote is answered, not written again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rl_actors.agent.executor import ToolWorld
from rl_actors.contracts import ToolResult


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
