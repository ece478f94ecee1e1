"""The learner as a Ray actor: one DeepSpeed rank, placed and addressed by the driver."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from rl_actors.contracts import LearnerUpdate, TrainingSample
from rl_actors.learner import PpoLearner, PpoSettings, ensure_operators


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerRank:
    """Where this rank stands in its group, and how many threads it may use."""

    rank: int
    num_ranks: int
    master_address: str
    master_port: int
    num_threads: int


class PpoLearnerActor:
    """Runs as a Ray actor (`ray.remote(PpoLearnerActor)`)."""

    def __init__(self, policy_path: str, reference_path: str, settings: PpoSettings, rank: LearnerRank) -> None:
        """Join the process group and build the DeepSpeed engine."""
        join_process_group(rank)
        self._learner = PpoLearner(policy_path, reference_path, settings)

    def update(self, samples: Sequence[TrainingSample]) -> LearnerUpdate:
        """Take one update on this rank's share of the batch."""
        return self._learner.update(samples)

    def probe(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the learner's log-probabilities of the probe tokens."""
        return self._learner.probe_logprobs(sequences)

    def weights(self) -> Any:
        """Put the policy's weights into the object store once; every engine reads the same copy."""
        return ray.put(self._learner.weights())

    def save_checkpoint(self, directory: str) -> None:
        """Write a checkpoint; complete only once its directory has the final name."""
        self._learner.save_checkpoint(directory)

    def load_checkpoint(self, directory: str) -> tuple[int, tuple[str, ...]]:
        """Restore a checkpoint; returns its weights version and what could not be restored."""
        missing = self._learner.load_checkpoint(directory)
        return self._learner.weights_version, missing

    def restore(self, directory: str, learning_rate_factor: float) -> None:
        """Go back to a checkpoint's weights with a lower learning rate; the weights version goes on."""
        self._learner.restore(directory, learning_rate_factor)

    def save_policy(self, directory: str) -> None:
        """Write the policy as a Hugging Face model directory."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        self._learner.save_policy(directory)


def join_process_group(rank: LearnerRank) -> None:
    """Set the environment DeepSpeed and torch.distributed read, cap threads, and join."""
    os.environ.update(
        {
            "RANK": str(rank.rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": str(rank.num_ranks),
            "MASTER_ADDR": rank.master_address,
            "MASTER_PORT": str(rank.master_port),
            "OMP_NUM_THREADS": str(rank.num_threads),
        }
    )
    torch.set_num_threads(rank.num_threads)
    ensure_operators()
    import deepspeed

    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
