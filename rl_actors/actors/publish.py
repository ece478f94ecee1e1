"""Publish, prove, and heal: no engine serves weights that it has not been shown to serve.

The proof: on the same probe tokens an engine has the learner's log-probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rl_actors.actors.calls import wait_for
from rl_actors.actors.learners import LearnerGroup
from rl_actors.actors.rollouts import RolloutPool
from rl_actors.contracts import AttestationError, InfrastructureError


def attestation_gap(engine: Sequence[Sequence[float]], learner: Sequence[Sequence[float]]) -> float:
    """Return mean |engine logprob - learner logprob| over all probe tokens, in nats.

    Raises:
        AttestationError: The two disagree in shape, or there is no probe token: nothing was proved.
    """
    # A sequence that one side cut short must not pass on the tokens that are left.
    shapes = [len(row) for row in engine], [len(row) for row in learner]
    if shapes[0] != shapes[1]:
        raise AttestationError(
            f"the engine scored {shapes[0]} probe tokens, the learner {shapes[1]}: nothing is proved"
        )
    pairs = [pair for ours, theirs in zip(engine, learner, strict=True) for pair in zip(ours, theirs, strict=True)]
    if not pairs:
        raise AttestationError("attestation had no probe tokens; give the run at least one probe prompt")
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


def require_attested(gap: float, *, tolerance: float, worker: str, weights_version: int) -> None:
    """Refuse an engine whose weights are not the learner's.

    Raises:
        AttestationError: The gap exceeds the tolerance.
    """
    # Not `gap > tolerance`: NaN must be refused too.
    if not gap <= tolerance:
        raise AttestationError(
            f"{worker} does not serve weights version {weights_version}: mean |engine - learner logprob| is {gap:.4g}, "
            f"allowed {tolerance:.4g}; the worker is quarantined and its rollouts are rejected"
        )


class AttestedSync:
    """Publishes weights to every worker and proves that each serves them.

    A worker with wrong numbers is quarantined and resynced, one that broke is replaced; each gets one more chance.
    """

    def __init__(
        self, learners: LearnerGroup, pool: RolloutPool, probes: Sequence[Sequence[int]], *, tolerance: float
    ) -> None:
        """Hold both sides and the probe sequences. `tolerance` is the largest mean |engine - learner logprob|, nats."""
        self._learners, self._pool, self._probes, self._tolerance = learners, pool, probes, tolerance
        self.num_resyncs = 0

    def publish(self, weights_version: int) -> float:
        """Publish and attest; returns the largest gap of any worker, in nats.

        Raises:
            AttestationError: A worker failed twice: it stays quarantined and nothing it makes is used.
            InfrastructureError: A worker broke twice.
        """
        weights, expected = self._learners.weights(), self._learners.probe(self._probes)
        found = self._try(range(len(self._pool.workers)), weights, weights_version, expected)
        gaps = {rank: gap for rank, gap in found.items() if not isinstance(gap, InfrastructureError)}
        broken = sorted(found.keys() - gaps.keys())
        # Not `> tolerance`: a gap of NaN has failed too.
        failed = [*broken, *(rank for rank, gap in gaps.items() if not gap <= self._tolerance)]
        for rank in broken:
            self._pool.restart(rank)
        self.num_resyncs += len(failed)
        found |= self._try(failed, weights, weights_version, expected)
        return max(self._require(rank, result, weights_version) for rank, result in found.items())

    def _try(
        self, ranks: Sequence[int], weights: Any, weights_version: int, expected: list[list[float]]
    ) -> dict[int, float | InfrastructureError]:
        """Publish to these workers at once, then probe them; returns each one's gap, or what broke it."""
        workers = {rank: self._pool.workers[rank] for rank in ranks}
        published = {rank: worker.publish.remote(weights, weights_version) for rank, worker in workers.items()}
        broken = {rank: _error_of(call) for rank, call in published.items()}
        # Only now: an actor works on several calls at once, and a probe must not overtake the publish.
        probed = {rank: worker.probe.remote(self._probes) for rank, worker in workers.items()}
        return {rank: broken[rank] or _gap_of(call, weights_version, expected) for rank, call in probed.items()}

    def _require(self, rank: int, result: float | InfrastructureError, weights_version: int) -> float:
        worker = f"rollout worker {rank}"
        if isinstance(result, InfrastructureError):
            raise type(result)(f"{worker} failed twice after weights version {weights_version}: {result}") from result
        require_attested(result, tolerance=self._tolerance, worker=worker, weights_version=weights_version)
        return result


def _error_of(call: Any) -> InfrastructureError | None:
    """Wait for a publish; returns what broke it."""
    try:
        wait_for([call], what="rollout worker")
    except InfrastructureError as error:
        return error
    return None


def _gap_of(call: Any, weights_version: int, expected: list[list[float]]) -> float | InfrastructureError:
    """Wait for a probe; returns the worker's gap, or why there is none."""
    try:
        ((version, logprobs),) = wait_for([call], what="rollout worker")
        if version != weights_version:
            raise AttestationError(f"it serves weights version {version}, published was {weights_version}")
        return attestation_gap(logprobs, expected)
    except InfrastructureError as error:
        return error
