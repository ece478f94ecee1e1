"""Placement: who reserves what, and a spec that cannot fit is refused instead of waiting for ever."""

from __future__ import annotations

import pytest

from cluster.plan.placement import Placement, check_capacity, local_cpus, place, reserve
from cluster.spec.spec import load_spec, override
from rl_actors.contracts.errors import BadInputError, InfrastructureError

GPU = [
    "cluster.gpus_per_learner=1",
    "cluster.gpus_per_rollout_worker=2",
    "ppo.num_learners=2",
    "ppo.num_rollout_workers=3",
]


def placed(*settings: str) -> Placement:
    return place(override(load_spec("support_desk"), list(settings)))


def test_the_embedded_default_fits_a_small_machine():
    placement = placed()
    assert placement.peak == {"CPU": 3.0, "GPU": 0.0}
    assert [bundle.as_ray() for bundle in placement.bundles("ppo")] == [{"CPU": 1.0}] * 3
    assert (local_cpus(placement, cores=2), local_cpus(placement, cores=16)) == (3, 16)


def test_gpus_are_counted_by_role_and_stage():
    placement = placed(*GPU)
    assert placement.demand("sft") == {"CPU": 2.0, "GPU": 2.0}
    assert placement.demand("ppo") == {"CPU": 6.0, "GPU": 8.0}
    assert placement.demand("offline_eval") == {"CPU": 3.0, "GPU": 6.0}
    assert placement.demand("canary") == {"CPU": 3.0, "GPU": 4.0}
    assert placement.peak == {"CPU": 6.0, "GPU": 8.0}


def test_every_bundle_has_one_index():
    placement = placed(*GPU)
    bundles = placement.bundles("ppo")
    assert [placement.index("ppo", bundle.role, bundle.rank) for bundle in bundles] == list(range(6))
    assert bundles[placement.index("ppo", "rollout_worker", 2)].gpus == 2.0
    assert placement.index("canary", "gateway") == 2
    for stage, role, rank in (("sft", "scorer", 0), ("ppo", "learner", 2)):
        with pytest.raises(KeyError, match=role):
            placement.index(stage, role, rank)


def test_no_bundle_is_empty():
    # Ray refuses a placement group with an empty bundle.
    for settings in ([], GPU, ["cluster.gpus_per_learner=0.5"]):
        for stage in ("sft", "reward_model", "ppo", "offline_eval", "canary"):
            assert all(bundle.as_ray() for bundle in placed(*settings).bundles(stage))


@pytest.mark.parametrize(
    ("available", "field", "value"),
    [
        ({"CPU": 64.0}, "cluster.gpus_per_learner, cluster.gpus_per_rollout_worker", 8.0),
        ({"CPU": 64.0, "GPU": 7.0}, "cluster.gpus_per_learner, cluster.gpus_per_rollout_worker", 8.0),
        ({"CPU": 2.0, "GPU": 8.0}, "ppo.num_rollout_workers", 6.0),
        ({}, "ppo.num_rollout_workers", 6.0),
    ],
)
def test_more_than_the_cluster_has_is_refused(available: dict[str, float], field: str, value: float):
    with pytest.raises(BadInputError) as caught:
        check_capacity(placed(*GPU), available)
    assert (caught.value.field, caught.value.value) == (field, value)
    assert "the cluster has" in caught.value.remedy


def test_enough_passes():
    check_capacity(placed(*GPU), {"CPU": 6.0, "GPU": 8.0, "memory": 1.0})
    check_capacity(placed(), {"CPU": 3.0})


@pytest.mark.ray
def test_ray_reserves_what_fits_and_a_wait_is_bounded():
    import ray
    from ray.util.placement_group import remove_placement_group

    ray.init(address="local", num_cpus=3, num_gpus=0, include_dashboard=False, log_to_driver=False)
    try:
        group = reserve(placed(), "ppo", timeout_s=30)
        assert group.bundle_count == 3
        remove_placement_group(group)
        with pytest.raises(InfrastructureError, match=r"waited 0\.5 s.*free now"):
            reserve(placed(*GPU), "ppo", timeout_s=0.5)
    finally:
        ray.shutdown()
