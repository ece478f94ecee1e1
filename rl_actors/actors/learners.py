"""The learner's ranks as Ray actors behind one `Learner`, with checkpoints that are complete or absent."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from rl_actors.actors.calls import Options, close_actors, start_actor, wait_for
from rl_actors.contracts import InfrastructureError, InstabilityError, LearnerUpdate, TrainingSample
from rl_actors.learner import PpoLearner, PpoSettings, ensure_operators
from rl_actors.ports import free_port
from rl_actors.training import LoopState

logger = logging.getLogger(__name__)
UPDATE_TIMEOUT_S = 3600.0
LOOP_STATE = "loop.json"  # in a checkpoint, beside the ranks' own state


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerRank:
    """Where this rank stands in its group, and how many threads it may use."""

    rank: int
    num_ranks: int
    master_address: str
    master_port: int
    num_threads: int


def join_process_group(rank: LearnerRank) -> None:
    """Set the environment DeepSpeed and torch.distributed read, cap threads, and join."""
    os.environ |= {
        "RANK": str(rank.rank),
        "LOCAL_RANK": "0",  # Ray shows each actor its own GPU only
        "WORLD_SIZE": str(rank.num_ranks),
        "MASTER_ADDR": rank.master_address,
        "MASTER_PORT": str(rank.master_port),
        "OMP_NUM_THREADS": str(rank.num_threads),
    }
    torch.set_num_threads(rank.num_threads)
    ensure_operators()
    import deepspeed

    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)


class PpoLearnerActor(PpoLearner):
    """One rank as a Ray actor, placed and addressed by the driver."""

    def __init__(self, policy_path: str, reference_path: str, settings: PpoSettings, rank: LearnerRank) -> None:
        """Join the process group and build the DeepSpeed engine."""
        join_process_group(rank)
        super().__init__(policy_path, reference_path, settings)

    def put_weights(self) -> Any:
        """Put the policy's weights into the object store once; every engine reads the same copy."""
        return ray.put(self.weights())

    def resume(self, directory: str) -> tuple[int, tuple[str, ...]]:
        """Restore a checkpoint; returns its weights version and what could not be restored."""
        missing = self.load_checkpoint(directory)
        return self.weights_version, missing


class LearnerGroup:
    """All ranks of the learner as one `Learner`."""

    def __init__(
        self,
        policy_path: str,
        reference_path: str,
        settings: PpoSettings,
        *,
        num_ranks: int,
        num_threads: int,
        options: Options,
        checkpoints: Path,
    ) -> None:
        """Start one actor per rank; they find each other through a free port of this node."""
        self._checkpoints = checkpoints
        address, port = ray.util.get_node_ip_address(), free_port()
        self._ranks = []
        for rank in range(num_ranks):
            place = LearnerRank(
                rank=rank, num_ranks=num_ranks, master_address=address, master_port=port, num_threads=num_threads
            )
            arguments = policy_path, reference_path, settings, place
            self._ranks.append(start_actor(PpoLearnerActor, options("learner", rank), *arguments))

    def update(self, samples: Sequence[TrainingSample]) -> LearnerUpdate:
        """Update on all ranks; each gets whole groups of about equal size and reports metrics of the whole batch."""
        shares = share_by_group(samples, len(self._ranks))
        calls = [actor.update.remote(share) for actor, share in zip(self._ranks, shares, strict=True)]
        # The first speaks for all: metrics and decisions are merged over ranks before they return.
        update: LearnerUpdate = wait_for(calls, timeout_s=UPDATE_TIMEOUT_S, what="learners")[0]
        if update.restore_factor:
            self._restore(update)
        return update

    def _restore(self, update: LearnerUpdate) -> None:
        """Put all ranks back to the newest checkpoint older than the weights that tripped, and forget newer ones.

        Raises:
            InstabilityError: There is none to go back to.
        """
        found = complete_checkpoints(self._checkpoints)
        if not found:
            raise InstabilityError(f"{'; '.join(update.trips)}; there is no checkpoint to go back to")
        # A collapse shows in the look that begins the *next* update: a checkpoint of the very weights that were looked
        # at holds the collapse. The oldest one is kept whatever it is; there is no other.
        judged = checkpoint_name(update.weights_version - 1)
        good = [path for path in found if path.name < judged] or found[:1]
        for suspect in found[len(good) :]:
            shutil.rmtree(suspect, ignore_errors=True)
        self._call("restore", str(good[-1]), update.restore_factor)

    def probe(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the learner's log-probabilities of the probe tokens."""
        return self._call("probe_logprobs", sequences)

    def weights(self) -> Any:
        """Return an object reference to the policy's weights."""
        return self._call("put_weights")

    def save_checkpoint(self, weights_version: int, loop_state: LoopState) -> None:
        """Write all ranks' and the loop's state, then give the directory its final name; keep the newest two."""
        final = self._checkpoints / checkpoint_name(weights_version)
        temporary = final.with_suffix(".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        self._call("save_checkpoint", str(temporary))
        (temporary / LOOP_STATE).write_text(json.dumps(loop_state), encoding="utf8")
        # The name comes last: a directory that has it is complete, whenever this process dies.
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        # Two, because a tripwire goes behind the newest when its weights are those that tripped.
        for old in complete_checkpoints(self._checkpoints)[:-2]:
            shutil.rmtree(old, ignore_errors=True)

    def load_newest_checkpoint(self) -> tuple[int, LoopState]:
        """Restore the newest complete checkpoint; returns its weights version and the loop's state, or (0, nothing).

        What could not be restored is logged by name.
        """
        found = complete_checkpoints(self._checkpoints)
        if not found:
            return 0, {}
        version, missing = self._call("resume", str(found[-1]))
        state, kept = {}, found[-1] / LOOP_STATE
        if kept.is_file():
            state = json.loads(kept.read_text(encoding="utf8"))
        else:
            missing = (*missing, "the window of the reward-outcome watch")
        for name in missing:
            logger.warning("resumed from %s without %s", found[-1].name, name)
        return version, state

    def save_policy(self, directory: str) -> None:
        """Write the policy as a Hugging Face model directory."""
        self._call("save_policy", directory)

    def close(self) -> None:
        """Stop all ranks."""
        close_actors(self._ranks)

    def _call(self, method: str, *arguments: Any) -> Any:
        """Call a method on all ranks and return the first one's answer."""
        # On all: a rank that is left out would leave the others waiting in their next collective.
        calls = [getattr(actor, method).remote(*arguments) for actor in self._ranks]
        return wait_for(calls, what="learners")[0]


def share_by_group(samples: Sequence[TrainingSample], num_shares: int) -> list[list[TrainingSample]]:
    """Deal whole groups to ranks, largest first, each to the rank with the fewest tokens so far.

    Raises:
        InfrastructureError: Fewer groups than ranks: a rank would have nothing to do while the others wait for it.
    """
    # Whole, because attempts at one task are each other's baseline.
    groups: dict[int, list[TrainingSample]] = {}
    for sample in samples:
        groups.setdefault(sample.group_id, []).append(sample)
    if len(groups) < num_shares:
        raise InfrastructureError(f"{len(groups)} groups of rollouts came back for {num_shares} learners; see the log")
    shares: list[list[TrainingSample]] = [[] for _ in range(num_shares)]
    sizes = [0] * num_shares
    num_tokens = {name: sum(len(sample.token_ids) for sample in group) for name, group in groups.items()}
    for name in sorted(groups, key=lambda name: (-num_tokens[name], name)):
        rank = sizes.index(min(sizes))
        shares[rank] += groups[name]
        sizes[rank] += num_tokens[name]
    return shares


def checkpoint_name(weights_version: int) -> str:
    """Return the directory name of a version's checkpoint; names sort as versions do."""
    return f"step_{weights_version:06d}"


def complete_checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    return sorted(path for path in directory.glob("step_*") if path.suffix != ".tmp")
