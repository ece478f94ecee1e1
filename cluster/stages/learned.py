"""What the learning stages hand on to evaluation, release and records."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.pins import NO_PINS, Pins
from rl_actors.contracts import DataSnapshot, PolicyVersion, RewardModelVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """The frozen results of stages 1 to 4, each with its hash."""

    snapshot: DataSnapshot
    base: PolicyVersion
    baseline: PolicyVersion
    reward_model: RewardModelVersion
    candidate: PolicyVersion
    pins: Pins = NO_PINS

    @property
    def trained(self) -> tuple[PolicyVersion | RewardModelVersion, ...]:
        """The results of this run's training, in the order they were made; a pinned version is none."""
        baseline = () if self.pins.baseline else (self.baseline,)
        reward_model = () if self.pins.reward_model else (self.reward_model,)
        return (*baseline, *reward_model, self.candidate)
