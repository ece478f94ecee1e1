"""Counting what one attempt at a request samples, and giving up on a version that was taken out of force."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rl_actors.agent.loop import Generate
from rl_actors.contracts import Completion, SamplingParams
from rl_actors.errors import EngineError


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
