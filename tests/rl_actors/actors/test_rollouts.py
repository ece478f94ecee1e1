"""Rollouts re-issued once and then dropped and named, shared out and put back in order; scores under the mix."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModel

from rl_actors.actors import rollouts
from rl_actors.actors.rollouts import (
    RewardScorer,
    RolloutBatch,
    RolloutPool,
    RolloutWorker,
    ScorerPool,
    require_enough,
)
from rl_actors.algorithms.rewards import RewardMix
from rl_actors.contracts.errors import AttestationError, EngineError, InfrastructureError, ToolHostError
from rl_actors.contracts.rollouts import Rollout
from rl_actors.contracts.tasks import RolloutRequest
from rl_actors.models.reward_model import RewardModel, pad_sequences
from tests.rl_actors.actors.fake_actors import FakeScorer, options
from tests.rl_actors.fakes import BAD, GOOD, make_rollout, make_task, make_turn

needs_ray = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]
REQUESTS = [RolloutRequest(task=make_task(f"t{number}"), group_id=number, seed=number) for number in range(6)]
MIX = RewardMix(outcome_weight=0.75)


# --- one worker -----------------------------------------------------------------------------------


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
    monkeypatch.setattr(rollouts, "run_rollout", attempts)
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


# --- what may be lost -----------------------------------------------------------------------------


def batch(num_dropped: int) -> Any:
    names = tuple(f"r{number}" for number in range(num_dropped))
    return SimpleNamespace(dropped=names, first_error="engine gone" if names else "")


@pytest.mark.parametrize(("dropped", "requested"), [((0, 0), 8), ((2, 0), 8), ((1, 1), 8), ((0,), 1)])
def test_up_to_a_quarter_may_be_lost(dropped: tuple[int, ...], requested: int):
    require_enough([object()] * requested, [batch(count) for count in dropped])  # type: ignore[arg-type, list-item]


@pytest.mark.parametrize(("dropped", "requested"), [((3, 0), 8), ((0, 3), 8), ((2, 1), 8), ((1,), 1), ((8,), 8)])
def test_more_is_refused_with_the_first_cause(dropped: tuple[int, ...], requested: int):
    with pytest.raises(InfrastructureError, match=r"rollouts were lost twice, the first \(r0\) to: engine gone"):
        require_enough([object()] * requested, [batch(count) for count in dropped])  # type: ignore[arg-type, list-item]


# --- one scorer -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    backbone: Any = AutoModel.from_pretrained(tiny_dir, dtype=torch.float32)
    model = RewardModel(backbone, ("correct", "polite"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.score_head.weight.normal_(generator=generator)
        model.rubric_head.weight.normal_(generator=generator)
    model.temperature = 2.0
    path = tmp_path_factory.mktemp("reward")
    model.save(path)
    return path


def scored_rollouts() -> list[Rollout]:
    """Five rollouts of different length, longest in the middle."""
    made = []
    for number, length in enumerate((3, 9, 20, 1, 5)):
        turn = make_turn((1, 20 + number), [30 + number + step for step in range(length)])
        made.append(make_rollout(f"r{number}", turns=(turn,), outcome=GOOD if number % 2 else BAD))
    return made


def test_scores_come_back_in_order_whatever_the_length(directory: Path):
    scores = RewardScorer(str(directory), "rm-a", MIX).score(scored_rollouts())
    assert [score.rollout_id for score in scores] == [f"r{number}" for number in range(5)]
    model = RewardModel.load(directory)
    for score, rollout in zip(scores, scored_rollouts(), strict=True):
        turn = rollout.turns[0]
        ids, attention = pad_sequences([(*turn.prompt_token_ids, *turn.completion.token_ids)], torch.device("cpu"))
        with torch.no_grad():
            raw, rubric = model(ids, attention)
        critic = 1.0 / (1.0 + math.exp(-float(raw) / 2.0))
        assert score.critic_score == pytest.approx(critic, rel=1e-4)
        assert score.rubric == pytest.approx(
            dict(zip(("correct", "polite"), rubric[0].tolist(), strict=True)), rel=1e-3
        )
        assert score.outcome_reward == MIX.outcome_reward(rollout)
        assert score.reward == pytest.approx(0.75 * score.outcome_reward + 0.25 * critic, rel=1e-4)
        assert score.reward_model_version == "rm-a"


def test_the_size_of_a_batch_changes_no_score(directory: Path):
    whole = RewardScorer(str(directory), "rm-a", MIX).score(scored_rollouts())
    for one, other in zip(
        whole, RewardScorer(str(directory), "rm-a", MIX, batch_size=2).score(scored_rollouts()), strict=True
    ):
        assert one.reward == pytest.approx(other.reward, rel=1e-4)


def test_nothing_to_score_is_no_score(directory: Path):
    assert RewardScorer(str(directory), "rm-a", MIX).score([]) == []


# --- with a small local Ray -----------------------------------------------------------------------


def request(number: int, *, group: int, is_lost: bool = False) -> Any:
    return SimpleNamespace(rollout_id=f"r{number}", group_id=group, is_lost=is_lost)


class TestRolloutPool:
    """Requests are shared by group, results come back in order."""

    pytestmark = needs_ray

    def test_groups_stay_together_and_the_order_is_kept(self, pool: RolloutPool):
        requests = [request(number, group=number // 2) for number in range(8)]
        made: list[Any] = pool.rollouts(requests, 1.0)
        assert [rollout.rollout_id for rollout in made] == [f"r{number}" for number in range(8)]
        makers = [rollout.made_by for rollout in made]
        assert len(set(makers)) == 2
        assert all(makers[index] == makers[index + 1] for index in range(0, 8, 2))

    def test_a_lost_one_is_left_out_and_counted(self, pool: RolloutPool):
        before = pool.num_reissued
        requests = [request(number, group=number, is_lost=number == 2) for number in range(4)]
        assert [rollout.rollout_id for rollout in pool.rollouts(requests, 1.0)] == ["r0", "r1", "r3"]
        assert pool.num_reissued == before + 1

    def test_too_many_lost_ones_are_an_error(self, pool: RolloutPool):
        requests = [request(number, group=number, is_lost=number < 2) for number in range(4)]
        with pytest.raises(InfrastructureError, match="2 of 4 rollouts were lost twice"):
            pool.rollouts(requests, 1.0)

    def test_a_worker_without_a_share_is_not_asked(self, pool: RolloutPool):
        made: list[Any] = pool.rollouts([request(0, group=1), request(1, group=3)], 0.5)
        assert len({rollout.made_by for rollout in made}) == 1
        assert {rollout.temperature for rollout in made} == {0.5}


class TestScorerPool:
    """Shared out and put back in order."""

    pytestmark = needs_ray

    def test_scores_are_in_the_order_of_rollouts(self, local_ray: Any, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(rollouts, "RewardScorer", FakeScorer)
        mix: Any = None
        scorers = ScorerPool("path", "rm-a", mix, num_scorers=2, num_threads=1, options=options)
        made: Any = [SimpleNamespace(rollout_id=f"r{number}") for number in range(5)]
        scores: list[Any] = scorers.score(made)
        assert [score.rollout_id for score in scores] == [f"r{number}" for number in range(5)]
        assert len({score.made_by for score in scores}) == 2
        assert scorers.score([]) == []
        scorers.close()
