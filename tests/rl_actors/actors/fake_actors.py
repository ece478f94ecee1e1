"""Ray actors that stand in for engines, scorers and learners. Light imports: each runs in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rl_actors.contracts.errors import AttestationError, BadInputError, EngineError
from rl_actors.contracts.rollouts import LearnerUpdate


class FakeWorker:
    """A rollout worker that tells which requests it got; its logprobs are off by the next of `gaps`."""

    def __init__(self, model_path: str, settings: Any) -> None:
        self.settings, self.version, self.shift, self.published = settings, 0, 0.0, 0
        self.gaps: list[float] = []
        self.skew = 0
        self.breaks = False

    async def ready(self) -> str:
        return "ready"

    async def configure(self, gaps: Sequence[float], skew: int = 0) -> None:
        self.gaps, self.skew, self.published = list(gaps), skew, 0

    async def run(self, requests: Sequence[Any], temperature: float) -> Any:
        lost = [request for request in requests if request.is_lost]
        kept = [request for request in requests if not request.is_lost]
        rollouts = [SimpleNamespace(rollout_id=r.rollout_id, made_by=id(self), temperature=temperature) for r in kept]
        return SimpleNamespace(
            rollouts=rollouts[::-1],
            dropped=[request.rollout_id for request in lost],
            reissued=len(lost),
            first_error="engine gone" if lost else "",
        )

    async def break_next_publish(self) -> None:
        self.breaks = True

    async def publish(self, weights: Any, weights_version: int) -> None:
        if self.breaks:
            raise EngineError("weights version 7 broke the engine half-way")
        self.version = weights_version + self.skew
        self.published += 1
        self.shift = self.gaps.pop(0) if self.gaps else 0.0

    async def times_published(self) -> int:
        return self.published

    async def probe(self, sequences: Sequence[Sequence[int]]) -> tuple[int, list[list[float]]]:
        return self.version, [[-1.0 + self.shift for _ in sequence[1:]] for sequence in sequences]

    async def close(self) -> None:
        Path(self.settings).touch()


class FakeScorer:
    """Scores a rollout with its number."""

    def __init__(self, path: str, version: str, mix: Any, num_threads: int) -> None:
        self.version = version

    def score(self, rollouts: Sequence[Any]) -> list[Any]:
        return [SimpleNamespace(rollout_id=r.rollout_id, version=self.version, made_by=id(self)) for r in rollouts]


UNSTABLE_VERSION = 50


class FakeLearner:
    """One rank; a checkpoint is a file with its rank and version."""

    def __init__(self, policy_path: str, reference_path: str, settings: Any, place: dict[str, Any]) -> None:
        self.place, self.version, self.num_restores = place, 0, 0

    def update(self, samples: Sequence[int]) -> Any:
        self.version += 1
        metrics = {"num": float(len(samples)), "rank": float(self.place["rank"]), "restores": float(self.num_restores)}
        factor = 0.5 if self.version == UNSTABLE_VERSION else 0.0
        trips = ("entropy_collapse: entropy = 0, limit 0.1",) if factor else ()
        return LearnerUpdate(weights_version=self.version, metrics=metrics, trips=trips, restore_factor=factor)

    def probe_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return [[-1.0 for _ in sequence[1:]] for sequence in sequences]

    def put_weights(self) -> dict[str, int]:
        return {"version": self.version}

    def save_checkpoint(self, directory: str) -> None:
        if self.version == 99:
            raise OSError("disk full")
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / f"rank{self.place['rank']}").write_text(str(self.version))

    def resume(self, directory: str) -> tuple[int, tuple[str, ...]]:
        self.version = int((Path(directory) / f"rank{self.place['rank']}").read_text())
        return self.version, ("its coffee",)

    def restore(self, directory: str, learning_rate_factor: float) -> None:
        assert (Path(directory) / f"rank{self.place['rank']}").exists()
        self.num_restores += 1

    def save_policy(self, directory: str) -> None:
        (Path(directory) / f"policy{self.place['rank']}").touch()

    def jump_to(self, version: int) -> None:
        self.version = version


class Troubled:
    """Fails in the way it is asked to."""

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def stale(self) -> None:
        raise AttestationError("worker 3 is stale")

    def bad_input(self) -> None:
        raise BadInputError("ppo.epochs", 0, "needs one or more")

    def defect(self) -> None:
        raise ZeroDivisionError("a defect")

    def well(self) -> str:
        return "well"


def options(role: str, rank: int) -> dict[str, Any]:
    """Ray's options of a fake actor."""
    return {"num_cpus": 0.1, "max_concurrency": 4} if role == "rollout_worker" else {"num_cpus": 0.1}
