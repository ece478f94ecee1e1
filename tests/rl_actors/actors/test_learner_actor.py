"""The learner's actor: what it joins, and that it hands everything on to the learner of its rank."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from rl_actors.actors import learner_actor as ppo_learner
from rl_actors.actors.learner_actor import LearnerRank, PpoLearnerActor
from rl_actors.contracts.rollouts import LearnerUpdate


class FakeLearner:
    """Remembers what it was asked."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments, self.weights_version = arguments, 3
        self.log: list[tuple[Any, ...]] = []

    def update(self, samples: Any) -> LearnerUpdate:
        return LearnerUpdate(weights_version=4, metrics={"num": len(samples)})

    def probe_logprobs(self, sequences: Any) -> list[list[float]]:
        return [[-1.0] * (len(sequence) - 1) for sequence in sequences]

    def weights(self) -> dict[str, int]:
        return {"w": 1}

    def save_checkpoint(self, directory: str) -> None:
        self.log.append(("save", directory))

    def load_checkpoint(self, directory: str) -> tuple[str, ...]:
        self.weights_version = 9
        return ("random state of 2 ranks",)

    def restore(self, directory: str, learning_rate_factor: float) -> None:
        self.log.append(("restore", directory, learning_rate_factor))

    def save_policy(self, directory: str) -> None:
        (Path(directory) / "model").touch()


PLACE = LearnerRank(rank=1, num_ranks=2, master_address="10.0.0.1", master_port=4321, num_threads=1)


@pytest.fixture
def actor(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[Any]]:
    """An actor over a fake learner, with the order in which it was built."""
    order: list[Any] = []

    def build(*arguments: Any) -> FakeLearner:
        order.append("learner")
        return FakeLearner(*arguments)

    monkeypatch.setattr(ppo_learner, "join_process_group", order.append)
    monkeypatch.setattr(ppo_learner, "PpoLearner", build)
    monkeypatch.setattr(ppo_learner.ray, "put", lambda value: ("reference to", value))
    settings: Any = "settings"
    return PpoLearnerActor("policy", "reference", settings, PLACE), order


def test_a_rank_joins_its_group_before_it_builds_anything(actor: tuple[Any, list[Any]]):
    one, order = actor
    assert order == [PLACE, "learner"]
    assert one._learner.arguments == ("policy", "reference", "settings")


def test_everything_is_handed_on(actor: tuple[Any, list[Any]], tmp_path: Path):
    one, _ = actor
    assert one.update([1, 2]).metrics == {"num": 2}
    assert one.probe([[1, 2, 3]]) == [[-1.0, -1.0]]
    assert one.weights() == ("reference to", {"w": 1}), "engines read one copy, from the object store"
    one.save_checkpoint("there")
    assert one._learner.log == [("save", "there")]
    assert one.load_checkpoint("there") == (9, ("random state of 2 ranks",))
    one.restore("there", 0.5)
    assert one._learner.log[-1] == ("restore", "there", 0.5)
    one.save_policy(str(tmp_path / "new" / "folder"))
    assert (tmp_path / "new" / "folder" / "model").exists()


@pytest.mark.slow
def test_joining_tells_torch_where_this_rank_stands(process_group: None):
    assert torch.distributed.is_initialized()
    assert (torch.distributed.get_rank(), torch.distributed.get_world_size()) == (0, 1)
    assert {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")} == {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
