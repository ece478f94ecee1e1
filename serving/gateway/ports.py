"""The values and ports of a live request: all that the gateway needs of disk, engines and tools."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

# For type checkers only: at run time the ports import no implementation; whoever fills them chooses it.
if TYPE_CHECKING:
    from rl_actors.agent import Generate, Renderer, Toolset
    from rl_actors.environment import Workflow
    from rl_actors.sandbox import ToolWorld
    from serving.gateway.critic_queue import CriticQueue
    from serving.gateway.openai_api import ChatRequest
    from serving.split import SplitWatcher
    from serving.store import GatewayConfig, RequestLedger, ServedPolicy, TraceLog


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRequest:
    """A validated request. `request_id` is its idempotency key."""

    request_id: str
    session_key: str
    chat: ChatRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class LivePolicy:
    """A version that can answer: its stamps, its renderer, its engine."""

    stamps: ServedPolicy
    renderer: Renderer
    generate: Generate


class Worlds(Protocol):
    """Where live worlds are opened; a `Sandbox` is one."""

    async def open(self, world: Mapping[str, Any]) -> AbstractAsyncContextManager[ToolWorld]:
        """Open a world."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LivePorts:
    """All that requests share. The ledger's `owner` names this gateway."""

    config: GatewayConfig
    workflow: Workflow
    toolset: Toolset
    writes: frozenset[str]  # tools whose calls change the world
    sandbox_level: str
    worlds: Worlds
    splits: SplitWatcher
    # Version -> policy, from disk; raises EngineError for a broken one. Its engine is first looked up when it samples.
    find_policy: Callable[[str], Awaitable[LivePolicy]]
    find_stamps: Callable[[str], ServedPolicy]  # raises SeatrialError when they are missing or damaged
    ledger: RequestLedger
    end_orphans: Callable[[], int]  # aborts what dead gateways left open
    critic: CriticQueue
    traces: TraceLog
    clock: Callable[[], float]
    monotonic: Callable[[], float]
