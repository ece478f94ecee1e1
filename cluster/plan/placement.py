"""Spec -> Ray bundles: the only place that counts CPUs and GPUs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cluster.spec import WorkflowSpec
from rl_actors.contracts import BadInputError, InfrastructureError

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup


Role = Literal["learner", "rollout_worker", "scorer", "policy_server", "gateway"]
Stage = Literal["sft", "reward_model", "ppo", "offline_eval", "canary"]

NUM_POLICY_SERVERS = 2  # stable and candidate, side by side during a canary
NUM_THREADS = 2  # learners and engines take turns, so each may use the cores of a small machine

_ROLES: Mapping[Stage, tuple[Role, ...]] = {
    "sft": ("learner",),
    "reward_model": ("learner",),
    "ppo": ("learner", "rollout_worker", "scorer"),
    "offline_eval": ("rollout_worker",),
    "canary": ("policy_server", "gateway"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceBundle:
    """Resources that one actor reserves. `rank` counts within the role."""

    role: Role
    rank: int
    cpus: float
    gpus: float

    def as_ray(self) -> dict[str, float]:
        """Return the bundle as Ray wants it."""
        # Ray refuses a bundle that asks for nothing: zeros are left out.
        resources = {"CPU": self.cpus, "GPU": self.gpus}
        return {name: amount for name, amount in resources.items() if amount > 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """All actors a run may start, by role.

    Example: two learners and one rollout worker on GPU give `bundles("ppo")` of 2 + 1 + 1 (the scorer).
    """

    by_role: Mapping[Role, tuple[ResourceBundle, ...]]

    def bundles(self, stage: Stage) -> tuple[ResourceBundle, ...]:
        """Return the bundles a stage holds at the same time, in placement-group order."""
        return tuple(bundle for role in _ROLES[stage] for bundle in self.by_role[role])

    def index(self, stage: Stage, role: Role, rank: int = 0) -> int:
        """Return an actor's bundle index in the stage's placement group. Raises KeyError when it has none."""
        for position, bundle in enumerate(self.bundles(stage)):
            if (bundle.role, bundle.rank) == (role, rank):
                return position
        raise KeyError(f"stage {stage!r} has no {role} of rank {rank}")

    def demand(self, stage: Stage) -> dict[str, float]:
        """Return the CPUs and GPUs a stage needs in all."""
        bundles = self.bundles(stage)
        return {"CPU": sum(b.cpus for b in bundles), "GPU": sum(b.gpus for b in bundles)}

    @property
    def peak(self) -> dict[str, float]:
        """CPUs and GPUs of the largest stage, each on its own."""
        return {name: max(self.demand(stage)[name] for stage in _ROLES) for name in ("CPU", "GPU")}


def place(spec: WorkflowSpec) -> Placement:
    """Return the bundles of every role. Pure."""
    cluster, ppo = spec.cluster, spec.ppo
    counts: Mapping[Role, tuple[int, float]] = {
        "learner": (ppo.num_learners, cluster.gpus_per_learner),
        "rollout_worker": (ppo.num_rollout_workers, cluster.gpus_per_rollout_worker),
        "scorer": (1, 0.0),
        "policy_server": (NUM_POLICY_SERVERS, cluster.gpus_per_rollout_worker),
        "gateway": (1, 0.0),
    }
    return Placement(
        by_role={
            role: tuple(ResourceBundle(role=role, rank=rank, cpus=1.0, gpus=gpus) for rank in range(count))
            for role, (count, gpus) in counts.items()
        }
    )


def local_cpus(placement: Placement, cores: int) -> int:
    """Return the logical CPUs to start a local Ray with."""
    # On a small machine actors share cores: a bundle that never fits would wait for ever.
    return max(cores, math.ceil(placement.peak["CPU"]))


def check_capacity(placement: Placement, available: Mapping[str, float]) -> None:
    """Refuse a spec that asks for more than the cluster has: Ray would wait for ever.

    Args:
        placement: what the spec asks for.
        available: resources in all, for example `ray.cluster_resources()`.
    """
    knobs = {"GPU": "cluster.gpus_per_learner, cluster.gpus_per_rollout_worker", "CPU": "ppo.num_rollout_workers"}
    for name, needed in placement.peak.items():
        found = available.get(name, 0.0)
        if needed > found:
            remedy = f"needs {needed:g} {name} at its largest stage, the cluster has {found:g}; lower it or add nodes"
            raise BadInputError(knobs[name], needed, remedy)


def reserve(placement: Placement, stage: Stage, *, timeout_s: float) -> PlacementGroup:
    """Reserve a stage's bundles on the connected Ray cluster. Raises InfrastructureError after `timeout_s`."""
    # Imported here: Ray takes two seconds to import, and `seatrial plan` needs none of it.
    import ray
    from ray.exceptions import GetTimeoutError
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([bundle.as_ray() for bundle in placement.bundles(stage)], strategy="PACK")
    try:
        ray.get(group.ready(), timeout=timeout_s)
    except GetTimeoutError as error:
        remove_placement_group(group)
        free = {name: ray.available_resources().get(name, 0.0) for name in ("CPU", "GPU")}
        message = f"stage {stage!r} waited {timeout_s:g} s for {placement.demand(stage)}; free now: {free}"
        raise InfrastructureError(f"{message}; stop other jobs or add nodes") from error
    return group


def threads_each(count: int) -> int:
    """Return the threads of one of `count` processes that work at the same time."""
    # More threads than cores make no progress faster and switch more often.
    return max(1, NUM_THREADS // count)
