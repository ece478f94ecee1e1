"""Groups of training actors behind the four protocols of the PPO loop; every wait here is bounded."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from rl_actors.actors.learner_actor import LearnerRank, PpoLearnerActor
from rl_actors.actors.reward_scorer import RewardScorer
from rl_actors.actors.rollout_worker import RolloutBatch, RolloutWorker, RolloutWorkerSettings
from rl_actors.algorithms import RewardMix
from rl_actors.contracts import (
    InfrastructureError,
    InstabilityError,
    LearnerUpdate,
    Rollout,
    RolloutRequest,
    Score,
    SeatrialError,
    TrainingSample,
)
from rl_actors.learner import PpoSettings
from rl_actors.ports import free_port
from rl_actors.training import LoopState

logger = logging.getLogger(__name__)
START_TIMEOUT_S = 300.0
MAX_DROPPED_FRACTION = 0.25
LOOP_STATE = "loop.json"  # in a checkpoint, beside the ranks' own state
LOGS = "its log is under the Ray session's logs/ on its node, and --debug shows the traceback"
_RAISED = re.compile(r"[\w.]*(Error|Exception)\b")
Options = Callable[[str, int], Mapping[str, Any]]
"""(role, rank) -> Ray actor options: placement decides them, this module only passes them on."""


def wait_for(references: Sequence[Any], *, timeout_s: float, what: str) -> list[Any]:
    """Return the results of remote calls.

    Raises:
        InfrastructureError: An actor died or did not answer in time. Errors of our own tree pass through unchanged.
    """
    try:
        return ray.get(list(references), timeout=timeout_s)
    except GetTimeoutError as error:
        raise InfrastructureError(f"{what} did not answer within {timeout_s:.0f} s; see the Ray dashboard") from error
    except RayActorError as error:
        raise InfrastructureError(f"{what} died: {one_line(error)}; {LOGS}") from error
    except RayTaskError as error:
        cause = innermost(error)
        if isinstance(cause, SeatrialError):
            raise cause from error
        raise InfrastructureError(f"{what} failed: {one_line(cause)}{_where(error)}; {LOGS}") from error


def _where(error: RayTaskError) -> str:
    """Say which process; Ray's error of a known kind passes itself off as its cause, and has forgotten."""
    pid, address = getattr(error, "pid", None), getattr(error, "ip", None)
    return f" (pid {pid} on {address})" if pid and address else ""


def innermost(error: BaseException) -> BaseException:
    """Return what a remote call really raised: Ray wraps it once per border that it crossed."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def one_line(error: BaseException) -> str:
    """Return type and first line of an exception; of a dead actor the line that says why, past Ray's own traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line[0].isspace()]
    if not isinstance(error, RayActorError):
        return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    raised = [line for line in lines if _RAISED.match(line)]
    return (raised or lines or [type(error).__name__])[-1]


class RolloutPool:
    """Rollout workers that share a batch of requests; whole groups stay on one worker."""

    def __init__(
        self, model_path: str, settings: RolloutWorkerSettings, *, num_workers: int, options: Options, timeout_s: float
    ) -> None:
        """Start the workers and wait until every engine is up."""
        self._model_path, self._settings, self._options = model_path, settings, options
        self.workers = [self._start(rank) for rank in range(num_workers)]
        self._timeout_s = timeout_s
        self.num_reissued = 0
        self._await(self.workers)

    def restart(self, rank: int) -> None:
        """Replace a worker whose engine broke by a new one; it serves the weights it was loaded with, no others."""
        close_actors([self.workers[rank]])
        self.workers[rank] = self._start(rank)
        self._await([self.workers[rank]])

    def _start(self, rank: int) -> Any:
        remote: Any = ray.remote(RolloutWorker)
        return remote.options(**self._options("rollout_worker", rank)).remote(self._model_path, self._settings)

    def _await(self, workers: Sequence[Any]) -> None:
        wait_for([worker.ready.remote() for worker in workers], timeout_s=START_TIMEOUT_S, what="rollout workers")

    def rollouts(self, requests: Sequence[RolloutRequest], temperature: float) -> list[Rollout]:
        """Attempt all requests; the result is ordered by request, with dropped ones left out."""
        count = len(self.workers)
        shares = [[r for r in requests if r.group_id % count == index] for index in range(count)]
        calls = [w.run.remote(share, temperature) for w, share in zip(self.workers, shares, strict=True) if share]
        batches: list[RolloutBatch] = wait_for(calls, timeout_s=self._timeout_s, what="rollout workers")
        self.num_reissued += sum(batch.reissued for batch in batches)
        require_enough(requests, batches)
        by_id = {rollout.rollout_id: rollout for batch in batches for rollout in batch.rollouts}
        return [by_id[request.rollout_id] for request in requests if request.rollout_id in by_id]

    def close(self) -> None:
        """Stop the workers."""
        close_actors(self.workers, graceful=True)
        self.workers = []


def require_enough(requests: Sequence[RolloutRequest], batches: Sequence[RolloutBatch]) -> None:
    """Refuse to go on with what is left when infrastructure ate too many rollouts, saying what broke the first.

    Raises:
        InfrastructureError: More than `MAX_DROPPED_FRACTION` of the requests were dropped.
    """
    dropped = [name for batch in batches for name in batch.dropped]
    if len(dropped) > MAX_DROPPED_FRACTION * len(requests):
        reason = next(batch.first_error for batch in batches if batch.first_error)
        raise InfrastructureError(
            f"{len(dropped)} of {len(requests)} rollouts were lost twice, the first ({dropped[0]}) to: {reason}"
        )


class ScorerPool:
    """One or more reward scorers."""

    def __init__(
        self, path: str, version: str, mix: RewardMix, *, num_scorers: int, num_threads: int, options: Options
    ) -> None:
        """Start the scorers."""
        remote: Any = ray.remote(RewardScorer)
        self._scorers = [
            remote.options(**options("scorer", rank)).remote(path, version, mix, num_threads)
            for rank in range(num_scorers)
        ]

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """Return one score per rollout, in order."""
        count = len(self._scorers)
        calls = [scorer.score.remote(list(rollouts[index::count])) for index, scorer in enumerate(self._scorers)]
        parts = wait_for(calls, timeout_s=START_TIMEOUT_S, what="reward scorers")
        by_id = {score.rollout_id: score for part in parts for score in part}
        return [by_id[rollout.rollout_id] for rollout in rollouts]

    def close(self) -> None:
        """Stop the scorers."""
        close_actors(self._scorers)


class LearnerGroup:
    """All ranks of the learner as one `Learner`, with checkpoints that are complete or absent."""

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
        remote: Any = ray.remote(PpoLearnerActor)
        self._ranks = []
        for rank in range(num_ranks):
            place = LearnerRank(
                rank=rank, num_ranks=num_ranks, master_address=address, master_port=port, num_threads=num_threads
            )
            actor = remote.options(**options("learner", rank)).remote(policy_path, reference_path, settings, place)
            self._ranks.append(actor)

    def update(self, samples: Sequence[TrainingSample]) -> LearnerUpdate:
        """Update on all ranks; each gets whole groups of about equal size and reports metrics of the whole batch."""
        shares = share_by_group(samples, len(self._ranks))
        calls = [actor.update.remote(share) for actor, share in zip(self._ranks, shares, strict=True)]
        update: LearnerUpdate = wait_for(calls, timeout_s=3600.0, what="learners")[0]
        if update.restore_factor:
            self._restore(update)
        return update

    def _restore(self, update: LearnerUpdate) -> None:
        """Put all ranks back to the newest checkpoint older than the weights that tripped, and forget newer ones.

        A collapse shows in the look that begins the *next* update: a checkpoint of the very weights that were looked at
        holds the collapse. The oldest one is kept whatever it is; there is no other.

        Raises:
            InstabilityError: There is none to go back to.
        """
        found = complete_checkpoints(self._checkpoints)
        if not found:
            raise InstabilityError(f"{'; '.join(update.trips)}; there is no checkpoint to go back to")
        judged = checkpoint_name(update.weights_version - 1)
        good = [path for path in found if path.name < judged] or found[:1]
        for suspect in found[len(good) :]:
            shutil.rmtree(suspect, ignore_errors=True)
        self._call("restore", str(good[-1]), update.restore_factor)

    def probe(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the learner's log-probabilities of the probe tokens."""
        return wait_for([a.probe.remote(sequences) for a in self._ranks], timeout_s=START_TIMEOUT_S, what="learners")[0]

    def weights(self) -> Any:
        """Return an object reference to the policy's weights."""
        return wait_for([a.weights.remote() for a in self._ranks], timeout_s=START_TIMEOUT_S, what="learners")[0]

    def save_checkpoint(self, weights_version: int, loop_state: LoopState) -> None:
        """Write all ranks' and the loop's state, then give the directory its final name; keep the newest two."""
        final = self._checkpoints / checkpoint_name(weights_version)
        temporary = final.with_suffix(".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        self._call("save_checkpoint", str(temporary))
        (temporary / LOOP_STATE).write_text(json.dumps(loop_state), encoding="utf8")
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        for old in complete_checkpoints(self._checkpoints)[:-2]:
            shutil.rmtree(old, ignore_errors=True)

    def load_newest_checkpoint(self) -> tuple[int, LoopState]:
        """Restore the newest complete checkpoint; returns its weights version and the loop's state, or (0, nothing).

        What could not be restored is logged by name.
        """
        found = complete_checkpoints(self._checkpoints)
        if not found:
            return 0, {}
        version, missing = self._call("load_checkpoint", str(found[-1]))
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
        calls = [getattr(actor, method).remote(*arguments) for actor in self._ranks]
        return wait_for(calls, timeout_s=START_TIMEOUT_S, what="learners")[0]


def share_by_group(samples: Sequence[TrainingSample], num_shares: int) -> list[list[TrainingSample]]:
    """Deal whole groups to ranks, largest first, each to the rank with the fewest tokens so far.

    Attempts at one task are each other's baseline, so they must not be split.

    Raises:
        InfrastructureError: Fewer groups than ranks: a rank would have nothing to do while the others wait for it.
    """
    groups: dict[int, list[TrainingSample]] = {}
    for sample in samples:
        groups.setdefault(sample.group_id, []).append(sample)
    if len(groups) < num_shares:
        raise InfrastructureError(f"{len(groups)} groups of rollouts came back for {num_shares} learners; see the log")
    shares: list[list[TrainingSample]] = [[] for _ in range(num_shares)]
    sizes = [0] * num_shares
    for _, group in sorted(groups.items(), key=lambda item: (-_num_tokens(item[1]), item[0])):
        rank = sizes.index(min(sizes))
        shares[rank] += group
        sizes[rank] += _num_tokens(group)
    return shares


def _num_tokens(samples: Sequence[TrainingSample]) -> int:
    return sum(len(sample.token_ids) for sample in samples)


def checkpoint_name(weights_version: int) -> str:
    """Return the directory name of a version's checkpoint; names sort as versions do."""
    return f"step_{weights_version:06d}"


def complete_checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    return sorted(path for path in directory.glob("step_*") if path.suffix != ".tmp")


def close_actors(actors: Sequence[Any], *, graceful: bool = False) -> None:
    """End actors; a graceful close lets them stop their own processes first, within ten seconds."""
    if graceful:
        ray.wait([actor.close.remote() for actor in actors], num_returns=len(actors), timeout=10.0)
    for actor in actors:
        ray.kill(actor)
