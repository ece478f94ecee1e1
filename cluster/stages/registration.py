"""Registered versions: nothing carries traffic that MLflow cannot name, with the data and reward model it stands on."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.bundle import Bundle
from cluster.registry import Registry
from cluster.registry_entries import Lineage
from rl_actors.contracts import DataSnapshot, PolicyVersion, RewardModelVersion


def register_policies(
    registry: Registry,
    snapshot: DataSnapshot,
    reward_model: RewardModelVersion,
    policies: Sequence[tuple[PolicyVersion, Bundle]],
) -> None:
    """Register the reward model and every policy that may carry traffic, linked to each other."""
    bundle_id = policies[0][1].id
    lineage = Lineage(bundle_id=bundle_id, snapshot_sha256=snapshot.sha256, stage="reward_model")
    number = registry.versions.register_reward_model(reward_model, lineage)
    for policy, bundle in policies:
        stage = "degrade" if policy.kind == "degraded" else policy.kind
        lineage = Lineage(bundle_id=bundle.id, snapshot_sha256=snapshot.sha256, reward_model=number, stage=stage)
        registry.versions.register_policy(policy, lineage)
