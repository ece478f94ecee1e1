"""One policy version behind one vLLM engine: what a Serve replica of its application holds.

The engine class is the one that training rollouts use. A replica answers only after a warm-up request, proves its life
by sampling a token, and stamps itself with the version it serves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from rl_actors.contracts import Completion, EngineError, SamplingParams
from serving.store import ServedPolicy

_PROBE_TIMEOUT_S: Final = 20.0


_PROBE: Final = SamplingParams(max_tokens=1, temperature=0.0, seed=0)


class Engine(Protocol):
    """What a policy server needs of an engine; `VllmEngine` is one."""

    async def generate(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        """Sample one completion."""
        ...


def vllm_engine(path: str, max_model_len: int, max_num_seqs: int) -> Engine:
    """Start a vLLM engine; vLLM is imported here, so that nobody else pays for it."""
    from rl_actors.actors import VllmEngine

    return VllmEngine(path, max_model_len=max_model_len, max_num_seqs=max_num_seqs)


class PolicyServer:
    """One replica. Raises EngineError from every call once its engine is dead; Serve then replaces the replica."""

    def __init__(
        self,
        policy: ServedPolicy,
        *,
        max_model_len: int,
        max_num_seqs: int,
        build_engine: Callable[[str, int, int], Engine] = vllm_engine,
    ) -> None:
        """Load the model and warm it up; Serve calls the replica healthy only after this returns."""
        self._policy = policy
        self._engine = build_engine(policy.path, max_model_len, max_num_seqs)
        self._is_warm = False

    async def generate(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        """Sample one completion of exact token ids."""
        return await self._engine.generate(prompt_token_ids, sampling)

    async def probe(self) -> bool:
        """Sample one token. Raises EngineError when the engine is dead or silent."""
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                await self._engine.generate((0, 1), _PROBE)
        except TimeoutError:
            raise EngineError(f"policy {self._policy.version}: no token within {_PROBE_TIMEOUT_S:g} s") from None
        return True

    async def check_health(self) -> None:
        """Serve's health check, first called before any traffic: the warm-up is a real request."""
        if not self._is_warm:
            await self._engine.generate(tuple(range(8)) * 4, SamplingParams(max_tokens=16, temperature=1.0, seed=0))
            self._is_warm = True
        await self.probe()
