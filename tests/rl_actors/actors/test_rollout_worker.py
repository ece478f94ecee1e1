"""The rollout worker's bookkeeping over a fake attempt: re-issued once, then dropped and named."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from rl_actors.actors import rollout_worker
from rl_actors.actors.rollout_worker import RolloutBatch, RolloutWorker
from rl_actors.contracts.errors import AttestationError, EngineError, ToolHostError
from rl_actors.contracts.tasks import RolloutRequest
from tests.rl_actors.fakes import make_rollout, make_task

REQUESTS = [RolloutRequest(task=make_task(f"t{number}"), group_id=number, seed=number) for number in range(6)]


class Attempts:
    """Stands in for `run_rollout`: the first `failures[id]` attempts at a task raise."""

    def __init__(self, failures: dict[str, int], error: Exception) -> None:
        self.failures, self.error = failures, error
        self.seen: Counter[str] = Counter()
        self.temperatures: set[float] = set()
        self.now = self.most = 0

    async def __call__(self, request: RolloutRequest, ports: Any, *, temperature: float) -> Any:
        self.temperatures.add(temperature)
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0)
        self.now -= 1
        self.seen[request.task.task_id] += 1
        if self.seen[request.task.task_id] <= self.failures.get(request.task.task_id, 0):
            raise self.error
        return make_rollout(request.rollout_id, task_id=request.task.task_id)


def run(
    monkeypatch: pytest.MonkeyPatch, failures: dict[str, int], *, slots: int = 64, error: Exception | None = None
) -> tuple[RolloutBatch, Attempts]:
    attempts = Attempts(failures, error or EngineError("engine gone"))
    monkeypatch.setattr(rollout_worker, "run_rollout", attempts)
    worker: Any = RolloutWorker.__new__(RolloutWorker)
    worker._ports, worker._slots = None, asyncio.Semaphore(slots)
    return asyncio.run(worker.run(REQUESTS, 0.7)), attempts


def test_when_nothing_breaks_nothing_is_reissued(monkeypatch: pytest.MonkeyPatch):
    batch, attempts = run(monkeypatch, {})
    assert [rollout.task_id for rollout in batch.rollouts] == [f"t{number}" for number in range(6)]
    assert (batch.dropped, batch.reissued, batch.first_error) == ((), 0, "")
    assert attempts.temperatures == {0.7}


@pytest.mark.parametrize("error", [EngineError("engine gone"), ToolHostError("host died")])
def test_what_infrastructure_broke_is_attempted_once_more(monkeypatch: pytest.MonkeyPatch, error: Exception):
    batch, attempts = run(monkeypatch, {"t1": 1, "t4": 1}, error=error)
    assert sorted(rollout.task_id for rollout in batch.rollouts) == [f"t{number}" for number in range(6)]
    assert (batch.dropped, batch.reissued, batch.first_error) == ((), 2, "")
    assert attempts.seen == Counter({"t1": 2, "t4": 2, "t0": 1, "t2": 1, "t3": 1, "t5": 1})


def test_what_breaks_twice_is_dropped_and_named_and_never_a_rollout(monkeypatch: pytest.MonkeyPatch):
    batch, attempts = run(monkeypatch, {"t1": 9, "t4": 1})
    assert batch.dropped == ("t1#1.1",)
    assert "t1" not in {rollout.task_id for rollout in batch.rollouts}
    assert (batch.reissued, batch.first_error) == (2, "engine gone")
    assert attempts.seen["t1"] == 2, "exactly once more"


@pytest.mark.parametrize("error", [ValueError("a defect"), AttestationError("stale")])
def test_any_other_error_is_not_swallowed(monkeypatch: pytest.MonkeyPatch, error: Exception):
    """Negative control: a defect of our own must end the run and not thin out the batch."""
    with pytest.raises(type(error)):
        run(monkeypatch, {"t1": 1}, error=error)


@pytest.mark.parametrize(("slots", "most"), [(1, 1), (2, 2), (64, 6)])
def test_no_more_rollouts_are_in_flight_than_allowed(monkeypatch: pytest.MonkeyPatch, slots: int, most: int):
    _, attempts = run(monkeypatch, {}, slots=slots)
    assert attempts.most == most
