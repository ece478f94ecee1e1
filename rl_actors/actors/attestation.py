"""Proof that an engine computes what the learner does: same probe tokens, same log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence

from rl_actors.errors import AttestationError


def attestation_gap(engine: Sequence[Sequence[float]], learner: Sequence[Sequence[float]]) -> float:
    """Return mean |engine logprob - learner logprob| over all probe tokens, in nats.

    Raises:
        AttestationError: The two disagree in shape, or there is no probe token: nothing was proved.
    """
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
    """Refuse an engine whose weights are not the learner's; NaN is refused too.

    Raises:
        AttestationError: The gap exceeds the tolerance.
    """
    if not gap <= tolerance:
        raise AttestationError(
            f"{worker} does not serve weights version {weights_version}: mean |engine - learner logprob| is {gap:.4g}, "
            f"allowed {tolerance:.4g}; the worker is quarantined and its rollouts are rejected"
        )
