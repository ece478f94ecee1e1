"""What answering a live request takes and needs: the validated request, a version that can answer, the shared ports."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from rl_actors.agent import Generate, Renderer, Toolset
from rl_actors.contracts import Completion, InfrastructureError, SamplingParams
from rl_actors.environment import Workflow
from rl_actors.sandbox import ToolWorld
from serving.gateway.critic_queue import CriticQueue
from serving.split import SplitWatcher
from serving.store import GatewayConfig, RequestLedger, ServedPolicy, TraceLog


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRequest:
    """A validated request. `request_id` is its idempotency key; `messages` are (role, text) pairs."""

    request_id: str
    session_key: str
    messages: tuple[tuple[str, str], ...]
    user_text: str
    temperature: float | None
    seed: int | None
    token_cap: int | None
    intent: str
    task_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LivePolicy:
    """A version that can answer: its stamps, its renderer, its engine."""

    stamps: ServedPolicy
    renderer: Renderer
    generate: Generate


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokenPolicy:
    """A version that cannot be loaded, and why; `stamps` is None when not even they can be read."""

    stamps: ServedPolicy | None
    error: InfrastructureError

    async def generate(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        """Raise why, whatever is asked: the failure is met inside an attempt, which has a row."""
        raise self.error


FindPolicy = Callable[[str], Awaitable[LivePolicy]]
"""Version -> policy, from disk: its engine is first looked up when it samples. Raises EngineError for a broken one."""


FindStamps = Callable[[str], ServedPolicy]
"""Version -> stamps, from disk. Raises SeatrialError when they are missing or damaged."""


class OpenWorlds(Protocol):
    """Where live worlds are opened; a Sandbox is one."""

    async def open(self, world: Mapping[str, Any]) -> AbstractAsyncContextManager[ToolWorld]:
        """Open a world."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LivePorts:
    """Everything a request needs that is shared between requests. `owner` names this gateway in the ledger."""

    config: GatewayConfig
    workflow: Workflow
    toolset: Toolset
    writes: frozenset[str]
    sandbox_level: str
    worlds: OpenWorlds
    splits: SplitWatcher
    find_policy: FindPolicy
    find_stamps: FindStamps
    ledger: RequestLedger
    critic: CriticQueue
    traces: TraceLog
    owner: str
    clock: Callable[[], float]
    monotonic: Callable[[], float]
