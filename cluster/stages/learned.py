"""What the learning stages hand on to evaluation, release and records."""

from __future__ import annotations

from dataclasses import dataclass

from rl_actors.contracts import DataSnapshot, PolicyVersion, RewardModelVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """The frozen results of stages 1 to 4, each with its hash."""

    snapshot: DataSnapshot
    base: PolicyVersion
    baseline: PolicyVersion
    reward_model: RewardModelVersion
    candidate: PolicyVersion

    @property
    def trained(self) -> tuple[PolicyVersion, RewardModelVersion, PolicyVersion]:
        """The results of training, in the order they were made."""
        return self.baseline, self.reward_model, self.candidate
