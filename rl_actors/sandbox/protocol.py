"""A sandbox as the agent knows it: worlds are opened in it, and tools run in an open world."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, Self

from rl_actors.contracts import ToolResult


class ToolWorld(Protocol):
    """A world that takes approved calls."""

    async def call(self, tool: str, arguments: Mapping[str, Any]) -> ToolResult:
        """Run the tool. Raises ToolHostError when the sandbox failed, never for a refusal of the tool."""
        ...


class WorldSession(ToolWorld, Protocol):
    """One open world, a context manager that closes it."""

    async def read_state(self, selector: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the rows that decide the outcome."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc: object) -> None: ...


class Sandbox(Protocol):
    """Isolated room for the tools of one workflow; `level` is the kind of isolation, as the ledger records it."""

    level: str

    async def open(self, world: Mapping[str, Any]) -> WorldSession:
        """Open a world. Raises ToolHostError when the sandbox failed."""
        ...

    async def close(self) -> None:
        """End the sandbox and all that runs in it."""
